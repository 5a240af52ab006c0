"""A training worker of Ray Train: what Ray does for a run.

Batches come through Ray Data, checkpoints go through Ray's reporting, metrics and alerts to the driver; and the run is
told when the driver is asked to stop, or Ray learns that a node is about to be taken away.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError
from pipeline.data.feed import RayFeed
from pipeline.runtime.cluster import place_data
from pipeline.runtime.console import log, log_timeline
from pipeline.storage.path import StoragePath

if TYPE_CHECKING:
    from pipeline.training.assembly import Task
    from pipeline.training.checkpoints import TrainState
    from pipeline.training.loop import Wishes
    from pipeline.training.saving import Take

POLL_S = 1.0


@dataclass(frozen=True)
class Sent:
    """What a worker is sent: the task, torch threads for each worker, the driver's progress, the job's start."""

    task: Task
    threads: int
    progress: Any
    start_s: float


def train_worker(message: dict[str, Any]) -> None:
    """Train to the end, or until asked to stop. What no restart would mend is told to the driver, and ends the run."""
    import ray.train
    import torch

    from pipeline.training.assembly import Hooks, run_task
    from pipeline.training.loop import TrainingStopped

    sent: Sent = message["sent"]
    torch.set_num_threads(sent.threads)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def tell(message: dict[str, Any]) -> None:
        if rank == 0:
            sent.progress.post.remote(message)

    def alert(title: str, text: str, step: int) -> None:
        tell({"alert": {"title": title, "text": text, "step": step}})

    _send_log(tell, sent.task.config.logging.level)
    log_timeline("the workers are placed and have imported torch", sent.start_s)
    hooks = Hooks(
        partial(_report_checkpoint, sent.task.config.run_dir), _reporter(sent.progress), alert, _wishes(sent, rank)
    )
    place_data(sent.task.config.scaling.labels.data)
    feed = RayFeed(sent.task.plan, rank, world_size)
    try:
        run_task(sent.task, feed.batches, hooks, ray.train.torch.get_device())
        ray.train.report({})  # waits until all checkpoints are in their places
    except (TrainingStopped, ConfigError) as error:  # on all workers alike
        tell({"fatal": str(error), "config": isinstance(error, ConfigError)})


def _send_log(tell: Callable[[dict[str, Any]], None], level: str) -> None:
    """Send this process's log lines to the driver."""

    class ToDriver(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell({"log": record.getMessage(), "level": record.levelno})

    log.handlers[:] = [ToDriver()]
    log.setLevel(level)
    log.propagate = False


def _report_checkpoint(run_dir: StoragePath, state: TrainState, folder: Path, take: Take | None) -> None:
    """Every rank reports, which is a barrier. Ray takes the folders away in threads, while training goes on."""
    from ray.train import Checkpoint, CheckpointUploadMode, report

    report(
        state.metrics,
        checkpoint=Checkpoint.from_directory(str(folder)) if take else None,
        checkpoint_dir_name=folder.name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=partial(_upload, run_dir, take) if take else None,
    )


def _upload(run_dir: StoragePath, take: Take, checkpoint: Any, name: str) -> Any:
    from ray.train import Checkpoint, get_context

    storage: Any = get_context().get_storage()
    attempt = Path(storage.experiment_fs_path)
    take(Path(checkpoint.path), run_dir / attempt.name / name)
    return Checkpoint(str(attempt / name), storage.storage_filesystem)


def _reporter(progress: Any) -> Callable[[dict[str, float]], None]:
    """Rank 0's metrics, sent to the driver: it draws the bar and keeps the trackers."""

    def report(metrics: dict[str, float]) -> None:
        message: dict[str, Any] = {"metrics": metrics}
        if "loss" in metrics:
            progress.put.remote("steps", int(metrics["step"]))
            message["shown"] = f"loss {metrics['loss']:.3f}, {metrics['pairs_per_s']:,.0f} pairs/s"
        else:
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "step")
            message["log"] = f"train: step {metrics['step']:,.0f}: {values}"
        progress.post.remote(message)

    return report


def _wishes(sent: Sent, rank: int) -> Callable[[int], Wishes]:
    """Rank 0 looks at the driver's progress once a second. Ray is asked every few steps, by all workers at the same."""
    import ray
    import ray.train

    from pipeline.training.loop import Wishes

    stop, saved_for = threading.Event(), set[str]()
    events = iter(("the first batch is there", "the first step is done"))

    def follow() -> None:
        try:
            while not stop.wait(POLL_S):
                if ray.get(sent.progress.is_stop_wanted.remote()):
                    stop.set()
        except ray.exceptions.RayError:  # the session is going down
            return

    if rank == 0:
        threading.Thread(target=follow, name="wishes", daemon=True).start()

    def wishes(step: int) -> Wishes:
        if event := next(events, None):
            log_timeline(event, sent.start_s)
        leaving: set[str] = set()
        if step % sent.task.config.training.log_every_steps == 0:
            notice = ray.train.get_preemption_info()
            leaving = set(notice.preempted_node_ids) - saved_for if notice else set()
            saved_for.update(leaving)
        return Wishes(stop.is_set(), bool(leaving))

    return wishes
