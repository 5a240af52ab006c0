"""Training on Ray, the driver's side: check the cluster, start the workers, track metrics, stop cleanly.

point = resume_point(config.run_dir)               # hashes the newest checkpoint, once
if not is_done(config, folder, manifest, point.state):
    state = fit(config, folder, manifest, progress, known=point)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError
from pipeline.core.arrow import arrow_location
from pipeline.core.cluster import connected_cluster
from pipeline.core.console import log, log_lines, log_timeline, process_start_s
from pipeline.core.outcome import Finding, JobError, command, raise_findings
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.core.signals import signals
from pipeline.data.drift import has_moved
from pipeline.data.feed import FEW_PAIRS
from pipeline.data.manifest import Manifest
from pipeline.data.plan import BatchPlan
from pipeline.training.checkpoints import ResumePoint, TrainState, next_attempt, prune, resume_point
from pipeline.training.history import Metrics, final_table, plot_history, read_rows
from pipeline.training.run_folder import claim_run_folder, refuse_other_run, refuse_unfinished
from pipeline.training.stopping import is_finished
from pipeline.training.trackers import Trackers
from pipeline.training.workers import Workers, shortfalls, size_workers

if TYPE_CHECKING:  # imports torch, which takes a second; a finished run does not need it
    from pipeline.training.worker import WorkerInput


def is_done(config: Config, folder: StoragePath, manifest: Manifest, state: TrainState) -> bool:
    """Whether a run in this state is finished, even if its data have changed since.

    Raises ConfigError if the folder holds a run of another config, or an unfinished run whose data have changed.
    """
    if has_moved(config, manifest):
        refuse_unfinished(config, manifest, state)
        return True
    refuse_other_run(config, manifest)
    if not state.step:
        return False
    from pipeline.training.assembly import RunSpec

    return is_finished(config, RunSpec.of(config, folder, manifest).total_steps, state)


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

    SIGINT and SIGTERM end it after a checkpoint. `on_metrics` is called with each row of metrics, after the trackers.
    `concurrent_runs` is the number of runs that share the cluster, including this one. `known` is the newest checkpoint
    if you have verified it already.
    """
    from pipeline.core.tokenizer_files import parse_tokenizer
    from pipeline.training.assembly import RunSpec, check_model
    from pipeline.training.worker import WorkerInput

    spec = RunSpec.of(config, folder, manifest)
    check_model(config, parse_tokenizer(spec.tokenizer_json, folder / "tokenizer.json"))
    workers = _checked_workers(config, spec.plan, concurrent_runs)
    claim_run_folder(config, folder, manifest, spec.total_steps)
    point = resume_point(config.run_dir, known)
    _log_small_data(config, spec.plan, manifest)
    start = point.state.step
    log.info(
        "train: %s steps of %s %s on %s%s",
        *(f"{spec.total_steps:,}", spec.plan.global_batch_size, manifest.unit, workers),
        f", from step {start:,}" if start else "",
    )
    log_timeline("training starts")
    fatal: list[dict[str, Any]] = []
    with Trackers.open(config, start) as trackers:

        def receive(message: dict[str, Any]) -> None:
            trackers.receive(message)
            if "fatal" in message:
                fatal.append(message)
            if "metrics" in message:
                on_metrics(message["metrics"])

        def starting(counts: dict[str, int]) -> str | None:
            return None if counts.get("steps", 0) > start else f"starting {workers.count} workers"

        with (
            progress.stage(
                *("train", spec.total_steps, "steps"),
                counter="steps",
                start=start,
                receive=receive,
                describe=starting,
            ),
            _deferred_signals(config, progress),
        ):
            _run_trainer(config, workers, WorkerInput(spec, workers.threads, progress.handle, point, process_start_s()))
    if fatal:
        raise (ConfigError if fatal[0]["config"] else JobError)(fatal[0]["fatal"])
    point = resume_point(config.run_dir, point)
    prune(config.run_dir, config.checkpointing.max_checkpoints, point.folder)
    _summarise(config, manifest.unit)
    return point.state


def _log_small_data(config: Config, plan: BatchPlan, manifest: Manifest) -> None:
    """Log what small data change, and what serves them better."""
    if plan.global_batch_size < config.training.global_batch_size:
        log.info(
            "train: batches of %d, because the training split has only %d records (training.global_batch_size=%d)",
            *(plan.global_batch_size, plan.rows, config.training.global_batch_size),
        )
    if plan.rows < FEW_PAIRS and manifest.holds_pairs and not config.model.pretrained:
        log.info(
            "train: %s pairs are few for a model from scratch; with fewer than about %s, a pretrained model finds more "
            "(%s, with your data.sources)",
            *(f"{plan.rows:,}", f"{FEW_PAIRS:,}", command("run", ["--config", "fine_tune"])),
        )


def _deferred_signals(config: Config, progress: Progress) -> AbstractContextManager[None]:
    """Write a checkpoint before a signal ends the job. Does nothing outside the main thread, which gets the signals."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return signals.deferred(progress.ask_to_stop, config.checkpointing.grace_s, "for the last checkpoint")


def _trainer(config: Config, workers: Workers, inputs: WorkerInput) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.training.process_group import ProcessGroupConfig
    from pipeline.training.worker import train_worker

    scaling, run_dir = config.scaling, config.run_dir
    storage_path, filesystem = arrow_location(run_dir)
    return TorchTrainer(
        train_worker,
        train_loop_config={"inputs": inputs},
        torch_config=ProcessGroupConfig(timeout_s=max(1, round(scaling.collective_timeout_s))),
        scaling_config=ScalingConfig(
            num_workers=workers.max_workers
            if workers.min_workers == workers.max_workers
            else (workers.min_workers, workers.max_workers),
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
    """Ray Train's timeouts, which its controller reads from the driver's environment (see CONTRIBUTING, Private APIs).

    A worker that hangs in native code is given up after the time that the others wait for it in a collective. An
    elastic worker group starts with a short timeout, because Ray may still count a node that is gone.
    """
    return {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.scaling.collective_timeout_s),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(config.scaling.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300" if workers.min_workers == workers.max_workers else "60",
    }


def _run_trainer(config: Config, workers: Workers, inputs: WorkerInput) -> None:
    """Run the trainer. Ray restarts lost workers; if its controller dies, this function starts a new trainer."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.train import TrainingFailedError

    os.environ.update(controller_timeouts(config, workers))
    for starts_left in reversed(range(config.scaling.max_failures + 1)):
        inputs = replace(inputs, point=resume_point(config.run_dir, inputs.point))
        prune(config.run_dir, config.checkpointing.max_checkpoints, inputs.point.folder)
        try:
            _off_main_thread(_trainer(config, workers, inputs).fit)
            return
        except TrainingFailedError as error:
            log.debug("training failed", exc_info=True)
            reasons = getattr(error, "worker_failures", None) or {0: error}
            lines = str(next(iter(reasons.values()))).strip().splitlines()
            words = lines[-1] if lines else type(error).__name__
            if own := own_sentence(lines):
                raise JobError(own) from error
            raise JobError(
                f"training failed: {words}; see training.log, fix the cause and run the same command again to resume "
                "from the newest checkpoint"
            ) from error
        except (ActorDiedError, ActorUnavailableError) as error:
            if not starts_left:
                raise JobError("training failed: Ray Train's controller died; see training.log") from error
            log.warning("train: Ray Train's controller died; restarting from the newest checkpoint")


def own_sentence(lines: Sequence[str]) -> str | None:
    """The JobError in a traceback that Ray and Ray Data have wrapped, such as that of a damaged shard, or None."""
    mark = f"{JobError.__module__}.{JobError.__name__}: "
    return next((line.partition(mark)[2] for line in reversed(lines) if mark in line), None)


def _off_main_thread(work: Callable[[], object]) -> None:
    """Run in a thread, where Ray Train does not handle SIGINT; the job handles it and stops cleanly."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    done.result()


def _summarise(config: Config, unit: str) -> None:
    """Plot the history and log its last and best values. A failure here must not fail the run."""
    history = config.run_dir / "metrics.jsonl"
    try:
        plot_history(history, config.run_dir / "history.png")
        log.info("train: plotted %s", config.run_dir / "history.png")
        log_lines(final_table(read_rows(history), unit))
    except Exception as error:
        log.warning("train: cannot plot the history: %s", error)


def _checked_workers(config: Config, plan: BatchPlan, concurrent_runs: int) -> Workers:
    """The run's workers. Raises ConfigError, with what would fit, if they do not fit the cluster."""
    cluster = connected_cluster()
    workers = size_workers(config, cluster, concurrent_runs, plan.global_batch_size)
    raise_findings(
        Finding("training", str(workers), ConfigError(each)) for each in shortfalls(config, workers, cluster)
    )
    plan.check_workers(workers.max_workers)
    share = plan.global_batch_size // workers.max_workers
    if share < config.training.gradient_accumulation_steps:
        raise ConfigError(
            f"training.gradient_accumulation_steps: found {config.training.gradient_accumulation_steps}; "
            f"allowed are at most {share}, the pairs per worker and step"
        )
    return workers
