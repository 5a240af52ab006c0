"""What workers exchange. Without torch.distributed, or with one worker, each of these gives back what it got."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum over workers, without a gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(rows: Tensor) -> Tensor:
    """(b, ...) on each of W workers → (W * b, ...), differentiable. Each worker must bring equally many rows."""
    if world_size() == 1 or rows.numel() == 0:
        return rows
    return _Gather.apply(rows)  # type: ignore[no-any-return, no-untyped-call]


class _Gather(torch.autograd.Function):
    """All workers' rows, in rank order; backward sums over workers the gradients of this worker's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return total(grads[0]).chunk(world_size())[rank()]
