"""Which type matrix products run in, and the scaled loss that fp16 needs.

precision = Precision("fp16", device)
backward(..., autocast=precision.autocast, loss_scale=precision.loss_scale)
precision.unscale(optimizer)                  # gradients are what they would be without a scale
precision.step(optimizer) if finite else precision.skip()
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler


class Precision:
    """`wanted` is `training.precision`. Without fp16 nothing is scaled, and steps are the optimizer's own."""

    def __init__(self, wanted: str, device: torch.device) -> None:
        self.autocast = autocast_type(wanted, device)
        self.device = device
        self.scaler = GradScaler(device.type, enabled=self.autocast == torch.float16)

    @property
    def loss_scale(self) -> Tensor | float:
        return self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0

    @property
    def may_be_too_large(self) -> bool:
        """Whether a gradient that is not finite may be the scale's fault, not the model's."""
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
        """A gradient was not finite. All workers say so, also those whose own part of it was: scales stay alike."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())


def autocast_type(wanted: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in, or None for float32 throughout."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if wanted == "auto":
        return torch.bfloat16 if capable else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
