"""The distillation losses and the guide, each against its formula written out in NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.model.contrastive import ContrastiveOptions, GlobalBatch, PairVectors, contrastive_loss
from pipeline.model.distillation import given_score_loss, score_loss, vector_loss

Array = npt.NDArray[np.float64]
B, M, D, E = 6, 2, 5, 4


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def pairs(width: int, seed: int) -> PairVectors:
    """B pairs, each with one negative and an empty slot; all texts differ."""
    parts = (numbers(B, width, seed=seed), numbers(B, width, seed=seed + 1), numbers(B, M, width, seed=seed + 2))
    anchors, positives, negatives = (torch.tensor(part) for part in parts)
    keys = torch.arange(1, B * (3 + M) + 1).reshape(B, 3 + M)
    keys[:, -1] = 0
    return PairVectors(anchors, positives, negatives, keys)


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(rows: Array) -> Array:
    exps = np.exp(rows - rows.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def cosines(rows: PairVectors) -> Array:
    """(B, B + B * M) of the anchors to the positives and the negatives."""
    texts = torch.cat([rows.positives, rows.negatives.flatten(0, 1)]).numpy()
    return unit(rows.anchors.numpy()) @ unit(texts).T


def differences(loss: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    """The gradient by central differences."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        moved = at.copy()
        moved[place] += step
        above = loss(moved)
        moved[place] -= 2 * step
        gradient[place] = (above - loss(moved)) / (2 * step)
    return gradient


def by_formula(distance: Any, teacher: Array) -> Callable[[Array], float]:
    if distance == "l2":
        return lambda vectors: float(((vectors - teacher) ** 2).sum())
    return lambda vectors: float((1 - (unit(vectors) * unit(teacher)).sum(axis=1)).sum())


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_vectors(distance: Any) -> None:
    vectors, teacher = numbers(B, E, seed=7), numbers(B, E, seed=8)
    given = torch.tensor(vectors, requires_grad=True)
    loss = vector_loss(given, torch.tensor(teacher), distance)
    loss.backward()  # type: ignore[no-untyped-call]
    formula = by_formula(distance, teacher)
    assert loss.item() == pytest.approx(formula(vectors), rel=1e-12)
    assert given.grad is not None
    np.testing.assert_allclose(given.grad.numpy(), differences(formula, vectors), atol=1e-8)


def test_scores() -> None:
    """Empty slots are no candidates, and the anchors are this worker's: rows 2 and 3 of 6."""
    model, teacher, scale, own = pairs(D, 0), pairs(E, 10), 4.0, slice(2, 4)
    filled = np.r_[np.ones(B, bool), np.tile([True, False], B)]
    target = softmax(scale * cosines(teacher)[own][:, filled])

    def formula(anchors: Array) -> float:
        whole = PairVectors(torch.tensor(anchors), model.positives, model.negatives, model.keys)
        found = softmax(scale * cosines(whole)[:, filled])
        return float((target * np.log(target / found)).sum())

    anchors = model.anchors[own].clone().requires_grad_()
    rows = PairVectors(anchors, model.positives[own], model.negatives[own], model.keys[own])
    loss = score_loss(rows, GlobalBatch(model, 2, 3, teacher), scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(formula(model.anchors[own].numpy()), rel=1e-12)
    assert anchors.grad is not None
    np.testing.assert_allclose(anchors.grad.numpy(), differences(formula, model.anchors[own].numpy()), atol=1e-8)


def test_given_scores() -> None:
    """Each row has a positive, a negative and an empty slot, whose score must not matter."""
    model, scores, scale = pairs(D, 0), numbers(B, 1 + M, seed=3), 4.0
    texts = np.concatenate([model.positives[:, None].numpy(), model.negatives[:, :1].numpy()], axis=1)
    target = softmax(scores[:, :2])

    def formula(anchors: Array) -> float:
        found = softmax(scale * np.einsum("id,icd->ic", unit(anchors), unit(texts)))
        return float((target * np.log(target / found)).sum())

    anchors = model.anchors.clone().requires_grad_()
    rows = PairVectors(anchors, model.positives, model.negatives, model.keys)
    loss = given_score_loss(rows, torch.tensor(scores), scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(formula(model.anchors.numpy()), rel=1e-12)
    assert anchors.grad is not None
    np.testing.assert_allclose(anchors.grad.numpy(), differences(formula, model.anchors.numpy()), atol=1e-8)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    rows = pairs(E, 10)
    assert float(score_loss(rows, GlobalBatch(rows, 0, teacher=rows), 20.0)) == pytest.approx(0, abs=1e-12)
    assert float(vector_loss(rows.anchors, rows.anchors, "cosine")) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_guide_masks_what_it_places_nearer_than_the_positive(margin: float, symmetric: bool) -> None:
    model, teacher, scale = pairs(D, 0), pairs(E, 10), 5.0
    keys = np.tile([True, False], B)
    guide, found = cosines(teacher), scale * cosines(model)
    back = unit(teacher.positives.numpy()) @ unit(teacher.anchors.numpy()).T
    found_back = scale * unit(model.positives.numpy()) @ unit(model.anchors.numpy()).T
    total, masked = 0.0, 0
    for i in range(B):
        kept = (guide[i] <= guide[i, i] + margin) & np.r_[np.ones(B, bool), keys]
        kept_back = back[i] <= back[i, i] + margin
        masked += int((~kept).sum()) - B
        terms = [-np.log(np.exp(found[i, i]) / np.exp(found[i][kept]).sum())]
        if symmetric:
            terms.append(-np.log(np.exp(found_back[i, i]) / np.exp(found_back[i][kept_back]).sum()))
        total += sum(terms) / len(terms)
    assert masked > 0
    options = ContrastiveOptions(symmetric, margin, guided=True)
    loss, _ = contrastive_loss(model, options, scale, GlobalBatch(model, 0, teacher=teacher))
    assert float(loss) == pytest.approx(total / B, rel=1e-12)
