"""Scores on held-out records while a model trains, the same on every worker.

contrastive objectives     loss, ndcg@10, recall@1 with anchors as queries; sts_spearman on an STS file
generative objectives      nll and perplexity per token; BLEU and ROUGE of texts that the decoder writes greedily
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.batch import Batch
from pipeline.model.learner import Learner
from pipeline.model.packing import Packed
from pipeline.model.scores import generation_metrics, spearman
from pipeline.training.collectives import all_reduce_sum, broadcast, gather_rows, rank, world_size
from pipeline.training.prefetch import to_device

ROWS_AT_ONCE = 256
CORRUPTION_SEED = 0  # of held-out texts: each validation sees the same ones


@dataclass(frozen=True)
class StsPairs:
    """Pairs of sentences, and how similar people find them."""

    first: Packed
    second: Packed
    scores: list[float]


@dataclass(frozen=True)
class Validation:
    """What a model is scored on. `decode` gives the texts of lists of token ids."""

    batch: Batch
    decode: Callable[[list[list[int]]], list[str]]
    generated_texts: int = 0
    sts: StsPairs | None = None


@torch.no_grad()
def validate(
    learner: Learner, validation: Validation, device: torch.device, *, is_sharded: bool = False
) -> dict[str, float]:
    """Metrics, the same on every worker. If the model `is_sharded`, all workers make the same forward passes."""
    metrics: dict[str, float] = {}
    if learner.contrasts:
        fields = validation.batch.fields
        anchors, positives = (encode_shared(learner, fields[name], device) for name in ("anchor", "positive"))
        metrics |= ranking_metrics(anchors, positives, float(learner.scale))
    if validation.sts and learner.contrasts:
        first, second = (encode_shared(learner, each, device) for each in (validation.sts.first, validation.sts.second))
        metrics["sts_spearman"] = spearman(
            validation.sts.scores, nn.functional.cosine_similarity(first, second).tolist()
        )
    metrics |= with_perplexity(_token_losses(learner, validation.batch, device))
    if is_sharded or rank() == 0:
        metrics |= _generated(learner, validation, device)
    return broadcast(metrics)  # names that rank 0 alone has, and the last bits of the others


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, and the perplexity for each mean negative log likelihood of a token."""
    perplexities = {
        name.removesuffix("nll") + "perplexity": math.exp(min(value, 700.0))
        for name, value in metrics.items()
        if name.endswith("_nll")
    }
    return metrics | perplexities


def _ranges(rows: int) -> list[tuple[int, int]]:
    """Batches of the rows that this worker scores. All workers get equally many; the last may be small or empty."""
    share = math.ceil(rows / world_size())
    first = rank() * share
    bounds = [min(first + i, rows) for i in (*range(0, share, ROWS_AT_ONCE), share)]
    return list(itertools.pairwise(bounds))


def encode_shared(learner: Learner, texts: Packed, device: torch.device) -> Tensor:
    """(N, D) vectors of all texts; each worker encodes its share."""
    found = torch.cat([learner.encode(texts.slice(*ends).to(device)) for ends in _ranges(len(texts))])
    missing = math.ceil(len(texts) / world_size()) - len(found)  # the last shares may be smaller
    return gather_rows(nn.functional.pad(found, (0, 0, 0, missing)))[: len(texts)]


def _token_losses(learner: Learner, batch: Batch, device: torch.device) -> dict[str, float]:
    """The mean over all target tokens, for each generative objective."""
    names = learner.generative
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for ends in _ranges(len(batch)) if names else ():
        part = to_device(learner.prepare(batch.slice(*ends), CORRUPTION_SEED), device)
        for row, name in enumerate(names):
            loss = learner.loss(part.tasks[name])
            sums[row] += torch.tensor([float(loss.nll), loss.count], dtype=torch.float64, device=device)
    return {
        f"{name}_nll": nll / max(count, 1.0)
        for name, (nll, count) in zip(names, all_reduce_sum(sums).tolist(), strict=True)
    }


def _generated(learner: Learner, validation: Validation, device: torch.device) -> dict[str, float]:
    """BLEU and ROUGE of each objective that writes texts."""
    few = validation.batch.slice(0, min(validation.generated_texts, len(validation.batch)))
    if not len(few):
        return {}
    part = to_device(learner.prepare(few, CORRUPTION_SEED), device)
    metrics: dict[str, float] = {}
    for name in learner.writing:
        target = few.fields["positive"] if name == "seq2seq" else few.text
        longest = int(target.lengths.max())
        written = validation.decode(learner.write(part.tasks[name], longest))
        references = validation.decode([target.slice(i, i + 1).ids.tolist() for i in range(len(target))])
        metrics |= {f"{name}_{key}": value for key, value in generation_metrics(written, references).items()}
    return metrics


def ranking_metrics(anchors: Tensor, positives: Tensor, scale: float) -> dict[str, float]:
    """`loss`, `ndcg@10` and `recall@1` if anchor i is to find positive i among all positives; (N, D) each."""
    anchors, positives = (nn.functional.normalize(each, dim=-1) for each in (anchors, positives))
    losses, ranks = [], []
    own = torch.arange(len(anchors), device=anchors.device)
    for rows in own.split(1024):
        scores = anchors[rows] @ positives.T
        losses.append(nn.functional.cross_entropy(scores * scale, rows, reduction="sum"))
        own_score = scores.gather(1, rows[:, None])
        ahead = (~(scores <= own_score)).sum(dim=1)  # written like this, NaN ranks last
        ties = ((scores == own_score).sum(dim=1) - 1).clamp(min=0)  # ties count half, or equal vectors would win
        ranks.append(1 + ahead + ties / 2)
    position = torch.cat(ranks).double()
    gain = torch.where(position <= 10, 1 / torch.log2(position + 1), 0.0)
    return {
        "loss": float(torch.stack(losses).sum()) / len(anchors),
        "ndcg@10": float(gain.mean()),
        "recall@1": float((position == 1).double().mean()),
    }
