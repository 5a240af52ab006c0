"""Trackers: metrics.jsonl, TensorBoard, Weights & Biases, MLflow and Ray's gauges. One that fails does not stop the
others.

    with Trackers.open(config, resumed_step=0) as trackers:
        trackers.log({"step": 10, "loss": 2.3, "learning_rate": 1e-3})
        trackers.alert("gradient overflow", "step 12: the gradient is not finite; the step is skipped", step=12)

    tensorboard --logdir <root>/runs                      # all runs side by side
    wandb sync <root>/runs/<run>/wandb/offline-run-*      # uploads offline runs, resumed parts in order
    text_embedding_loss{run="default"} 1.9                # a gauge that Prometheus scrapes from each node

Trackers run in the driver; `receive` takes messages from workers. A tracker's library is imported only if it is used.
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
from pipeline.training.mlflow_tracker import RUN_ID, MLflow

FETCHED = ("metrics.jsonl", "alerts.jsonl", "wandb/run_id", RUN_ID)  # files that a resumed run downloads from a bucket
LOSS_SPIKE, FULL_MEMORY = "loss spike", "memory nearly full"


class Trackers:
    """Passes metrics and alerts to all trackers. A tracker that raises is removed, with a warning."""

    def __init__(
        self, trackers: Sequence[Tracker], spikes: LossSpikes, full_memory: FullMemory, mirror: Mirror | None = None
    ) -> None:
        self.trackers, self.spikes, self.full_memory, self.mirror = list(trackers), spikes, full_memory, mirror

    @classmethod
    def open(cls, config: Config, resumed_step: int, leader: bool = True) -> Trackers:
        """Open metrics.jsonl and the `logging.trackers` of a run that resumes at `resumed_step` (0 for a new run).

        Only the `leader` writes; other processes get no trackers.
        """
        mirror = Mirror(config.run_dir, FETCHED) if leader else None
        opened = [
            tracker
            for name in ("metrics.jsonl", *config.logging.trackers)
            if mirror and (tracker := _try_open(name, config, mirror.folder, resumed_step)) is not None
        ]
        settings = config.logging
        spikes, full_memory = LossSpikes(settings.loss_spike_deviations), FullMemory(settings.memory_alert_fraction)
        return cls(opened, spikes, full_memory, mirror)

    def receive(self, message: dict[str, Any]) -> None:
        """Handle a worker's message, which may have `metrics`, or an `alert` with `title`, `text` and `step`."""
        if "metrics" in message:
            self.log(message["metrics"])
        if "alert" in message:
            self.alert(**message["alert"])

    def log(self, metrics: Metrics) -> None:
        """Log metrics, and alert if they are unusual."""
        self._each(lambda tracker: tracker.log(metrics))
        if metrics_kind(metrics) != "training":
            return
        step = int(metrics["step"])
        for title, text in (
            (LOSS_SPIKE, self.spikes.update(step, metrics["loss"])),
            (FULL_MEMORY, self.full_memory.update(metrics)),
        ):
            if text:
                self.alert(title, text, step)

    def alert(self, title: str, text: str, step: int) -> None:
        """Warn in the log, in alerts.jsonl, and in trackers that support alerts. `text` is a full sentence."""
        log.warning("train: %s: %s", title, text)
        self._each(lambda tracker: tracker.alert({"step": step, "title": title, "text": text}))

    def send(self) -> None:
        """Upload what was reported so far, if the run's folder is in a bucket."""
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
        self.close(failed=kind not in (None, SystemExit))  # Ray Tune raises SystemExit to stop a trial early

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # no error of a tracker's library should end a run
                self.trackers.remove(tracker)
                _warn(tracker.name, error)
                with suppress(Exception):
                    tracker.close(failed=True)


def _try_open(name: str, config: Config, folder: Path, resumed_step: int) -> Tracker | None:
    try:
        return _open(name, config, folder, resumed_step)
    except Exception as error:  # see _each
        _warn(name, error)
        return None


def _open(name: str, config: Config, folder: Path, resumed_step: int) -> Tracker:
    """Open a tracker by name, with its files in `folder`."""
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", resumed_step)
    if name == "wandb":
        return WeightsAndBiases(config, folder)
    if name == "mlflow":
        return MLflow(config, folder)
    if name == "ray":
        return RayMetrics(config.storage.run)
    return History(folder, resumed_step)


def _warn(name: str, error: Exception) -> None:
    words = " ".join(str(error).split()) or type(error).__name__
    log.debug("the tracker %s failed", name, exc_info=error)
    log.warning("train: the tracker %s failed and is disabled, training continues: %s", name, words)


FLUSH_EVERY_S = 10  # a kill may lose this much, and TensorBoard lags by it


class TensorBoard(Tracker):
    """One curve per metric. Repeated steps hide their earlier values."""

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

        # NOTE: file names have whole seconds and this suffix, and are read in their order. Without the suffix, a run
        # that resumes within a second would overwrite its file.
        self.writer = SummaryWriter(
            str(self.folder),
            purge_step=purge_step,
            flush_secs=FLUSH_EVERY_S,
            filename_suffix=f".{time.time_ns()}",
        )


INIT_TIMEOUT_S = 30  # the tracker is removed if the server does not answer by then


class WeightsAndBiases(Tracker):
    """One Weights & Biases run, resumed by each start of the driver."""

    name = "wandb"

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.logging.project,
            name=config.storage.run,
            id=run_id(folder),
            resume="allow",
            dir=folder,
            mode=_mode(dict(os.environ)),
            config=config.dump(),
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
        )
        # NOTE: wandb's step cannot go back, but ours does when workers restart, so we log it as a metric.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics) -> None:
        self.run.log({"step": int(metrics["step"]), **grouped(metrics)})

    def alert(self, row: dict[str, Any]) -> None:
        self.run.alert(title=row["title"], text=row["text"], level="WARN")

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def run_id(run_dir: Path) -> str:
    """The id of the Weights & Biases run, stored in the run's folder; created on first use."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex.encode())
    return path.read_text().strip()


def _mode(environ: dict[str, str]) -> Any:
    """Offline without an API key: wandb would ask for one."""
    return environ.get("WANDB_MODE", "online") if environ.get("WANDB_API_KEY") else "offline"


PREFIX = "text_embedding_"


class RayMetrics(Tracker):
    """One gauge per metric, tagged with the run's name. Needs a Ray session."""

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
