"""Alerts: the loss rises far above its recent values, or a device's memory is nearly full.

LossSpikes(deviations=6).update(step=120, loss=9.1)      # None, or a sentence when a spike begins
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean

from pipeline.training.history import Metrics

MIN_LOSSES = 20  # losses needed for a deviation, and high losses in a row that make a new level. Ours
MIN_DEVIATION = 0.01  # of the mean, or nearly constant losses would alert on their last digit. Ours


class LossSpikes:
    """Finds losses more than `deviations` standard deviations above the mean of the last `window` logged ones.

    Spikes are left out of the window, because they would widen the deviation and hide the next one. Losses that stay
    high are one spike, reported once; after MIN_LOSSES of them in a row, the window restarts at the new level. If steps
    are repeated after a restart, their earlier losses are dropped.
    """

    def __init__(self, deviations: float, window: int = 100) -> None:
        self.deviations = deviations
        self.recent: deque[tuple[int, float]] = deque(maxlen=window)
        self.high: list[tuple[int, float]] = []

    def update(self, step: int, loss: float) -> str | None:
        """Add the next logged loss. Returns a sentence if a spike begins."""
        self._forget_from(step)
        mean, deviation = self._usual()
        if loss <= mean + self.deviations * deviation:
            self.recent.append((step, loss))
            self.high.clear()
            return None
        self.high.append((step, loss))
        if len(self.high) > 1:
            if len(self.high) == MIN_LOSSES:
                self.recent = deque(self.high, maxlen=self.recent.maxlen)
                self.high.clear()
            return None
        return (
            f"step {step:,}: the loss is {loss:.4g}, {(loss - mean) / deviation:.1f} standard deviations above "
            f"{mean:.4g}, the mean of the last {len(self.recent)} logged ones; if it does not come down again, lower "
            "training.learning_rate or training.max_grad_norm"
        )

    def _usual(self) -> tuple[float, float]:
        """Mean and standard deviation of the recent losses; an infinite mean if there are too few."""
        if len(self.recent) < MIN_LOSSES:
            return math.inf, 0.0
        losses = [loss for _, loss in self.recent]
        mean = fmean(losses)
        deviation = math.sqrt(fmean((loss - mean) ** 2 for loss in losses))
        return mean, max(deviation, MIN_DEVIATION * abs(mean), math.ulp(mean))

    def _forget_from(self, step: int) -> None:
        while self.recent and self.recent[-1][0] >= step:
            self.recent.pop()
        self.high = [(then, loss) for then, loss in self.high if then < step]


class FullMemory:
    """Alerts once if the peak memory of a device exceeds a fraction of its total."""

    def __init__(self, fraction: float) -> None:
        self.fraction, self.alerted = fraction, False

    def update(self, metrics: Metrics) -> str | None:
        """Check `memory_share`, if there is one. Returns a sentence the first time that it is too high."""
        share = metrics.get("memory_share", 0.0)
        if self.alerted or share <= self.fraction:
            return None
        self.alerted = True
        return (
            f"step {int(metrics['step']):,}: peak memory was {share:.0%} of the device's, more than "
            f"logging.memory_alert_fraction={self.fraction:g}; to use less, set model.gradient_checkpointing=true or "
            "raise training.gradient_accumulation_steps"
        )
