"""One training step: forward, the weighted sum of losses over the global batch, backward, one reduction of gradients.

With `micro_batches > 1` gradients are cached (Gao et al. 2021, section 3): every micro-batch is embedded without a
graph, the contrastive loss over all of them gives the gradient of each vector, and each micro-batch is embedded again
with its graph, and its dropout, to carry that gradient to the weights. The result is the gradient of the whole batch,
for a second forward pass. Objectives that are sums over tokens need no cache.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.objectives.batch import Batch
from pipeline.objectives.collectives import total, world_size
from pipeline.objectives.learner import Learner, Part


def backward(
    learner: Learner,
    parallel: nn.Module,
    batch: Batch,
    *,
    seed: int,
    micro_batches: int = 1,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Leave the batch's gradients, averaged over workers, in the parameters. Returns `loss` and the metrics.

    `parallel` is the learner, or what averages its gradients; texts are corrupted by `seed`.
    """
    bounds = [len(batch) * i // micro_batches for i in range(micro_batches + 1)]
    parts = [learner.prepare(batch.slice(*ends), seed).to(device) for ends in itertools.pairwise(bounds)]
    shares = _shares(parts, torch.device(device))
    precision = torch.autocast(torch.device(device).type, autocast) if autocast else nullcontext()
    cache = _Cache(learner, parts, precision) if learner.contrasts and len(parts) > 1 else None
    metrics = dict(cache.metrics) if cache else {}
    for i, part in enumerate(parts):
        if cache:
            _set_rng_state(part.keys.device, cache.rng_states[i])
        reduce_now = i == len(parts) - 1 or not isinstance(parallel, DistributedDataParallel)
        with nullcontext() if reduce_now else parallel.no_sync():  # type: ignore[operator]
            with precision:
                vectors, losses = parallel(part)
            terms = [learner.weights[name] * shares[name] * loss.sum for name, loss in losses.items()]
            for name, loss in losses.items():
                metrics[f"{name}_nll"] = metrics.get(f"{name}_nll", 0.0) + shares[name] * loss.nll.detach()
            if terms:
                metrics["loss"] = metrics.get("loss", 0.0) + torch.stack(terms).sum().detach()
            if cache:
                terms.append(cache.term(i, vectors))
            elif vectors is not None:
                contrast, found = learner.contrast([part], [vectors])
                terms.append(contrast)
                metrics |= found | {"loss": metrics.get("loss", 0.0) + contrast.detach()}
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
    return metrics


class _Cache:
    """The gradient of each micro-batch's vectors, and the state of chance that they were made in."""

    def __init__(self, learner: Learner, parts: list[Part], precision: Any) -> None:
        self.learner = learner
        self.rng_states, vectors = [], []
        with torch.no_grad(), precision:
            for part in parts:
                self.rng_states.append(_rng_state(part.keys.device))
                vectors.append(learner.embed(part))
        self.vectors = [each.requires_grad_() for each in vectors]
        loss, self.metrics = learner.contrast(parts, self.vectors)
        self.metrics |= {"loss": loss.detach()}
        loss.backward()  # type: ignore[no-untyped-call]

    def term(self, i: int, vectors: Tensor) -> Tensor:
        """A number whose gradient is the cached one; every parameter of the loss takes part, as DDP wants it."""
        gradient = self.vectors[i].grad
        assert gradient is not None
        return (vectors * gradient).sum() + 0.0 * self.learner.scale


def _shares(parts: list[Part], device: torch.device) -> dict[str, float]:
    """By objective, one over a worker's mean number of target tokens: one small sum over workers a step."""
    names = list(parts[0].tasks)
    counts = [float(sum(len(part.tasks[name].labels) for part in parts)) for name in names]
    if not names:
        return {}
    everywhere = total(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
    return {name: world_size() / max(count, 1.0) for name, count in zip(names, everywhere, strict=True)}


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
