"""Training on Ray, the driver's side: it checks, starts, follows, and sees to an orderly end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.data.drift import has_moved
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan
from pipeline.runtime.artifact import checked
from pipeline.runtime.cluster import connected_cluster
from pipeline.runtime.console import log, log_timeline, process_start_s
from pipeline.runtime.findings import Finding, refuse
from pipeline.runtime.outcome import JobError
from pipeline.runtime.session import Progress
from pipeline.runtime.signals import signals
from pipeline.storage.arrow import arrow_location
from pipeline.storage.path import StoragePath
from pipeline.training.checkpoints import TrainState, newest_valid, next_attempt, prune, read_state
from pipeline.training.ending import is_finished
from pipeline.training.run_folder import claim_run_folder, refuse_other_run, refuse_unfinished
from pipeline.training.tracking.jsonl import read_rows
from pipeline.training.tracking.summary import final_table, plot_history
from pipeline.training.tracking.tracker import Metrics
from pipeline.training.tracking.trackers import Trackers
from pipeline.training.worker import Sent, train_worker
from pipeline.training.workers import Workers, shortfalls, size_workers


def resume_point(config: Config) -> tuple[StoragePath | None, TrainState]:
    """The newest whole checkpoint and its state; says which ones were passed over."""
    checkpoint, passed_over = newest_valid(config.run_dir)
    for sentence in passed_over:
        log.warning("train: %s", sentence)
    return checkpoint, read_state(checkpoint) if checkpoint else TrainState()


def state_on_other_data(config: Config, manifest: Manifest, model: StoragePath | None = None) -> TrainState:
    """The state of a run that is at its end, and whose data have moved since. Raises ConfigError for others.

    `model` is the run's, where that is all that is asked for.
    """
    _, state = resume_point(config)
    refuse_unfinished(config, manifest, state, model)
    return state


def finished_state(config: Config, folder: StoragePath, manifest: Manifest) -> TrainState | None:
    """The state of a run that has nothing left to do, though its data may have moved since.

    Raises ConfigError for a run folder of another config, and for one of other data that is not at its end.
    """
    if has_moved(config, manifest):
        return state_on_other_data(config, manifest)
    refuse_other_run(config, manifest)
    _, state = resume_point(config)
    if not state.step:
        return None
    from pipeline.training.assembly import Task

    return state if is_finished(config, Task.of(config, folder, manifest).total_steps, state) else None


def fit(
    config: Config,
    folder: StoragePath,
    manifest: Manifest,
    progress: Progress,
    told: Callable[[Metrics], None] = lambda metrics: None,
    beside: int = 1,
) -> TrainState:
    """Train, or go on training, to the end. Returns the final state.

    SIGINT and SIGTERM wait for a checkpoint before they end it. `told` gets what the trackers get, after them; so many
    runs, this one among them, train `beside` each other.
    """
    from tokenizers import Tokenizer

    from pipeline.training.assembly import Task
    from pipeline.training.build import check_model

    task = Task.of(config, folder, manifest)
    check_model(config, Tokenizer.from_str(checked(folder / "tokenizer.json").read_text(encoding="utf-8")))
    workers = _workers(config, task.plan, beside)
    claim_run_folder(config, folder, manifest, task.total_steps)
    _, state = resume_point(config)
    log.info(
        "train: %s steps of %s pairs on %s%s",
        f"{task.total_steps:,}",
        config.training.global_batch_size,
        workers,
        f", on from step {state.step:,}" if state.step else "",
    )
    log_timeline("training starts")
    sent = Sent(task, workers.threads, progress.handle, process_start_s())
    fatal: list[dict[str, Any]] = []
    with Trackers.open(config, state.step) as trackers:

        def receive(message: dict[str, Any]) -> None:
            trackers.receive(message)
            if "fatal" in message:
                fatal.append(message)
            if "metrics" in message:
                told(message["metrics"])

        with (
            progress.stage("train", task.total_steps, "steps", counter="steps", start=state.step, receive=receive),
            _held(config, progress),
        ):
            _fit(config, workers, sent)
    if fatal:
        raise (ConfigError if fatal[0]["config"] else JobError)(fatal[0]["fatal"])
    prune(config.run_dir, config.checkpointing.max_checkpoints)
    _summarise(config)
    return resume_point(config)[1]


def _held(config: Config, progress: Progress) -> AbstractContextManager[None]:
    """Signals wait for a checkpoint; they are the main thread's, and in another one nobody's."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return signals.held(progress.ask_to_stop, config.checkpointing.grace_s, "for the last checkpoint")


def _trainer(config: Config, workers: Workers, sent: Sent) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.training.process_group import ProcessGroupConfig

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: object) -> None:
            """Leave signals to the job, which turns them into an orderly end."""

    scaling, run_dir = config.scaling, config.run_dir
    # Ray's controller takes these from the driver: a worker that does not answer, as one that hangs in native code,
    # is given up after as long a time as one for which the others wait in vain.
    for name in ("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"):
        os.environ[name] = str(scaling.collective_timeout_s)
    # Elastic workers may be counted on a node that is gone, until Ray has noticed: let it count again soon.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300" if workers.fewest == workers.most else "60"
    storage_path, filesystem = arrow_location(run_dir)
    return Trainer(
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


def _fit(config: Config, workers: Workers, sent: Sent) -> None:
    """Ray restarts workers that are lost; a controller that is lost, with them, is started anew here."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.train.v2.api.exceptions import TrainingFailedError

    for starts_left in reversed(range(config.scaling.max_failures + 1)):
        prune(config.run_dir, config.checkpointing.max_checkpoints, spared=newest_valid(config.run_dir)[0])
        try:
            _trainer(config, workers, sent).fit()
            return
        except TrainingFailedError as error:
            log.debug("training failed", exc_info=True)
            reasons = getattr(error, "worker_failures", None) or {0: error}
            lines = str(next(iter(reasons.values()))).strip().splitlines()
            words = lines[-1] if lines else type(error).__name__
            raise JobError(
                f"training failed: {words}; training.log has more, and once that is mended the same command goes on "
                "from the newest whole checkpoint"
            ) from error
        except (ActorDiedError, ActorUnavailableError) as error:
            if not starts_left:
                raise JobError("training failed: Ray's controller of the run died; training.log has more") from error
            log.warning("train: Ray's controller of the run died; it is started anew, from the newest checkpoint")


def _summarise(config: Config) -> None:
    """The history as a picture, its last and best figures as a table. Neither is worth a run."""
    history = config.run_dir / "metrics.jsonl"
    try:
        plot_history(history, config.run_dir / "history.png")
        log.info("train: %s shows the run\n%s", config.run_dir / "history.png", final_table(read_rows(history)))
    except Exception as error:
        log.warning("train: the history could not be drawn: %s", error)


def _workers(config: Config, plan: Plan, beside: int) -> Workers:
    """Workers that fit the cluster. Raises ConfigError saying what would fit."""
    cluster = connected_cluster()
    workers = size_workers(config, cluster, beside)
    refuse(Finding("training", str(workers), ConfigError(each)) for each in shortfalls(config, workers, cluster))
    plan.check_workers(workers.most)
    share = plan.global_batch_size // workers.most
    if share < config.training.gradient_accumulation_steps:
        raise ConfigError(
            f"training.gradient_accumulation_steps: found {config.training.gradient_accumulation_steps}; "
            f"allowed are at most the {share} pairs of a worker's share"
        )
    return workers
