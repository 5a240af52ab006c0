"""Trackers: metrics.jsonl, TensorBoard, Weights & Biases and Ray's gauges. An error in one does not stop the others.

    with Trackers.open(config, resumed_step=0) as trackers:
        trackers.log({"step": 10, "loss": 2.3, "learning_rate": 1e-3})
        trackers.alert("gradient overflow", "step 12: the gradient is not finite; the step is skipped", step=12)

    tensorboard --logdir <root>/runs                      # all runs side by side
    wandb sync <root>/runs/<run>/wandb/offline-run-*      # sends what was kept offline, resumed parts in order
    text_embedding_loss{run="default"} 1.9                # a gauge that Prometheus collects from each node

They run in the driver; messages from workers come through `receive`. Each library is imported only if it is used.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.config import Config
from pipeline.core.console import log
from pipeline.core.files import write_atomically
from pipeline.core.mirror import Mirror
from pipeline.training.alerts import FullMemory, LossSpikes
from pipeline.training.history import History, Metrics, Tracker, grouped, metrics_kind

FETCHED = ("metrics.jsonl", "alerts.jsonl", "wandb/run_id")  # what trackers go on with, of a run's folder in a bucket
LOSS_SPIKE, FULL_MEMORY = "loss spike", "memory nearly full"


class Trackers:
    """Fans out. A tracker that raises is told of once, by name, and left out from there on."""

    def __init__(
        self, trackers: Sequence[Tracker], spikes: LossSpikes, full_memory: FullMemory, mirror: Mirror | None = None
    ) -> None:
        self.trackers, self.spikes, self.full_memory, self.mirror = list(trackers), spikes, full_memory, mirror

    @classmethod
    def open(cls, config: Config, resumed_step: int, leader: bool = True) -> Trackers:
        """metrics.jsonl and those of `logging.trackers`, of a run that goes on after `resumed_step` (a new one: 0).

        None where the process is not the `leader`: their files are written by one.
        """
        named = ["metrics.jsonl", *config.logging.trackers] if leader else []
        mirror = Mirror(config.run_dir, FETCHED) if leader else None
        found = [
            tracker
            for name in named
            if mirror and (tracker := _opened(name, config, mirror.folder, resumed_step)) is not None
        ]
        settings = config.logging
        spikes, full_memory = LossSpikes(settings.loss_spike_deviations), FullMemory(settings.memory_alert_fraction)
        return cls(found, spikes, full_memory, mirror)

    def receive(self, message: dict[str, Any]) -> None:
        """Take a worker's message: its `metrics`, and its `alert` of `title`, `text` and `step`, if it has some."""
        if "metrics" in message:
            self.log(message["metrics"])
        if "alert" in message:
            self.alert(**message["alert"])

    def log(self, metrics: Metrics) -> None:
        """Pass metrics on, and the alerts that they give rise to."""
        self._each(lambda tracker: tracker.log(metrics))
        if metrics_kind(metrics) != "training":
            return
        step = int(metrics["step"])
        found = {
            LOSS_SPIKE: self.spikes.update(step, metrics["loss"]),
            FULL_MEMORY: self.full_memory.update(metrics),
        }
        for title, text in found.items():
            if text:
                self.alert(title, text, step)

    def alert(self, title: str, text: str, step: int) -> None:
        """Warn in the log, in alerts.jsonl, and wherever a tracker can: `text` is a sentence that stands alone."""
        log.warning("train: %s: %s", title, text)
        self._each(lambda tracker: tracker.alert({"step": step, "title": title, "text": text}))

    def send(self) -> None:
        """Have what was reported in a bucket, where the run's folder is in one."""
        if self.mirror:
            self.mirror.send()

    def close(self, failed: bool = False) -> None:
        self._each(lambda tracker: tracker.close(failed))
        self.trackers.clear()
        if self.mirror:
            self.mirror.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close(failed=kind not in (None, SystemExit))  # a sweep ends trials that are not worth going on with

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker's library raises is no reason to lose a run
                self.trackers.remove(tracker)
                _warn(tracker.name, error)
                with suppress(Exception):
                    tracker.close(failed=True)


def _opened(name: str, config: Config, folder: Path, resumed_step: int) -> Tracker | None:
    try:
        return _open(name, config, folder, resumed_step)
    except Exception as error:  # see _each
        _warn(name, error)
        return None


def _open(name: str, config: Config, folder: Path, resumed_step: int) -> Tracker:
    """A tracker by its name, with its files in `folder`."""
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", resumed_step)
    if name == "wandb":
        return WeightsAndBiases(config, folder)
    if name == "ray":
        return RayMetrics(config.storage.run)
    return History(folder, resumed_step)


def _warn(name: str, error: Exception) -> None:
    words = " ".join(str(error).split()) or type(error).__name__
    log.debug("the tracker %s failed", name, exc_info=error)
    log.warning("train: %s fails and is left out from here on, training goes on: %s", name, words)


FLUSH_EVERY_S = 10  # what a kill may cost, and how far TensorBoard is behind


class TensorBoard(Tracker):
    """A curve a metric. Steps that are taken again hide what they showed before."""

    name = "tensorboard"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self.folder, self.step = folder, resumed_step
        self._open(resumed_step + 1 if resumed_step else None)

    def log(self, metrics: Metrics) -> None:
        step = int(metrics["step"])
        if step < self.step:
            self.writer.close()
            self._open(step)
        self.step = step
        for name, value in grouped(metrics).items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()

    def _open(self, purge_step: int | None) -> None:
        from tensorboardX import SummaryWriter

        # NOTE: files are read in order of their names, which are made of whole seconds and this suffix: without it a
        # run that goes on within the second would write over its own file.
        self.writer = SummaryWriter(
            str(self.folder),
            purge_step=purge_step,
            flush_secs=FLUSH_EVERY_S,
            filename_suffix=f".{time.time_ns()}",
        )


INIT_TIMEOUT_S = 30  # until a server that does not answer is given up, and the tracker with it


class WeightsAndBiases(Tracker):
    """One run over all starts of the driver."""

    name = "wandb"

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=config.storage.run,
            id=run_id(folder),
            resume="allow",
            dir=folder,
            mode=_mode(dict(os.environ)),
            config=config.dump(),
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
        )
        # NOTE: its own step may not go back, and training's does when workers restart, so that is a metric of its own.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics) -> None:
        self.run.log({"step": int(metrics["step"]), **grouped(metrics)})

    def alert(self, row: dict[str, Any]) -> None:
        self.run.alert(title=row["title"], text=row["text"], level="WARN")

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def run_id(run_dir: Path) -> str:
    """What Weights & Biases knows the run by. It lies in the run's folder, moves with it, and is gone with it."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex.encode())
    return path.read_text().strip()


def _mode(environ: dict[str, str]) -> Any:
    """Without a key it would ask for one."""
    return environ.get("WANDB_MODE", "online") if environ.get("WANDB_API_KEY") else "offline"


PREFIX = "text_embedding_"


class RayMetrics(Tracker):
    """A gauge a metric, with the run's name as its tag. Ray must have been started."""

    name = "ray"

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.gauges: dict[str, Any] = {}

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._gauge(name).set(float(value), self.tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self.gauges:
            description = f"{name} of a training run, as in its metrics.jsonl"
            self.gauges[name] = Gauge(PREFIX + re.sub(r"\W", "_", name), description, tag_keys=("run",))
        return self.gauges[name]
