"""Losses that make a model's vectors, or the similarities of its texts, equal to a teacher's.

    vector_loss(vectors, teacher, "cosine")        # (n, E) each → sum over rows of 1 - cos
    score_loss(rows, batch, scale=1 / 0.05)        # sum over this worker's anchors of KL(teacher || model)
    given_score_loss(rows, scores, scale)          # the same with (b, 1 + M) scores, of each row's own texts

All are sums over this worker's rows; the caller divides by B / W, so that the mean over W workers is the loss of the
global batch of B rows. In `score_loss`, the candidates of an anchor are the positives and hard negatives of all
workers. None is masked: the teacher says how similar a false negative is. A cross-encoder's scores are of pairs of
texts, so with given scores the candidates are the row's own positive and negatives.
"""

# Shapes: b rows of this worker, B of all, M hard negatives a row at most, C candidates, E the teacher's width.
from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.contrastive import NEGATIVES, GlobalBatch, PairVectors

Distance = Literal["cosine", "l2"]


def vector_loss(vectors_nE: Tensor, teacher_nE: Tensor, distance: Distance) -> Tensor:
    """The sum over rows of one minus the cosine, or of the squared Euclidean distance."""
    if distance == "l2":
        return (vectors_nE - teacher_nE).square().sum()
    return (1 - F.cosine_similarity(vectors_nE, teacher_nE, dim=-1)).sum()


def score_loss(rows: PairVectors, batch: GlobalBatch, scale: float) -> Tensor:
    """The sum over this worker's anchors of KL(p || q); `scale` is one over the temperature.

    p and q are softmaxes over all candidates of `scale` times the cosine to the anchor: the teacher's and the model's.
    """
    teacher = batch.teacher
    assert teacher is not None
    own = slice(batch.first, batch.first + len(rows.anchors))
    filled = batch.rows.keys[:, NEGATIVES:].flatten() != 0
    logits = scale * _cosines(rows.anchors, batch.rows, filled)
    target = scale * _cosines(teacher.anchors[own], teacher, filled)
    return F.kl_div(logits.log_softmax(dim=1), target.log_softmax(dim=1), reduction="sum", log_target=True)


def given_score_loss(rows: PairVectors, scores: Tensor, scale: float) -> Tensor:
    """The sum over rows of KL(p || q): p is the softmax of the scores, q that of `scale` times the cosines.

    `scores` are (b, 1 + M), of the positive and of each negative; those of empty slots are ignored.
    """
    texts = F.normalize(torch.cat([rows.positives[:, None], rows.negatives], dim=1), dim=-1)
    logits = scale * (texts @ F.normalize(rows.anchors, dim=-1)[..., None]).squeeze(-1)
    is_empty = F.pad(rows.keys[:, NEGATIVES:] == 0, (1, 0))
    log_p, log_q = (each.masked_fill(is_empty, -torch.inf).log_softmax(dim=1) for each in (scores, logits))
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(is_empty, 0.0).sum()


def _cosines(anchors: Tensor, everyone: PairVectors, filled: Tensor) -> Tensor:
    """(b, C) cosines of anchors to all positives and filled negatives."""
    candidates = torch.cat([everyone.positives, everyone.negatives.flatten(0, 1)[filled]])
    return F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T
