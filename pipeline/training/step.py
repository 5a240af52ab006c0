"""One training step: forward, the weighted sum of losses over the global batch, backward, one reduction of gradients.

    parts = [learner.prepare(batch.slice(*ends), seed) for ends in cut(batch, at_least=2)]
    outcome = backward(learner, strategy, parts)          # gradients are in the parameters; outcome.metrics["loss"]

Every micro-batch is embedded, the contrastive loss over all of them gives the gradient of each vector, and that is
carried on to the weights micro-batch by micro-batch. With more than one, the first pass is made without a graph and
each is embedded again, with the same dropout, when its turn comes (cached gradients, Gao et al. 2021, section 3): the
result is the gradient of the whole batch, for a second forward pass. Objectives that are sums over tokens need no
cache.

Workers meet three times: in a census of a few numbers before the contrastive loss, in the exchange of vectors within
it, and in the reduction of gradients, which carries flags. No worker can run out of memory within one of them, so one
that does says so at the next, and all give the step up together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.model.batch import Batch, Part
from pipeline.model.learner import Learner
from pipeline.objectives.collectives import from_all
from pipeline.training.strategy import Strategy


class OutOfMemory(RuntimeError):  # noqa: N818  # as torch.OutOfMemoryError, but of all workers
    """At least one worker ran out of memory, and no gradient is to be used.

    All workers raise this; in lockstep, where the others wait for it in vain, the one that did.
    """


@dataclass
class Outcome:
    """What a step found. Metrics are each worker's share: their mean over workers is that of the global batch."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    bad_losses: int = 0
    """How many workers have a loss that is no finite number."""
    wishes: list[int] = field(default_factory=list)
    """How many workers brought each of the wishes."""


def cut(batch: Batch, at_least: int = 1, most_tokens: int | None = None, halvings: int = 0) -> list[tuple[int, int]]:
    """Row ranges of `at_least` micro-batches, or of as many as hold `most_tokens` each at most.

    A longer record is alone in its own. `halvings`: how often all of that was halved for want of memory.
    """
    rows, most = len(batch), None if most_tokens is None else most_tokens / 2**halvings
    parts = min(rows, at_least * 2**halvings)
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
    parts: Sequence[Part],
    *,
    autocast: torch.dtype | None = None,
    loss_scale: Tensor | float = 1.0,
    wishes: Sequence[bool] = (),
) -> Outcome:
    """Leave the batch's gradients, averaged over workers, in the parameters, times `loss_scale`.

    `wishes` are added up over workers on the way. Raises OutOfMemory.
    """
    device = parts[0].keys.device
    precision = torch.autocast(device.type, autocast) if autocast else nullcontext()
    if strategy.lockstep:
        parts = _as_many_as_others(parts)
    strategy.start()
    pass_one, failed = _First(learner, precision), _Failure(lockstep=strategy.lockstep)
    with failed.noted():
        pass_one.run(parts)
    census = _Census.of(parts, failed.happened, device)
    if census.failures:
        raise OutOfMemory
    outcome = Outcome()
    if learner.contrasts:
        outcome.metrics = pass_one.contrast(parts, census.rows, loss_scale)
    with failed.noted():
        _second(learner, strategy, parts, pass_one, census, precision, loss_scale, outcome.metrics)
    loss = outcome.metrics.get("loss", torch.zeros((), device=device))
    failures, bad_losses, *wished = strategy.finish([failed.happened, ~torch.isfinite(loss), *wishes])
    if failures:
        raise OutOfMemory
    outcome.bad_losses, outcome.wishes = int(bad_losses), [int(each) for each in wished]
    return outcome


def _as_many_as_others(parts: Sequence[Part]) -> list[Part]:
    """The parts, and empty ones up to the largest number of parts that a worker has."""
    counts = from_all(torch.tensor(len(parts), device=parts[0].keys.device))
    return [*parts, *[parts[0].emptied()] * (int(counts.max()) - len(parts))]


class _First:
    """The first pass over the pairs: vectors, and what the second one needs to go on from them."""

    def __init__(self, learner: Learner, precision: Any) -> None:
        self.learner, self.precision = learner, precision
        self.rng_states: list[Tensor] = []
        self.graphs: list[tuple[Tensor, dict[str, Any]]] = []
        self.vectors: list[Tensor] = []

    def run(self, parts: Sequence[Part]) -> None:
        """A single part keeps its graph, and its other losses; several are embedded anew later."""
        if not self.learner.contrasts:
            return
        if len(parts) == 1:
            with self.precision:
                vectors, losses = self.learner(parts[0])
            self.graphs.append((vectors, losses))
            self.vectors = [vectors.detach().requires_grad_()]
            return
        with torch.no_grad(), self.precision:
            for part in parts:
                self.rng_states.append(_rng_state(part.keys.device))
                self.vectors.append(self.learner.embed(part).detach().requires_grad_())

    def contrast(self, parts: Sequence[Part], rows: list[int], loss_scale: Tensor | float) -> dict[str, Tensor]:
        """Leave the loss's gradient in each vector. Returns the metrics."""
        loss, metrics = self.learner.contrast(parts, self.vectors, rows)
        (loss * loss_scale).backward()
        return {**metrics, "loss": loss.detach()}

    def resumed(self, i: int, part: Part) -> tuple[Tensor | None, dict[str, Any]]:
        """Part i's vectors with their graph, and its other losses."""
        if self.graphs:
            return self.graphs.pop()
        if self.rng_states:
            _set_rng_state(part.keys.device, self.rng_states[i])
        with self.precision:
            return self.learner(part)  # type: ignore[no-any-return]


def _second(
    learner: Learner,
    strategy: Strategy,
    parts: Sequence[Part],
    first: _First,
    census: _Census,
    precision: Any,
    loss_scale: Tensor | float,
    metrics: dict[str, Tensor],
) -> None:
    """Carry all gradients to the weights, part by part; adds the losses to `metrics`."""
    for i, part in enumerate(parts):
        vectors, losses = first.resumed(i, part)
        terms = [learner.weights[name] * census.share(name) * loss.sum for name, loss in losses.items()]
        for name, loss in losses.items():
            metrics[f"{name}_nll"] = metrics.get(f"{name}_nll", 0.0) + census.share(name) * loss.nll.detach()
        if terms:
            metrics["loss"] = metrics.get("loss", 0.0) + torch.stack(terms).sum().detach()
            terms = [term * loss_scale for term in terms]
        if vectors is not None:
            gradient = first.vectors[i].grad
            assert gradient is not None
            terms.append((vectors * gradient).sum())
        with strategy.sending() if i == len(parts) - 1 else nullcontext():
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Census:
    """What workers must know of each other before their losses: rows of each, target tokens of all, failures."""

    rows: list[int]
    targets: dict[str, float]
    failures: float

    @classmethod
    def of(cls, parts: Sequence[Part], failed: bool, device: torch.device) -> _Census:
        names = list(parts[0].tasks)
        own = [float(sum(len(part.tasks[name].labels) for part in parts)) for name in names]
        own += [float(sum(part.rows for part in parts)), float(failed)]
        everyone = from_all(torch.tensor(own, dtype=torch.float64, device=device)).cpu()
        *targets, _, failures = everyone.sum(dim=0).tolist()
        return cls([int(n) for n in everyone[:, -2]], dict(zip(names, targets, strict=True)), failures)

    def share(self, name: str) -> float:
        """One over a worker's mean number of target tokens."""
        return len(self.rows) / max(self.targets[name], 1.0)


class _Failure:
    """Whether this worker has run out of memory. In lockstep the others wait for it, so there it is raised."""

    def __init__(self, *, lockstep: bool) -> None:
        self.lockstep = lockstep
        self.happened = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_want_of_memory(error):
                raise
            if self.lockstep:
                raise OutOfMemory(
                    "out of memory under training.strategy=fsdp; from the newest checkpoint the run goes on in "
                    "micro-batches half as large"
                ) from error
            self.happened = True


def _is_want_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator has no error type of its own
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
