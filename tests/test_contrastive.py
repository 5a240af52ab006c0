"""The contrastive loss and its gradients: against the plain formula, and across workers against one process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from pipeline.model.contrastive import ContrastiveOptions, PairVectors, contrastive_loss
from pipeline.training.step import _gather_batch
from tests.gloo_workers import Result, run_workers

B, M, D = 8, 2, 6


def rows_of(anchors: torch.Tensor, positives: torch.Tensor) -> PairVectors:
    """Rows without hard negatives, in which all texts differ."""
    n = len(anchors)
    keys = torch.arange(1, 3 * n + 1).view(3, n).T
    return PairVectors(anchors, positives, anchors.new_zeros(n, 0, anchors.shape[1]), keys)


def plain(rows: PairVectors, contrast: ContrastiveOptions, scale: float) -> torch.Tensor:
    """The formula, row by row and candidate by candidate."""
    n, total = len(rows.anchors), torch.tensor(0.0, dtype=rows.anchors.dtype)
    sizes = [rows.anchors.shape[1], *contrast.dimensions]
    keys = rows.keys.tolist()

    def cosine(x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        return x[:size] @ y[:size] / x[:size].norm() / y[:size].norm()

    def same(i: int, j: int) -> bool:
        return any(keys[i][column] == keys[j][column] for column in range(3))

    for size, i in itertools.product(sizes, range(n)):
        own = cosine(rows.anchors[i], rows.positives[i], size)
        limit = cosine(rows.anchors[i], rows.positives[i], sizes[0]) + (contrast.margin or 0.0)
        others = [rows.positives[j] for j in range(n) if not same(i, j)]
        others += [
            rows.negatives[j, m]
            for j in range(n)
            for m in range(rows.negatives.shape[1])
            if keys[j][3 + m] not in (0, keys[i][2])
        ]
        if contrast.margin is not None:
            others = [other for other in others if cosine(rows.anchors[i], other, sizes[0]) <= limit]
        wrong = [cosine(rows.anchors[i], other, size) for other in others]
        loss = -torch.log_softmax(torch.stack([own, *wrong]) * scale, dim=0)[0]
        if contrast.symmetric:
            back = [cosine(rows.positives[i], rows.anchors[j], size) for j in range(n) if not same(i, j)]
            loss = (loss - torch.log_softmax(torch.stack([own, *back]) * scale, dim=0)[0]) / 2
        total = total + loss
    return total / n / len(sizes)


def data(weight: torch.Tensor, share: slice = slice(None)) -> PairVectors:
    """Eight rows with two negatives each. Some texts are met twice and some negatives are missing."""
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(B, 2 + M, D, generator=chance, dtype=torch.float64)
    keys = torch.arange(1, B * (3 + M) + 1).view(B, 3 + M).clone()
    keys[5, 1] = keys[2, 1]  # an anchor asked twice
    keys[6, 2] = keys[1, 2]  # a text that answers two anchors
    keys[7, 0] = keys[0, 0]  # two windows of one record
    keys[3, 4] = keys[4, 2]  # a negative that is another row's positive
    keys[2, 3] = 0  # a row with one negative
    vectors = x[share] @ weight
    return PairVectors(vectors[:, 0], vectors[:, 1], vectors[:, 2:], keys[share])


def start_weight() -> torch.Tensor:
    chance = torch.Generator().manual_seed(2)
    return torch.randn(D, 5, generator=chance, dtype=torch.float64).requires_grad_()


CONTRASTS = [
    ContrastiveOptions(symmetric=False),
    ContrastiveOptions(symmetric=True),
    ContrastiveOptions(symmetric=True, margin=0.1, dimensions=(3, 2)),
]


def test_literal_value() -> None:
    """Two orthogonal pairs: each is told from the other by e^(1/t) against 1."""
    vectors = torch.eye(2)
    loss, metrics = contrastive_loss(rows_of(vectors, vectors), ContrastiveOptions(), scale=2.0)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(torch.tensor(-2.0))))
    assert (metrics["accuracy"], metrics["mrr"]) == (1, 1)
    swapped, metrics = contrastive_loss(
        rows_of(vectors, vectors.flip(0)), ContrastiveOptions(symmetric=False), scale=2.0
    )
    torch.testing.assert_close(swapped, 2 + torch.log1p(torch.exp(torch.tensor(-2.0))))
    assert (metrics["accuracy"], metrics["mrr"]) == (0, 0.5)


def test_vectors_all_alike_find_nothing() -> None:
    _, metrics = contrastive_loss(
        rows_of(torch.ones(4, 4), torch.ones(4, 4)), ContrastiveOptions(), scale=1.0
    )  # of length 2
    assert metrics["accuracy"] == 0
    assert metrics["mrr"] == pytest.approx(1 / 2.5)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_loss_and_gradient_are_those_of_the_formula(contrast: ContrastiveOptions) -> None:
    ours, oracle = start_weight(), start_weight()
    loss, _ = contrastive_loss(data(ours), contrast, scale=10.0)
    expected = plain(data(oracle), contrast, 10.0)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, oracle.grad, atol=1e-10, rtol=0)


def test_each_mask_changes_the_loss() -> None:
    """Or the data above would test nothing."""
    rows = data(start_weight().detach())
    masked, _ = contrastive_loss(rows, CONTRASTS[1], 1.0)
    for place in [(5, 1), (6, 2), (7, 0), (3, 4), (2, 3)]:
        keys = rows.keys.clone()
        keys[place] = 1000
        other, _ = contrastive_loss(PairVectors(rows.anchors, rows.positives, rows.negatives, keys), CONTRASTS[1], 1.0)
        assert abs(other - masked) > 1e-6, place
    with_margin, _ = contrastive_loss(rows, ContrastiveOptions(margin=0.1), 1.0)
    assert with_margin < masked


@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_sentence_transformers(symmetric: bool) -> None:
    """MultipleNegativesRankingLoss on the same vectors, with a hard negative each."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    chance = torch.Generator().manual_seed(0)
    a, p, n = torch.randn(3, 12, 8, generator=chance, dtype=torch.float64)
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=20.0, directions=directions, partition_mode="per_direction"
    )
    expected = theirs.compute_loss_from_embeddings([a, p, n], None)
    keys = torch.arange(1, 12 * 4 + 1).view(12, 4)
    loss, _ = contrastive_loss(PairVectors(a, p, n[:, None], keys), ContrastiveOptions(symmetric=symmetric), scale=20.0)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


def _share(rank: int, world_size: int, contrast: ContrastiveOptions) -> Result:
    """Loss and gradients as DDP would leave them: averaged over workers."""
    weight = start_weight()
    log_scale = torch.tensor(10.0, dtype=torch.float64).log().requires_grad_()
    rows = data(weight, slice(rank * B // world_size, (rank + 1) * B // world_size))
    batch = _gather_batch(rows, None, [B // world_size] * world_size)
    loss, _ = contrastive_loss(rows, contrast, log_scale.exp(), batch)
    loss.backward()
    assert weight.grad is not None
    assert log_scale.grad is not None
    result = {"weight": weight.grad, "scale": log_scale.grad, "loss": loss.detach()}
    for value in result.values():
        dist.all_reduce(value)
        value /= world_size
    return result


@pytest.mark.parametrize(("world_size", "contrast"), [(2, CONTRASTS[0]), (2, CONTRASTS[2]), (4, CONTRASTS[2])])
def test_workers_give_the_single_process_gradient(world_size: int, contrast: ContrastiveOptions) -> None:
    """With hard negatives, masks, a learned temperature and Matryoshka; the plain formula is the oracle."""
    result = run_workers(world_size, _share, contrast)
    weight, log_scale = start_weight(), torch.tensor(10.0, dtype=torch.float64).log().requires_grad_()
    loss = plain(data(weight), contrast, log_scale.exp())  # type: ignore[arg-type]
    loss.backward()
    torch.testing.assert_close(result["loss"], loss.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(result["weight"], weight.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(result["scale"], log_scale.grad, atol=1e-10, rtol=0)
