"""AdamW and its schedule. The rate is a function of the step alone, so a resumed run needs no scheduler state.

>>> schedule = Schedule(total_steps=100, warmup_fraction=0.1, table_steps=0)
>>> schedule.scale(0), schedule.scale(9), schedule.scale(99)
(0.1, 1.0, 0.06...)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.model.transformer import Encoder
from pipeline.objectives.learner import Learner

FLOOR = 0.05  # share of the peak rate that the schedule ends on


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then linear decay to FLOOR at `total_steps`. Layers warm up when they join, at `table_steps`."""

    total_steps: int
    warmup_fraction: float
    table_steps: int

    def scale(self, step: int, joined_at: int = 0) -> float:
        """Multiplier of the peak rate at `step` (from 0) for parameters that train from `joined_at` on."""
        warmup = max(1, round(self.warmup_fraction * self.total_steps))
        decay = 1 - (1 - FLOOR) * max(0, step - warmup) / max(1, self.total_steps - warmup)
        return max(0.0, min((step - joined_at + 1) / warmup, decay))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * self.scale(step, self.table_steps if group["layers"] else 0)


def build_optimizer(
    learner: Learner, *, learning_rate: float, table_learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone; the encoder's token table, norms and biases take none.

    Betas are (0.9, 0.98), as RoBERTa trains (section 3.1): a rare token's second moment should not be forgotten slower
    than it occurs.
    """
    backbone = learner.model.backbone
    table, joining = learner.model.token_table.weight, set()
    if isinstance(backbone, Encoder):
        joining = set(backbone.layers.parameters())
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in filter(lambda p: p.requires_grad, learner.parameters()):
        peak = table_learning_rate if parameter is table else learning_rate
        decay = weight_decay if parameter.ndim > 1 and parameter is not table else 0.0
        groups.setdefault((peak, decay, parameter in joining), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": peak, "peak": peak, "weight_decay": decay, "layers": layers}
            for (peak, decay, layers), members in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
