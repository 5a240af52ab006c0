"""TensorBoard's event files in the run's folder: `tensorboard --logdir <root>/runs` shows all runs, side by side."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.training.tracking.tracker import Metrics, Tracker, grouped

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
