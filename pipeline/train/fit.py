"""Training on Ray, the driver's side: it checks, starts, follows, and sees to an orderly end.

point = resume_point(config.run_dir)               # hashes the newest checkpoint, once
if not is_done(config, folder, manifest, point.state):
    state = fit(config, folder, manifest, progress, known=point)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError
from pipeline.core.arrow import arrow_location
from pipeline.core.cluster import connected_cluster
from pipeline.core.console import log, log_timeline, process_start_s
from pipeline.core.outcome import Finding, JobError, refuse
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.core.signals import signals
from pipeline.data.drift import has_moved
from pipeline.data.manifest import Manifest
from pipeline.data.plan import BatchPlan
from pipeline.train.checkpoints import ResumePoint, TrainState, next_attempt, prune, resume_point
from pipeline.train.history import Metrics, final_table, plot_history, read_rows
from pipeline.train.run_folder import claim_run_folder, refuse_other_run, refuse_unfinished
from pipeline.train.stopping import is_finished
from pipeline.train.trackers import Trackers
from pipeline.train.workers import Workers, shortfalls, size_workers

if TYPE_CHECKING:  # torch takes a second, which a run with nothing to do can go without
    from pipeline.train.worker import Sent


def is_done(config: Config, folder: StoragePath, manifest: Manifest, state: TrainState) -> bool:
    """Whether a run in this state has nothing left to do, even if its data have changed since.

    Raises ConfigError for the run of another config, and for one that is not at its end and whose data have changed.
    """
    if has_moved(config, manifest):
        refuse_unfinished(config, manifest, state)
        return True
    refuse_other_run(config, manifest)
    if not state.step:
        return False
    from pipeline.train.assembly import Task

    return is_finished(config, Task.of(config, folder, manifest).total_steps, state)


def fit(
    config: Config,
    folder: StoragePath,
    manifest: Manifest,
    progress: Progress,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    concurrent_runs: int = 1,
    known: ResumePoint | None = None,
) -> TrainState:
    """Train, or resume training, to the end. Returns the final state.

    SIGINT and SIGTERM wait for a checkpoint before they end it. `on_metrics` is called with what the trackers get,
    after them. `concurrent_runs` share the cluster, this one included. A `known` checkpoint was read already.
    """
    from tokenizers import Tokenizer

    from pipeline.train.assembly import Task, check_model
    from pipeline.train.worker import Sent

    task = Task.of(config, folder, manifest)
    check_model(config, Tokenizer.from_str(task.tokenizer_json))
    workers = _workers(config, task.plan, concurrent_runs)
    claim_run_folder(config, folder, manifest, task.total_steps)
    point = resume_point(config.run_dir, known)
    log.info(
        "train: %s steps of %s pairs on %s%s",
        f"{task.total_steps:,}",
        config.training.global_batch_size,
        workers,
        f", from step {point.state.step:,}" if point.state.step else "",
    )
    log_timeline("training starts")
    fatal: list[dict[str, Any]] = []
    with Trackers.open(config, point.state.step) as trackers:

        def receive(message: dict[str, Any]) -> None:
            trackers.receive(message)
            if "fatal" in message:
                fatal.append(message)
            if "metrics" in message:
                on_metrics(message["metrics"])

        with (
            progress.stage(
                "train", task.total_steps, "steps", counter="steps", start=point.state.step, receive=receive
            ),
            _held(config, progress),
        ):
            _fit(config, workers, Sent(task, workers.threads, progress.handle, point, process_start_s()))
    if fatal:
        raise (ConfigError if fatal[0]["config"] else JobError)(fatal[0]["fatal"])
    point = resume_point(config.run_dir, point)
    prune(config.run_dir, config.checkpointing.max_checkpoints, point.folder)
    _summarise(config)
    return point.state


def _held(config: Config, progress: Progress) -> AbstractContextManager[None]:
    """Signals wait for a checkpoint. Only the main thread can handle them."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return signals.held(progress.ask_to_stop, config.checkpointing.grace_s, "for the last checkpoint")


def _trainer(config: Config, workers: Workers, sent: Sent) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.train.worker import ProcessGroupConfig, train_worker

    scaling, run_dir = config.scaling, config.run_dir
    storage_path, filesystem = arrow_location(run_dir)
    return TorchTrainer(
        train_worker,
        train_loop_config={"sent": sent},
        torch_config=ProcessGroupConfig(timeout_s=max(1, round(scaling.collective_timeout_s))),
        scaling_config=ScalingConfig(
            num_workers=workers.most if workers.fewest == workers.most else (workers.fewest, workers.most),
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
            elastic_resize_monitor_interval_s=scaling.resize_every_s,
            placement_strategy=scaling.placement.upper(),
            label_selector=scaling.labels.train or None,
        ),
        run_config=RunConfig(
            name=next_attempt(run_dir),
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpointing.max_checkpoints),
        ),
    )


def controller_timeouts(config: Config, workers: Workers) -> dict[str, str]:
    """Ray Train's timeouts, which its controller takes from the driver's environment (see CONTRIBUTING, Private APIs).

    A worker that does not answer, because it hangs in native code, is given up after as long a time as the others wait
    for it. Elastic workers may be counted on a node that is gone, until Ray has noticed: let it count again soon.
    """
    return {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.scaling.collective_timeout_s),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(config.scaling.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300" if workers.fewest == workers.most else "60",
    }


def _fit(config: Config, workers: Workers, sent: Sent) -> None:
    """Ray restarts workers that are lost; a lost controller, whose workers end with it, is restarted here."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.train import TrainingFailedError

    os.environ.update(controller_timeouts(config, workers))
    for starts_left in reversed(range(config.scaling.max_failures + 1)):
        sent = replace(sent, point=resume_point(config.run_dir, sent.point))
        prune(config.run_dir, config.checkpointing.max_checkpoints, sent.point.folder)
        try:
            _off_main_thread(_trainer(config, workers, sent).fit)
            return
        except TrainingFailedError as error:
            log.debug("training failed", exc_info=True)
            reasons = getattr(error, "worker_failures", None) or {0: error}
            lines = str(next(iter(reasons.values()))).strip().splitlines()
            words = lines[-1] if lines else type(error).__name__
            raise JobError(
                f"training failed: {words}; training.log has more, and once that is mended the same command resumes "
                "from the newest whole checkpoint"
            ) from error
        except (ActorDiedError, ActorUnavailableError) as error:
            if not starts_left:
                raise JobError("training failed: Ray's controller of the run died; training.log has more") from error
            log.warning("train: Ray's controller of the run died; it is started anew, from the newest checkpoint")


def _off_main_thread(work: Callable[[], object]) -> None:
    """Run in a thread, where Ray Train leaves SIGINT alone: the job turns it into an orderly end."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    done.result()


def _summarise(config: Config) -> None:
    """Draw the history, and log its last and best figures. A failure here must not fail the run."""
    history = config.run_dir / "metrics.jsonl"
    try:
        plot_history(history, config.run_dir / "history.png")
        log.info("train: %s shows the run\n%s", config.run_dir / "history.png", final_table(read_rows(history)))
    except Exception as error:
        log.warning("train: the history could not be drawn: %s", error)


def _workers(config: Config, plan: BatchPlan, concurrent_runs: int) -> Workers:
    """Workers that fit the cluster. Raises ConfigError saying what would fit."""
    cluster = connected_cluster()
    workers = size_workers(config, cluster, concurrent_runs)
    refuse(Finding("training", str(workers), ConfigError(each)) for each in shortfalls(config, workers, cluster))
    plan.check_workers(workers.most)
    share = plan.global_batch_size // workers.most
    if share < config.training.gradient_accumulation_steps:
        raise ConfigError(
            f"training.gradient_accumulation_steps: found {config.training.gradient_accumulation_steps}; "
            f"allowed are at most the {share} pairs of a worker's share"
        )
    return workers
