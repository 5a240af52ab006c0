"""Losses that make a model's vectors, or the similarities of its texts, equal to a teacher's.

    vector_loss(vectors, teacher, "cosine")        # (n, E) each → sum over rows of 1 - cos
    score_loss(rows, batch, scale=1 / 0.05)        # sum over this worker's anchors of KL(teacher || model)

Both are sums over this worker's rows; the caller divides by B / W, so that the mean over W workers is the loss of the
global batch of B rows. In `score_loss`, the candidates of an anchor are the positives and hard negatives of all
workers. None is masked: the teacher says how similar a false negative is.
"""

# Shapes: b rows of this worker, B of all, C candidates, D width, E the teacher's width.
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


def _cosines(anchors: Tensor, everyone: PairVectors, filled: Tensor) -> Tensor:
    """(b, C) cosines of anchors to all positives and filled negatives."""
    candidates = torch.cat([everyone.positives, everyone.negatives.flatten(0, 1)[filled]])
    return F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T
