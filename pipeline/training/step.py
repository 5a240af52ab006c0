"""One training step: forward, loss over the global batch, backward, one reduction of the gradients.

With `micro_batches > 1` gradients are cached (Gao et al. 2021, section 3): every micro-batch is embedded without a
graph, the loss over all of them gives the gradient of each vector, and each micro-batch is embedded again with its
graph to carry that gradient to the weights. The result is the gradient of the whole batch, for a second forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.model.packing import Packed
from pipeline.training.batch import PairBatch

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(anchors, positives), unit vectors (n, D) each → the mean loss, and metrics."""


def backward(
    model: nn.Module, batch: PairBatch, loss: Loss, micro_batches: int, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Leave the batch's gradients, averaged over workers, in the parameters. Returns `loss` and the loss's metrics."""
    device_type = batch.anchors.ids.device.type

    def embed(texts: Packed) -> Tensor:
        with torch.autocast(device_type, autocast) if autocast else nullcontext():
            return model(texts)  # type: ignore[no-any-return]

    if micro_batches == 1:
        value, metrics = loss(*embed(batch.texts()).chunk(2))
        value.backward()  # type: ignore[no-untyped-call]
        return {"loss": value.detach(), **metrics}
    return _cached_backward(model, embed, batch, loss, micro_batches)


def _cached_backward(
    model: nn.Module, embed: Callable[[Packed], Tensor], batch: PairBatch, loss: Loss, micro_batches: int
) -> dict[str, Tensor]:
    device = batch.anchors.ids.device
    bounds = [len(batch) * i // micro_batches for i in range(micro_batches + 1)]
    parts = [batch.texts(start, stop) for start, stop in itertools.pairwise(bounds)]
    vectors, dropout_states = [], []
    with torch.no_grad():
        for part in parts:
            dropout_states.append(_rng_state(device))
            vectors.append(embed(part))
    cached = [[half.clone().requires_grad_() for half in part.chunk(2)] for part in vectors]
    value, metrics = loss(torch.cat([a for a, _ in cached]), torch.cat([p for _, p in cached]))
    value.backward()  # type: ignore[no-untyped-call]
    for i, (part, halves) in enumerate(zip(parts, cached, strict=True)):
        _set_rng_state(device, dropout_states[i])
        reduce_now = i == len(parts) - 1 or not isinstance(model, DistributedDataParallel)
        with nullcontext() if reduce_now else model.no_sync():  # type: ignore[operator]
            embed(part).backward(torch.cat([half.grad for half in halves]))  # type: ignore[no-untyped-call, misc]
    return {"loss": value.detach(), **metrics}


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
