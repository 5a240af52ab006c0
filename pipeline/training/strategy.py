"""How workers share the work of a step: what a strategy does, and ddp, in which each holds the whole model.

strategy = DataParallel(compression=None)
strategy.take(learner)
strategy.start()                             # gradients are zero
with strategy.sending(): loss.backward()     # the last backward pass of the step
flags = strategy.finish([False, True])       # gradients are the workers' means
norm = strategy.clip(max_norm=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.model.learner import Learner
from pipeline.objectives.collectives import world_size
from pipeline.training.reducer import Reducer


class Strategy(Protocol):
    """Between a learner's backward passes and its optimizer."""

    lockstep: bool
    """Whether workers meet within each forward and backward pass, so that all must make equally many."""

    def start(self) -> None:
        """Begin a step: all gradients are zero."""

    def sending(self) -> AbstractContextManager[None]:
        """Within it runs the step's last backward pass."""

    def finish(self, flags: Sequence[bool | Tensor]) -> list[float]:
        """Gradients are the means over workers when it returns. Returns the sums of `flags` over workers."""

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm`. Returns the norm that they had, the same on all workers."""

    def take(self, learner: Learner) -> None:
        """Look after the gradients of the parameters that want one, from the next step on."""


class DataParallel:
    """Each worker holds a copy of the model; gradients are averaged, in `compression` where one is given."""

    lockstep = False

    def __init__(self, compression: torch.dtype | None = None) -> None:
        self.compression = compression
        self.reducer = Reducer(())

    def take(self, learner: Learner) -> None:
        self.reducer.remove()
        self.parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        self.reducer = Reducer(self.parameters, self.compression)

    def start(self) -> None:
        self.reducer.start()

    def sending(self) -> AbstractContextManager[None]:
        return self.reducer.sending()

    def finish(self, flags: Sequence[bool | Tensor]) -> list[float]:
        return self.reducer.finish([torch.as_tensor(flag, dtype=torch.float32) for flag in flags]).tolist()  # type: ignore[no-any-return]

    def clip(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)


def build_strategy(config: Config, learner: Learner, device: torch.device) -> Strategy:
    """What the config asks for. fsdp cuts the learner's parameters, so build the optimizer after it.

    A process without others keeps them whole.
    """
    settings = config.training
    if settings.strategy == "fsdp" and dist.is_initialized():
        from pipeline.training.fsdp import FullySharded

        return FullySharded(learner, device)
    compression = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.gradient_compression]
    if compression == torch.bfloat16 and world_size() > 1 and dist.get_backend() == "gloo":
        raise ConfigError(
            "training.gradient_compression: found 'bf16', and workers without GPUs, whose gloo cannot add bfloat16; "
            "allowed are 'none' and 'fp16'"
        )
    return DataParallel(compression)
