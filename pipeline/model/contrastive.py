"""InfoNCE over the global batch: every anchor is classified among the positives and hard negatives of all workers.

A worker has b of the B rows of the global batch, as many as others or not. It scores its own anchors against the
candidates of all workers (and, if symmetric, its own positives against all anchors) and sums over its own rows, in
units of B / W. The mean of that over W workers is the single-process loss. The caller gathers the vectors of all
workers; if gradients flow back through that to the vectors' owners, the mean of the workers' parameter gradients is the
single-process gradient.

    rows = Rows(anchors, positives, negatives, keys)                # (b, D), (b, D), (b, M, D), (b, 3 + M)
    loss, metrics = contrastive_loss(rows, Contrast(symmetric=True), scale=1 / 0.05)                    # one process
    loss, metrics = contrastive_loss(rows, contrast, scale, GlobalBatch(all_rows, first=rank * b, workers=W))

A candidate that is as good an answer as the positive must not count as wrong. Whether it is one follows from `keys`,
hashes of each row's record and texts: equal records, equal texts, and answers to an equal anchor are masked.
Cost: b x B x (1 + M) products of D numbers, once a direction and size.
"""

# Shapes: b rows of this worker, B of all, M hard negatives a row at most, C = B * (1 + M) candidates, D width.
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ID, ANCHOR, POSITIVE, NEGATIVES = 0, 1, 2, 3  # columns of `keys`


@dataclass(frozen=True)
class Rows:
    """This worker's rows. `keys` are int64 hashes: of the record, its anchor, its positive, and each of its negatives.

    A negative that is not there has key 0, as has nothing else, and any vector.
    """

    anchors: Tensor  # (b, D)
    positives: Tensor  # (b, D)
    negatives: Tensor  # (b, M, D)
    keys: Tensor  # (b, 3 + M)


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of all workers, in rank order."""

    rows: Rows
    first: int
    """Where this worker's rows begin."""
    workers: int = 1


@dataclass(frozen=True)
class Contrast:
    """What is asked of each row."""

    symmetric: bool = True
    """Also look for each positive's anchor among all anchors."""
    margin: float | None = None
    """Candidates whose cosine to the anchor is so much above the positive's are masked too (Qwen3 Embedding, eq. 1)."""
    dimensions: tuple[int, ...] = ()
    """Further sizes that the vectors are cut to; the loss is the mean over them and the full size (Matryoshka)."""


def contrastive_loss(
    rows: Rows, contrast: Contrast, scale: Tensor | float, batch: GlobalBatch | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and `accuracy`, the share of anchors whose own positive scores highest, and `mrr`.

    Each is this worker's share: their means over workers are those of the global batch. `scale` is one over the
    temperature. Without a `batch` these rows are the whole batch. Vectors need not be of unit length.
    """
    batch = batch or GlobalBatch(rows, 0)
    everyone, width, share = batch.rows, rows.anchors.shape[1], len(batch.rows.anchors) / batch.workers
    own = torch.arange(batch.first, batch.first + len(rows.anchors), device=rows.anchors.device)
    candidates = torch.cat([everyone.positives, everyone.negatives.flatten(0, 1)])
    wrong_pairs = _wrong_pairs(rows.keys, everyone.keys)
    wrong = torch.cat([wrong_pairs, _wrong_negatives(rows.keys, everyone.keys)], dim=1)
    if contrast.margin is not None:
        with torch.no_grad():
            cosines = _cosines(rows.anchors, candidates, width)
            wrong = wrong & (cosines <= cosines.gather(1, own[:, None]) + contrast.margin)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for size in (width, *contrast.dimensions):
        scores = _masked(_cosines(rows.anchors, candidates, size) * scale, wrong, own)
        loss = F.cross_entropy(scores, own, reduction="sum")
        if contrast.symmetric:
            back = _masked(_cosines(rows.positives, everyone.anchors, size) * scale, wrong_pairs, own)
            loss = (loss + F.cross_entropy(back, own, reduction="sum")) / 2
        losses.append(loss / share)
        metrics = metrics or {name: found.sum() / share for name, found in _ranks(scores.detach(), own).items()}
    return torch.stack(losses).mean(), metrics


def _cosines(left: Tensor, right: Tensor, size: int) -> Tensor:
    return F.normalize(left[:, :size], dim=-1) @ F.normalize(right[:, :size], dim=-1).T


def _masked(scores: Tensor, wrong: Tensor, own: Tensor) -> Tensor:
    """Scores where a candidate is the right one or a wrong one; minus infinity where it is neither."""
    return scores.masked_fill(~wrong.scatter(1, own[:, None], True), -torch.inf)


def _wrong_pairs(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(b, B): whether column j's pair is no answer to row i: it is of another record, anchor and positive."""
    alike = torch.zeros(len(keys), len(all_keys), dtype=torch.bool, device=keys.device)
    for column in (ID, ANCHOR, POSITIVE):
        alike |= keys[:, column, None] == all_keys[None, :, column]
    return ~alike


def _wrong_negatives(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(b, B * M): whether a negative is there, and is not the text of the row's own positive."""
    negatives = all_keys[:, NEGATIVES:].flatten()[None, :]
    return (negatives != 0) & (negatives != keys[:, POSITIVE, None])


def _ranks(scores: Tensor, own: Tensor) -> dict[str, Tensor]:
    """(b,) each. A tie counts half: vectors that are all alike find nothing."""
    mine = scores.gather(1, own[:, None])
    rank = 1 + (scores > mine).sum(dim=1) + ((scores == mine).sum(dim=1) - 1) / 2
    return {"accuracy": (rank == 1).float(), "mrr": 1 / rank}
