"""AdamW over a learner's parameters, its learning rates as a function of the step, and mixed precision.

    optimizer = build_optimizer(learner, config.training)
    schedule = Schedule(total_steps=100, warmup_steps=10)
    schedule.scale(0), schedule.scale(9), schedule.scale(10), schedule.scale(99)      # 0.1, 1.0, 1.0, 0.0605…
    schedule.apply(optimizer, step)               # sets each group's rate from its `peak`, before the step's update

    precision = Precision("fp16", device)
    backward(..., autocast=precision.autocast, loss_scale=precision.loss_scale)
    precision.unscale(optimizer)                  # gradients are what they would be without a scale
    precision.step(optimizer) if finite else precision.skip()

The learning rate rises linearly over `warmup_steps`, then falls to `final_fraction` of its peak:

    linear      linearly, from the end of the warm-up to the end of the run
    cosine      along half a cosine, from the end of the warm-up to the end of the run (Loshchilov & Hutter 2017)
    wsd         not at all, then linearly over the last `decay_steps` (MiniCPM, section 4)
    constant    not at all

A resumed run needs no state of the schedule. Cost of AdamW: two float32 moments a parameter, 8 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pipeline.config.training import Training
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder


def build_optimizer(learner: Learner, settings: Training) -> torch.optim.AdamW:
    """AdamW with decoupled decay on weight matrices alone: none on norms, biases and tables of embeddings.

    A table's rows would decay at every step, even if their token does not occur. Each group has `peak`, its highest
    rate, and `layers`: whether it starts to train after the token table's warm-up.
    """
    backbone, joining = learner.model.backbone, set[nn.Parameter]()
    if isinstance(backbone, Encoder):
        joining = set(backbone.layers.parameters())
    token_table, tables = learner.model.token_table.weight, _tables(learner)
    groups: dict[tuple[float, float, bool, type], list[nn.Parameter]] = {}
    # fsdp's parameters are DTensors, scalars excepted: an optimizer updates a group of one type at once, and torch's
    # GradScaler takes the first gradient of all for a DTensor.
    trained = sorted((p for p in learner.parameters() if p.requires_grad), key=lambda p: type(p) is nn.Parameter)
    for parameter in trained:
        peak = settings.learning_rate
        if parameter is token_table:
            peak = settings.table_learning_rate or peak
        decay = settings.weight_decay if parameter.ndim > 1 and parameter not in tables else 0.0
        groups.setdefault((peak, decay, parameter in joining, type(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": peak, "peak": peak, "weight_decay": decay, "layers": layers}
            for (peak, decay, layers, _), members in groups.items()
        ],
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.adam_eps,
        fused=True,
    )


def _tables(learner: Learner) -> set[torch.Tensor]:
    """Weights of embeddings: tokens, learned positions, segments of a pretrained model."""
    return {module.weight for module in learner.modules() if isinstance(module, nn.Embedding)}


@dataclass(frozen=True)
class Schedule:
    """Multipliers of the peak rate. Numbers are optimizer steps, except `final_fraction`, a share of the peak."""

    total_steps: int
    warmup_steps: int
    shape: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    decay_steps: int = 1
    final_fraction: float = 0.05  # as `training.final_rate_fraction`
    table_steps: int = 0
    """Step at which groups marked `layers` start to train, with a warm-up of their own."""

    @classmethod
    def of(cls, settings: Training, total_steps: int) -> Schedule:
        """The schedule that the config asks for, over a run of `total_steps`.

        A fraction above 0 is at least one step, or a short run would start at the full rate.
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
        """Multiplier of the peak rate at `step` (from 0) for parameters that train from step `joined_at` on."""
        if step < joined_at:
            return 0.0
        risen = (step - joined_at + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return min(risen, self._left(step))

    def _left(self, step: int) -> float:
        """The decay's multiplier: 1 until it begins, `final_fraction` from the run's end on."""
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


class Precision:
    """`wanted` is `training.precision`. Without fp16 nothing is scaled."""

    def __init__(self, wanted: str, device: torch.device) -> None:
        self.autocast = autocast_type(wanted, device)
        self.device = device
        self.scaler = GradScaler(device.type, enabled=self.autocast == torch.float16)

    @property
    def loss_scale(self) -> Tensor | float:
        return self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0

    @property
    def may_be_too_large(self) -> bool:
        """Whether the scale, not the model, may have caused a gradient that is not finite."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state(self) -> dict[str, float]:
        return self.scaler.state_dict()

    def load(self, state: dict[str, float]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()

    def skip(self) -> None:
        """Lower the scale after a gradient that was not finite. All workers call this, so their scales stay equal."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())


def autocast_type(wanted: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in, or None for float32 throughout."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if wanted == "auto":
        return torch.bfloat16 if capable else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
