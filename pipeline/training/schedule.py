"""The learning rate as a function of the step alone, so a resumed run needs no scheduler state.

    schedule = Schedule(total_steps=100, warmup_steps=10)
    schedule.scale(0), schedule.scale(9), schedule.scale(10), schedule.scale(99)      # 0.1, 1.0, 1.0, 0.0605…
    schedule.apply(optimizer, step)                                                   # before the step's update

It rises along a line over `warmup_steps`, then falls to `final_fraction` of its peak:

    linear      along a line, from the end of the warm-up to the end of the run
    cosine      along half a cosine, from the end of the warm-up to the end of the run (Loshchilov & Hutter 2017)
    wsd         not at all, then along a line over the last `decay_steps` (MiniCPM, section 4)
    constant    not at all
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer

from pipeline.config.training import Training


@dataclass(frozen=True)
class Schedule:
    """Multipliers of the peak rate. Every number but `final_fraction`, a share of the peak, is in optimizer steps."""

    total_steps: int
    warmup_steps: int
    shape: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    decay_steps: int = 1
    final_fraction: float = 0.05  # as `training.final_rate_fraction`
    table_steps: int = 0
    """Step at which parameters of groups marked `layers` join, and warm up in their turn."""

    @classmethod
    def of(cls, settings: Training, total_steps: int) -> Schedule:
        """The schedule that the config asks for, over a run of `total_steps`.

        A share above 0, of however short a run, is a step at least: the first update would else be at the full rate.
        """

        def share(fraction: float) -> int:
            return max(1, round(fraction * total_steps)) if fraction else 0

        warmup_steps = settings.warmup_steps
        return cls(
            total_steps,
            share(settings.warmup_fraction) if warmup_steps is None else warmup_steps,
            settings.schedule,
            share(settings.decay_fraction),
            settings.final_rate_fraction,
            round(settings.table_warmup_fraction * total_steps),
        )

    def scale(self, step: int, joined_at: int = 0) -> float:
        """Multiplier of the peak rate at `step` (from 0) for parameters that train from `joined_at` on; 0 before."""
        if step < joined_at:
            return 0.0
        risen = (step - joined_at + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return min(risen, self._left(step))

    def _left(self, step: int) -> float:
        """What the fall leaves of the peak rate: 1 until it begins, `final_fraction` from the run's end on."""
        if self.shape == "constant":
            return 1.0
        begin = self.warmup_steps
        if self.shape == "wsd":
            begin = max(begin, self.total_steps - self.decay_steps)
        span = max(1, self.total_steps - begin)
        fallen: float = min(max(0, step - begin), span)
        if self.shape == "cosine":
            fallen = span * (1 - math.cos(math.pi * fallen / span)) / 2
        return 1 - (1 - self.final_fraction) * fallen / span

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the rate of each of the optimizer's groups, `peak` being its own, for the update of `step`."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * self.scale(step, self.table_steps if group["layers"] else 0)
