"""InfoNCE over the global batch: every anchor is classified among the positives of all workers.

Worker r holds rows [r * B/W, (r + 1) * B/W) of the global batch. It gathers all rows, scores its own anchors against
all positives (and, if symmetric, its own positives against all anchors), and averages over its own rows. The mean of
that over workers is the single-process loss, and `gather`'s backward pass carries each worker's share of the gradient
back to the rows' owner, so averaging parameter gradients over workers gives the single-process gradient.

    loss, metrics = contrastive_loss(anchors, positives, temperature=0.05, symmetric=True)   # (B/W, D) each
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All workers' rows, in rank order; backward sums over workers the gradients of this worker's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """(B/W, D) on each of W workers → (B, D), differentiable. Each worker must bring equally many rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)  # type: ignore[no-any-return, no-untyped-call]


def contrastive_loss(
    anchors: Tensor, positives: Tensor, *, temperature: float, symmetric: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """This worker's mean loss, and `accuracy`: the share of its anchors whose own positive scores highest.

    `anchors` and `positives` are unit vectors, (B/W, D); row i of one belongs to row i of the other.
    """
    all_positives = gather(positives)
    first = dist.get_rank() * len(anchors) if len(all_positives) > len(anchors) else 0
    own = torch.arange(first, first + len(anchors), device=anchors.device)
    scores = anchors @ all_positives.T / temperature
    loss = F.cross_entropy(scores, own)
    if symmetric:
        loss = (loss + F.cross_entropy(positives @ gather(anchors).T / temperature, own)) / 2
    return loss, {"accuracy": (scores.detach().argmax(dim=1) == own).float().mean()}
