"""InfoNCE over the global batch: each anchor must find its positive among the candidates of all workers.

Each worker has b of the B rows; b may differ between workers. It scores its own anchors against the positives and hard
negatives of all workers (if symmetric, also its positives against all anchors), sums over its rows and divides by
B / W. The mean over W workers is the single-process loss. The caller gathers the vectors of all workers; if gradients
flow back to the workers that computed them, the mean of the parameter gradients is the single-process gradient.

    rows = PairVectors(anchors, positives, negatives, keys)                # (b, D), (b, D), (b, M, D), (b, 3 + M)
    options = ContrastiveOptions(symmetric=True)
    loss, metrics = contrastive_loss(rows, options, scale=1 / 0.05)        # one process
    loss, metrics = contrastive_loss(rows, options, scale, GlobalBatch(all_rows, first=rank * b, workers=W))

False negatives are masked: candidates of the same record, with the same text as the positive, or with an equal anchor.
They are found by `keys`, hashes of each row's record and texts. Cost: b x B x (1 + M) dot products of D numbers per
direction and size.
"""

# Shapes: b rows of this worker, B of all, M hard negatives a row at most, C = B * (1 + M) candidates, D width.
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ID, ANCHOR, POSITIVE, NEGATIVES = 0, 1, 2, 3  # columns of `keys`


@dataclass(frozen=True)
class PairVectors:
    """This worker's rows. `keys` are int64 hashes of the record, its anchor, its positive and each negative.

    An empty negative slot has key 0, and its vector is ignored.
    """

    anchors: Tensor  # (b, D)
    positives: Tensor  # (b, D)
    negatives: Tensor  # (b, M, D)
    keys: Tensor  # (b, 3 + M)


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of all workers, in rank order."""

    rows: PairVectors
    first: int
    """Index of this worker's first row."""
    workers: int = 1
    teacher: PairVectors | None = None
    """The teacher's vectors of the same texts."""


@dataclass(frozen=True)
class ContrastiveOptions:
    """Options of the contrastive loss."""

    symmetric: bool = True
    """Also classify each positive among all anchors."""
    margin: float | None = None
    """Also mask candidates whose cosine exceeds the positive's by more than this (Qwen3 Embedding, eq. 1)."""
    guided: bool = False
    """For `margin`, use the teacher's cosines, in both directions (GISTEmbed, Solatorio 2024)."""
    dimensions: tuple[int, ...] = ()
    """Sizes that vectors are also truncated to; the loss is the mean over these and the full size (Matryoshka)."""


def contrastive_loss(
    rows: PairVectors, contrast: ContrastiveOptions, scale: Tensor | float, batch: GlobalBatch | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the metrics `accuracy` (share of anchors whose positive scores highest) and `mrr`.

    Averaged over workers, each equals its value for the global batch. `scale`: one over the temperature. `batch`: the
    rows of all workers; None if `rows` are all. Vectors need not have unit length.
    """
    batch = batch or GlobalBatch(rows, 0)
    everyone, width, share = batch.rows, rows.anchors.shape[1], len(batch.rows.anchors) / batch.workers
    own = torch.arange(batch.first, batch.first + len(rows.anchors), device=rows.anchors.device)
    candidates = _candidates(everyone)
    wrong_pairs = _wrong_pairs(rows.keys, everyone.keys)
    wrong = torch.cat([wrong_pairs, _wrong_negatives(rows.keys, everyone.keys)], dim=1)
    if contrast.margin is not None:
        judge = batch.teacher if contrast.guided else everyone
        assert judge is not None
        wrong = wrong & _within_margin(judge.anchors, _candidates(judge), own, contrast.margin)
        if contrast.guided:
            wrong_pairs = wrong_pairs & _within_margin(judge.positives, judge.anchors, own, contrast.margin)
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


def _candidates(rows: PairVectors) -> Tensor:
    return torch.cat([rows.positives, rows.negatives.flatten(0, 1)])


@torch.no_grad()
def _within_margin(texts: Tensor, candidates: Tensor, own: Tensor, margin: float) -> Tensor:
    """(b, C): whether a candidate's cosine to a row's text exceeds that of the row's own by at most `margin`."""
    cosines = _cosines(texts[own], candidates, texts.shape[1])
    return cosines <= cosines.gather(1, own[:, None]) + margin


def _cosines(left: Tensor, right: Tensor, size: int) -> Tensor:
    return F.normalize(left[:, :size], dim=-1) @ F.normalize(right[:, :size], dim=-1).T


def _masked(scores: Tensor, wrong: Tensor, own: Tensor) -> Tensor:
    """Scores, with minus infinity for candidates that are neither the right one nor wrong."""
    return scores.masked_fill(~wrong.scatter(1, own[:, None], True), -torch.inf)


def _wrong_pairs(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(b, B): whether pair j is a true negative of row i: record, anchor and positive all differ."""
    alike = torch.zeros(len(keys), len(all_keys), dtype=torch.bool, device=keys.device)
    for column in (ID, ANCHOR, POSITIVE):
        alike |= keys[:, column, None] == all_keys[None, :, column]
    return ~alike


def _wrong_negatives(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(b, B * M): whether a slot holds a negative whose text differs from the row's positive."""
    negatives = all_keys[:, NEGATIVES:].flatten()[None, :]
    return (negatives != 0) & (negatives != keys[:, POSITIVE, None])


def _ranks(scores: Tensor, own: Tensor) -> dict[str, Tensor]:
    """(b,) each. A tie counts half, so that identical vectors do not score well."""
    mine = scores.gather(1, own[:, None])
    rank = 1 + (scores > mine).sum(dim=1) + ((scores == mine).sum(dim=1) - 1) / 2
    return {"accuracy": (rank == 1).float(), "mrr": 1 / rank}
