"""One training step: forward and backward over the global batch, with one reduction of gradients.

    parts = [learner.prepare(batch.slice(*ends), seed) for ends in micro_batch_ranges(batch, min_parts=2)]
    outcome = backward(learner, strategy, parts)          # gradients are in the parameters; outcome.metrics["loss"]

The losses of embeddings need those of the whole batch, whose graph may not fit in memory. Gradient caching (GradCache,
Gao et al. 2021, section 3) computes the same gradient in three steps:

    1. Embed each micro-batch without a graph and save the state of the random number generator.
    2. Compute the losses of all embeddings, and their gradient with respect to each embedding.
    3. Embed each micro-batch again, with a graph and the same dropout, and backpropagate the cached gradients.

Cost: a second forward pass, except for a single micro-batch, which keeps its graph from step 1. Token losses need no
cache: step 3 computes their gradients.

Workers synchronise three times: they exchange counts before step 2, gather embeddings in step 2, and reduce gradients
and flags in step 3. A worker that runs out of memory reports it at the next of these, and all abandon the step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.model.batch import Batch, MicroBatch
from pipeline.model.contrastive import GlobalBatch, PairVectors
from pipeline.model.generative import TokenLoss
from pipeline.model.learner import Learner
from pipeline.training.collectives import all_gather, gather_rows, rank
from pipeline.training.strategy import Strategy


class OutOfMemory(RuntimeError):  # noqa: N818  # as torch.OutOfMemoryError, but of all workers
    """A worker ran out of memory; the step's gradients must not be used.

    All workers raise this. With a sharded model, only the worker that ran out does: the others are waiting for it.
    """


@dataclass
class StepResult:
    """A step's metrics and flags. The mean of a metric over workers is its value for the global batch."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    bad_losses: int = 0
    """Number of workers whose loss is NaN or infinite."""
    flags: list[int] = field(default_factory=list)
    """Number of workers that set each flag."""


def micro_batch_ranges(
    batch: Batch, min_parts: int = 1, max_tokens: int | None = None, oom_splits: int = 0
) -> list[tuple[int, int]]:
    """Row ranges of at least `min_parts` micro-batches of at most `max_tokens` each.

    A record longer than that gets its own micro-batch. `oom_splits`: how often micro-batches were halved to fit in
    memory.
    """
    rows, most = len(batch), None if max_tokens is None else max_tokens / 2**oom_splits
    parts = min(rows, min_parts * 2**oom_splits)
    edges = {rows * i // parts for i in range(1, parts)} if parts else set()
    bounds, tokens = [0], 0
    for row, size in enumerate(batch.row_tokens):
        if row and (row in edges or (most is not None and tokens + size > most)):
            bounds.append(row)
            tokens = 0
        tokens += size
    return list(zip(bounds, [*bounds[1:], rows], strict=True))


def backward(
    learner: Learner,
    strategy: Strategy,
    parts: Sequence[MicroBatch],
    *,
    autocast: torch.dtype | None = None,
    loss_scale: Tensor | float = 1.0,
    flags: Sequence[bool] = (),
) -> StepResult:
    """Store the batch's gradients, averaged over workers and multiplied by `loss_scale`, in the parameters.

    `flags` are summed over workers in the same collective. Raises OutOfMemory.
    """
    device = parts[0].keys.device
    if strategy.is_sharded:
        parts = _as_many_as_others(parts)
    cache = _GradCache(learner, parts, torch.autocast(device.type, autocast) if autocast else nullcontext())
    memory = _MemoryGuard(raises=strategy.is_sharded)
    strategy.start()

    with memory:
        cache.embed()
    counts = _Counts.exchange(parts, memory.ran_out, device)
    if counts.ran_out:
        raise OutOfMemory
    metrics = cache.compare(counts.rows, loss_scale) if learner.compares else {}
    with memory:
        for i in range(len(parts)):
            with strategy.gradient_sync() if i == len(parts) - 1 else nullcontext():
                cache.replay(i, counts, loss_scale, metrics)

    loss = metrics.get("loss", torch.zeros((), device=device))
    ran_out, bad_losses, *summed = strategy.finish([memory.ran_out, ~torch.isfinite(loss), *flags])
    if ran_out:
        raise OutOfMemory
    return StepResult(metrics, int(bad_losses), [int(each) for each in summed])


class _GradCache:
    """The embeddings of a step's micro-batches and, after `compare`, the gradients of the loss in their `.grad`."""

    def __init__(
        self, learner: Learner, parts: Sequence[MicroBatch], precision: AbstractContextManager[object]
    ) -> None:
        self.learner, self.parts, self.precision = learner, parts, precision
        self.embeddings: list[Tensor] = []
        self.rng_states: list[Tensor] = []
        self.graph: tuple[Tensor | None, dict[str, TokenLoss]] | None = None

    def embed(self) -> None:
        """Step 1. A single micro-batch keeps its graph and its token losses."""
        if not self.learner.compares:
            return
        if len(self.parts) == 1:
            with self.precision:
                self.graph = self.learner(self.parts[0])
            vectors = self.graph[0]
            assert vectors is not None
            self.embeddings = [vectors.detach().requires_grad_()]
            return
        with torch.no_grad(), self.precision:
            for part in self.parts:
                self.rng_states.append(_rng_state(part.keys.device))
                self.embeddings.append(self.learner.embed(part).detach().requires_grad_())

    def compare(self, rows_of_workers: list[int], loss_scale: Tensor | float) -> dict[str, Tensor]:
        """Step 2. Returns the metrics of the losses."""
        rows = self.learner.rows(self.parts, self.embeddings)
        batch = None
        if self.learner.compares_rows:
            batch = _gather_batch(rows.pairs, rows.teacher_pairs, rows_of_workers)
        loss, metrics = self.learner.compare(rows, batch, sum(rows_of_workers) / len(rows_of_workers))
        (loss * loss_scale).backward()
        return {**metrics, "loss": loss.detach()}

    def replay(self, i: int, counts: _Counts, loss_scale: Tensor | float, metrics: dict[str, Tensor]) -> None:
        """Step 3, for micro-batch i. Adds its token losses to `metrics`."""
        embeddings, losses = self._forward(i)
        terms = []
        for name, loss in losses.items():
            terms.append(self.learner.weights[name] * counts.per_token(name) * loss.sum)
            metrics[f"{name}_nll"] = metrics.get(f"{name}_nll", 0.0) + counts.per_token(name) * loss.nll.detach()
        if terms:
            metrics["loss"] = metrics.get("loss", 0.0) + torch.stack(terms).sum().detach()
            terms = [term * loss_scale for term in terms]
        if embeddings is not None:
            gradient = self.embeddings[i].grad
            assert gradient is not None
            terms.append((embeddings * gradient).sum())
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    def _forward(self, i: int) -> tuple[Tensor | None, dict[str, TokenLoss]]:
        """The embeddings of micro-batch i with their graph, and its token losses."""
        if self.graph is not None:
            graph, self.graph = self.graph, None  # the backward pass then frees it
            return graph
        if self.rng_states:
            _set_rng_state(self.parts[i].keys.device, self.rng_states[i])
        with self.precision:
            return self.learner(self.parts[i])  # type: ignore[no-any-return]


def _gather_batch(pairs: PairVectors, teacher: PairVectors | None, counts: list[int]) -> GlobalBatch:
    """The pairs of all workers, differentiable; `counts` has each worker's number of rows."""
    of_teacher = None if teacher is None else _gathered(teacher, counts)
    return GlobalBatch(_gathered(pairs, counts), sum(counts[: rank()]), len(counts), of_teacher)


def _gathered(pairs: PairVectors, counts: list[int]) -> PairVectors:
    keys, anchors, positives, negatives = (
        gather_rows(each, counts) for each in (pairs.keys, pairs.anchors, pairs.positives, pairs.negatives)
    )
    return PairVectors(anchors, positives, negatives, keys)


def _as_many_as_others(parts: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The parts, padded with empty ones to the largest number of parts on any worker."""
    counts = all_gather(torch.tensor(len(parts), device=parts[0].keys.device))
    return [*parts, *[parts[0].emptied()] * (int(counts.max()) - len(parts))]


@dataclass(frozen=True)
class _Counts:
    """Counts over all workers, exchanged before the losses are computed."""

    rows: list[int]
    """Number of rows of each worker."""
    targets: dict[str, float]
    """Number of target tokens of all workers, by objective."""
    ran_out: float
    """Number of workers that ran out of memory."""

    @classmethod
    def exchange(cls, parts: Sequence[MicroBatch], ran_out: bool, device: torch.device) -> _Counts:
        names = list(parts[0].tasks)
        local = [float(sum(len(part.tasks[name].labels) for part in parts)) for name in names]
        local += [float(sum(part.rows for part in parts)), float(ran_out)]
        gathered = all_gather(torch.tensor(local, dtype=torch.float64, device=device)).cpu()  # (W, len(local))
        *targets, _, all_ran_out = gathered.sum(dim=0).tolist()
        return cls([int(n) for n in gathered[:, -2]], dict(zip(names, targets, strict=True)), all_ran_out)

    def per_token(self, name: str) -> float:
        """1 / the mean number of target tokens per worker."""
        return len(self.rows) / max(self.targets[name], 1.0)


class _MemoryGuard:
    """Records that this worker ran out of memory; with a sharded model, raises OutOfMemory instead."""

    def __init__(self, *, raises: bool) -> None:
        self.raises, self.ran_out = raises, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or not _is_out_of_memory(error):
            return False
        if self.raises:
            raise OutOfMemory(
                "out of memory under training.strategy=fsdp; the run restarts from the newest checkpoint with "
                "micro-batches half as large"
            ) from error
        self.ran_out = True
        return True


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, RuntimeError) and bool(re.search("can't allocate memory|not enough memory", str(error)))


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
