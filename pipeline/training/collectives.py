"""What workers exchange through torch.distributed. With one worker, or without it, each function returns its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over workers, without a gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(values: Tensor) -> Tensor:
    """(W, ...): every worker's values, in rank order, without a gradient."""
    if world_size() == 1:
        return values.detach()[None]
    return torch.stack(_all_gather(values.detach()))


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """(b, ...) on each of W workers → (B, ...), differentiable.

    `counts` are the rows of each worker, in rank order; without them all workers have equally many.
    """
    if world_size() == 1 or 0 in rows.shape[1:]:
        return rows
    return _GatherRows.apply(rows, counts or [len(rows)] * world_size())  # type: ignore[no-any-return, no-untyped-call]


def broadcast(value: T) -> T:
    """Rank 0's value, which is pickled, on all workers."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


class _GatherRows(torch.autograd.Function):
    """All workers' rows, in rank order; backward sums over workers the gradients of this worker's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.counts = list(counts)
        missing = max(counts) - len(rows)
        even = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
        return torch.cat([each[:count] for each, count in zip(_all_gather(even), counts, strict=True)])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return all_reduce_sum(grads[0]).split(ctx.counts)[rank()], None


def _all_gather(values: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, values.contiguous())
    return gathered
