"""When somebody should look: a loss far above its last ones, a device's memory nearly full."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean

from pipeline.training.history import Metrics

LEAST = 20  # losses until a deviation means something, and in a row until a height is no spike: ours
LEAST_DEVIATION = 0.01  # of the mean: ours; losses that barely differ would make a spike of the last digit


class LossSpikes:
    """Finds losses more than so many standard deviations above the mean of the last `window` logged ones.

    A spike is not among those: it would widen the deviation and hide the next one. Losses that stay high are one spike,
    told of once; after LEAST of them in a row the run has a new level, from which the window begins anew, so that a
    change such as layers that join in is not called a spike for ever. Steps may come again: what was known of them is
    forgotten.
    """

    def __init__(self, deviations: float, window: int = 100) -> None:
        self.deviations = deviations
        self.recent: deque[tuple[int, float]] = deque(maxlen=window)
        self.high: list[tuple[int, float]] = []

    def update(self, step: int, loss: float) -> str | None:
        """Take the next logged loss into account. Returns a sentence where a spike begins."""
        self._forget_from(step)
        mean, deviation = self._usual()
        if loss <= mean + self.deviations * deviation:
            self.recent.append((step, loss))
            self.high.clear()
            return None
        self.high.append((step, loss))
        if len(self.high) > 1:
            if len(self.high) == LEAST:
                self.recent = deque(self.high, maxlen=self.recent.maxlen)
                self.high.clear()
            return None
        return (
            f"step {step:,}: the loss is {loss:.4g}, {(loss - mean) / deviation:.1f} standard deviations above "
            f"{mean:.4g}, the mean of the last {len(self.recent)} logged ones; if it does not come down again, a lower "
            "training.learning_rate or training.max_grad_norm may help"
        )

    def _usual(self) -> tuple[float, float]:
        """Mean and standard deviation of the recent losses; without enough of them no loss is too high."""
        if len(self.recent) < LEAST:
            return math.inf, 0.0
        losses = [loss for _, loss in self.recent]
        mean = fmean(losses)
        deviation = math.sqrt(fmean((loss - mean) ** 2 for loss in losses))
        return mean, max(deviation, LEAST_DEVIATION * abs(mean), math.ulp(mean))

    def _forget_from(self, step: int) -> None:
        while self.recent and self.recent[-1][0] >= step:
            self.recent.pop()
        self.high = [(then, loss) for then, loss in self.high if then < step]


class FullMemory:
    """Tells once when a device's memory, at its peak, is fuller than a fraction."""

    def __init__(self, fraction: float) -> None:
        self.fraction, self.told = fraction, False

    def update(self, metrics: Metrics) -> str | None:
        """Look at `memory_share`, where there is one. Returns a sentence the first time that it is too high."""
        share = metrics.get("memory_share", 0.0)
        if self.told or share <= self.fraction:
            return None
        self.told = True
        return (
            f"step {int(metrics['step']):,}: {share:.0%} of the device's memory was taken at the peak, more than "
            f"logging.memory_alert_fraction={self.fraction:g}; model.gradient_checkpointing=true or a higher "
            "training.gradient_accumulation_steps take less"
        )
