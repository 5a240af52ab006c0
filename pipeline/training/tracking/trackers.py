"""All trackers of a run behind one: what training reports goes to each, and what fails in one fails nothing else.

    with Trackers.open(config, resumed_step=0) as trackers:
        trackers.log({"step": 10, "loss": 2.3, "learning_rate": 1e-3})
        trackers.alert("gradient overflow", "step 12: the gradient is not finite; the step is skipped", step=12)

On the driver; workers' messages come through `receive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.config import Config
from pipeline.runtime.console import log
from pipeline.storage.mirror import Mirror
from pipeline.training.tracking.alerts import FullMemory, LossSpikes
from pipeline.training.tracking.jsonl import History, metrics_kind
from pipeline.training.tracking.tracker import Metrics, Tracker

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
    """A tracker by its name, its files in `folder`; each module imports its own library, the others need none."""
    if name == "tensorboard":
        from pipeline.training.tracking.tensorboard import TensorBoard

        return TensorBoard(folder / "tensorboard", resumed_step)
    if name == "wandb":
        from pipeline.training.tracking.wandb import WeightsAndBiases

        return WeightsAndBiases(config, folder)
    if name == "ray":
        from pipeline.training.tracking.ray_metrics import RayMetrics

        return RayMetrics(config.storage.run)
    return History(folder, resumed_step)


def _warn(name: str, error: Exception) -> None:
    words = " ".join(str(error).split()) or type(error).__name__
    log.debug("the tracker %s failed", name, exc_info=error)
    log.warning("train: %s fails and is left out from here on, training goes on: %s", name, words)
