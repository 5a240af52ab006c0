"""A training worker of Ray Train.

Ray places and restarts the workers. A worker reads batches from Ray Data, reports checkpoints to Ray, and sends
metrics and alerts to the driver. It checks whether the driver wants to stop and whether Ray is about to lose a node.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device

from pipeline.config import ConfigError
from pipeline.core.arrow import arrow_location
from pipeline.core.cluster import restrict_data_to
from pipeline.core.console import log, log_timeline
from pipeline.data.feed import RayFeed
from pipeline.training.assembly import RunSpec, train_or_resume
from pipeline.training.checkpoints import ResumePoint, TrainState
from pipeline.training.history import Metrics
from pipeline.training.loop import ControlFlags, Hooks, TrainingStopped
from pipeline.training.saving import Saver

POLL_S = 1.0


@dataclass(frozen=True)
class WorkerInput:
    """The input of a worker, the same for all of them."""

    spec: RunSpec
    threads: int
    """torch threads of each worker."""
    progress: Any
    """The handle of the driver's Progress actor."""
    point: ResumePoint
    """The newest checkpoint, already verified by the driver."""
    start_s: float
    """Start of the job, in seconds since the epoch."""


def train_worker(message: dict[str, Any]) -> None:
    """Train to the end, or until asked to stop. Errors that a restart would not fix are sent to the driver."""
    inputs: WorkerInput = message["inputs"]
    config, context = inputs.spec.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(inputs.threads)

    def send(message: dict[str, Any]) -> None:
        if rank == 0:
            inputs.progress.post.remote(message)

    def alert(title: str, text: str, step: int) -> None:
        send({"alert": {"title": title, "text": text, "step": step}})

    _send_log(send, config.logging.level)
    log_timeline("the workers are placed and have imported torch", inputs.start_s)
    restrict_data_to(config.scaling.labels.data)
    feed = RayFeed(inputs.spec.plan, rank, world_size)
    try:
        saver = RaySaver(config, inputs.spec.tokenizer_json, inputs.spec.holder)
        hooks = Hooks(
            saver.save,
            partial(_report, inputs.progress, inputs.spec.manifest.unit),
            alert,
            _control_flags(inputs, rank),
        )
        train_or_resume(inputs.spec, feed.batches, hooks, get_device(), inputs.point)
        ray.train.report({})  # waits until all checkpoints are uploaded
    except (TrainingStopped, ConfigError) as error:  # raised on all workers
        send({"fatal": str(error), "config": isinstance(error, ConfigError)})


class RaySaver(Saver):
    """Reports checkpoints to Ray, which is a barrier for all ranks. Ray calls `_upload` in a background thread."""

    def commit(self, folder: Path, state: TrainState, is_best: bool) -> None:
        ray.train.report(
            state.metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if self.writes else None,
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=partial(self._upload, is_best) if self.writes else None,
        )

    def _upload(self, is_best: bool, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        attempt, run_dir = ray.train.get_context().get_experiment_name(), self.config.run_dir
        self.committer.commit(Path(checkpoint.path), run_dir / attempt / name, is_best)
        location, filesystem = arrow_location(run_dir)
        return ray.train.Checkpoint(f"{location}/{attempt}/{name}", filesystem)


def _send_log(send: Callable[[dict[str, Any]], None], level: str) -> None:
    """Send this process's log lines to the driver."""

    class ToDriver(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send({"log": record.getMessage(), "level": record.levelno})

    log.handlers[:] = [ToDriver()]
    log.setLevel(level)
    log.propagate = False


def _report(progress: Any, unit: str, metrics: Metrics) -> None:
    """Send rank 0's metrics to the driver, which shows the progress bar and runs the trackers."""
    message: dict[str, Any] = {"metrics": metrics}
    if "loss" in metrics:
        progress.put.remote("steps", int(metrics["step"]))
        message["shown"] = f"loss {metrics['loss']:.3f}, {metrics['pairs_per_s']:,.0f} {unit}/s"
    else:
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "step")
        message["log"] = f"train: step {metrics['step']:,.0f}: {values}"
    progress.post.remote(message)


def _control_flags(inputs: WorkerInput, rank: int) -> Callable[[int], ControlFlags]:
    """Rank 0 polls the driver's progress actor once a second; all workers poll Ray every `log_every_steps`."""
    progress, config, start_s = inputs.progress, inputs.spec.config, inputs.start_s
    stop, saved_for = threading.Event(), set[str]()
    events = iter(("the first batch is ready", "the first step is done"))

    def poll() -> None:
        with suppress(ray.exceptions.RayError):  # the session is ending
            while not stop.wait(POLL_S):
                if ray.get(progress.is_stop_wanted.remote()):
                    stop.set()

    if rank == 0:
        threading.Thread(target=poll, name="control flags", daemon=True).start()

    def control_flags(step: int) -> ControlFlags:
        if event := next(events, None):
            log_timeline(event, start_s)
        leaving: set[str] = set()
        if step % config.training.log_every_steps == 0:
            notice = ray.train.get_preemption_info()
            leaving = set(notice.preempted_node_ids) - saved_for if notice else set()
            saved_for.update(leaving)
        return ControlFlags(stop.is_set(), bool(leaving))

    return control_flags
