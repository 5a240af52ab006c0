"""AdamW, learning rate schedules and mixed precision.

    optimizer = build_optimizer(learner, config.training)
    schedule = Schedule(total_steps=100, warmup_steps=10)
    schedule.scale(0), schedule.scale(9), schedule.scale(10), schedule.scale(99)      # 0.1, 1.0, 1.0, 0.0605…
    schedule.apply(optimizer, step)               # before the update: each group's rate = its `peak` x scale(step)

    precision = Precision("fp16", device)
    backward(..., autocast=precision.autocast, loss_scale=precision.loss_scale)
    precision.unscale(optimizer)                  # divides the gradients by the loss scale
    precision.step(optimizer) if finite else precision.skip()

The learning rate rises linearly over `warmup_steps`, then falls to `final_fraction` of its peak:

    linear      linearly from the end of the warm-up to the end of the run
    cosine      along half a cosine, from the end of the warm-up to the end of the run (Loshchilov & Hutter 2017)
    wsd         stays constant, then falls linearly over the last `decay_steps` (MiniCPM, section 4)
    constant    stays constant

The schedule has no state to resume. Cost of AdamW: two float32 moments per parameter, 8 bytes.
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
    """AdamW with decoupled weight decay on weight matrices only: not on norms, biases and embedding tables.

    Rows of a table would decay at every step, even if their token does not occur. Each group has `peak`, its highest
    rate, and `layers`: whether it starts to train after the token table's warm-up. The order of the parameters does not
    depend on the settings, so a checkpoint's optimizer can be loaded under another rate or decay.
    """
    backbone, layer_parameters = learner.model.backbone, set[nn.Parameter]()
    if isinstance(backbone, Encoder):
        layer_parameters = set(backbone.layers.parameters())
    token_table, tables = learner.model.token_table.weight, _tables(learner)
    groups: dict[tuple[bool, bool, bool, type], list[nn.Parameter]] = {}
    # fsdp's parameters are DTensors, except scalars. A fused optimizer needs groups of one type, and torch's GradScaler
    # expects DTensors if the first gradient is one.
    trained = sorted((p for p in learner.parameters() if p.requires_grad), key=lambda p: type(p) is nn.Parameter)
    for parameter in trained:
        decays, in_layers = parameter.ndim > 1 and parameter not in tables, parameter in layer_parameters
        groups.setdefault((parameter is token_table, decays, in_layers, type(parameter)), []).append(parameter)
    peak = settings.learning_rate
    table_peak = settings.table_learning_rate or peak
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "peak": table_peak if is_table else peak,
                "weight_decay": settings.weight_decay if decays else 0.0,
                "layers": in_layers,
            }
            for (is_table, decays, in_layers, _), members in groups.items()
        ],
        lr=peak,  # `Schedule.apply` sets it for each group, before every update
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.adam_eps,
        fused=True,
    )


def _tables(learner: Learner) -> set[torch.Tensor]:
    """Embedding tables: of tokens, learned positions, and segments of a pretrained model."""
    return {module.weight for module in learner.modules() if isinstance(module, nn.Embedding)}


@dataclass(frozen=True)
class Schedule:
    """Multipliers of the peak learning rate, by optimizer step. `final_fraction` is a share of the peak."""

    total_steps: int
    warmup_steps: int
    shape: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    decay_steps: int = 1
    final_fraction: float = 0.05  # as `training.final_rate_fraction`
    table_steps: int = 0
    """Step at which groups marked `layers` start to train, with their own warm-up."""

    @classmethod
    def of(cls, settings: Training, total_steps: int) -> Schedule:
        """The schedule of the config. A fraction above 0 is at least one step, so short runs warm up too."""

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
        """Multiplier of the peak rate at `step` (from 0) for parameters that start to train at step `joined_at`."""
        if step < joined_at:
            return 0.0
        risen = (step - joined_at + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return min(risen, self._left(step))

    def _left(self, step: int) -> float:
        """The decay's multiplier: 1 until the decay begins, `final_fraction` from the end of the run on."""
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
        """Set each group's learning rate for the update of `step`, scaled from its `peak`."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * self.scale(step, self.table_steps if group["layers"] else 0)


class Precision:
    """Mixed precision by `training.precision`; with fp16, the loss is scaled."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self.autocast = autocast_type(precision, device)
        self.device = device
        self.scaler = GradScaler(device.type, enabled=self.autocast == torch.float16)

    @property
    def loss_scale(self) -> Tensor | float:
        return self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0

    @property
    def may_be_too_large(self) -> bool:
        """Whether the loss scale, not the model, may have caused a NaN or infinite gradient."""
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
        """Lower the loss scale after a NaN or infinite gradient. Call it on all workers to keep their scales equal."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of a `training.precision`; None for float32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A warning if `training.precision` needs instructions that the processor lacks, and torch emulates them."""
    if device.type != "cpu" or precision not in ("bf16", "fp16"):
        return None
    if any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith(precision)):
        return None
    return (
        f"training.precision: this processor has no {precision} instructions, so {precision} trains many times slower "
        "than fp32; use training.precision=fp32"
    )
