"""The contrastive loss and its gradients: against the plain formula, and across workers against one process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from pipeline.objectives.contrastive import contrastive_loss


def plain(anchors: torch.Tensor, positives: torch.Tensor, temperature: float, symmetric: bool) -> torch.Tensor:
    scores = anchors @ positives.T / temperature
    loss = F.cross_entropy(scores, torch.arange(len(scores)))
    return (loss + F.cross_entropy(scores.T, torch.arange(len(scores)))) / 2 if symmetric else loss


def test_literal_value() -> None:
    """Two orthogonal pairs: each is told from the other by e^(1/t) against 1."""
    vectors = torch.eye(2)
    loss, metrics = contrastive_loss(vectors, vectors, temperature=0.5, symmetric=True)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(torch.tensor(-2.0))))
    assert metrics["accuracy"] == 1
    swapped, metrics = contrastive_loss(vectors, vectors.flip(0), temperature=0.5, symmetric=False)
    torch.testing.assert_close(swapped, 2 + torch.log1p(torch.exp(torch.tensor(-2.0))))
    assert metrics["accuracy"] == 0


def test_equals_sentence_transformers() -> None:
    from sentence_transformers import util

    torch.manual_seed(0)
    a, p = (F.normalize(torch.randn(12, 8), dim=1) for _ in range(2))
    scores = util.cos_sim(a, p) * 20.0  # MultipleNegativesRankingLoss at its default scale
    loss, _ = contrastive_loss(a, p, temperature=0.05, symmetric=False)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.arange(12)), atol=1e-6, rtol=0)


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 6), (8, 6), (6, 5)))  # type: ignore[return-value]


def _worker(rank: int, world_size: int, symmetric: bool, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    a, p, weight = _data()
    weight.requires_grad_()
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    vectors = [F.normalize(x[share] @ weight, dim=1) for x in (a, p)]
    loss, _ = contrastive_loss(*vectors, temperature=0.1, symmetric=symmetric)
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)  # what DDP does
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if rank == 0:
        torch.save({"grad": weight.grad / world_size, "loss": mean / world_size}, Path(folder) / "result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "symmetric"), [(2, True), (4, True), (2, False)])
def test_workers_give_the_single_process_gradient(world_size: int, symmetric: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world_size, symmetric, folder), nprocs=world_size)
        result = torch.load(Path(folder) / "result.pt", weights_only=True)
    a, p, weight = _data()
    weight.requires_grad_()
    loss = plain(F.normalize(a @ weight, dim=1), F.normalize(p @ weight, dim=1), 0.1, symmetric)
    loss.backward()
    torch.testing.assert_close(result["loss"], loss.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(result["grad"], weight.grad, atol=1e-10, rtol=0)
