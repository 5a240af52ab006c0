"""Validation during training: scores of held-out records, the same on every worker.

vectors of pairs           loss, ndcg@10, recall@1 with distinct anchors as queries and distinct positives as documents
                           (of records without pairs: one crop of a text as query, another as its document)
vectors of texts           sts_spearman on an STS file; with a teacher, distillation_loss
generative objectives      nll and perplexity per token; BLEU and ROUGE of greedily decoded texts
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.batch import Batch
from pipeline.model.contrastive import ANCHOR, POSITIVE
from pipeline.model.learner import Learner, RowVectors
from pipeline.model.packing import Packed
from pipeline.model.scores import generation_metrics, spearman
from pipeline.training.collectives import all_reduce_sum, broadcast, gather_rows, rank, world_size
from pipeline.training.prefetch import to_device

ROWS_AT_ONCE = 256
CORRUPTION_SEED = 0  # fixed, so that each validation corrupts the texts in the same way


@dataclass(frozen=True)
class StsPairs:
    """Pairs of sentences with human similarity scores."""

    first: Packed
    second: Packed
    scores: list[float]


@dataclass(frozen=True)
class Validation:
    """Held-out records. `decode` turns lists of token ids into texts."""

    batch: Batch
    decode: Callable[[list[list[int]]], list[str]]
    generated_texts: int = 0
    sts: StsPairs | None = None


@torch.no_grad()
def validate(
    learner: Learner, validation: Validation, device: torch.device, *, is_sharded: bool = False
) -> dict[str, float]:
    """Validation metrics, the same on every worker. With `is_sharded`, all workers run the same forward passes."""
    metrics: dict[str, float] = {}
    batch = validation.batch
    if learner.compares:
        texts = batch.compared(whole="distillation" in learner.weights)
        fields, keys = {name: encode_shared(learner, each, device) for name, each in texts.items()}, batch.keys(slots=0)
        if "anchor" in fields:
            metrics |= ranking_metrics(fields["anchor"], fields["positive"], keys, float(learner.scale))
        if "distillation" in learner.weights and batch.teacher:  # given scores are of negatives
            first = next(iter(fields.values()))
            no_negatives = first.new_zeros(len(first), 0, learner.model.width)
            rows = RowVectors(fields, no_negatives, keys.to(device), to_device(batch.teacher_of_views, device))
            metrics["distillation_loss"] = float(learner.distillation_loss(rows))
    if validation.sts and learner.compares:
        first, second = (encode_shared(learner, each, device) for each in (validation.sts.first, validation.sts.second))
        metrics["sts_spearman"] = spearman(
            validation.sts.scores, nn.functional.cosine_similarity(first, second).tolist()
        )
    metrics |= with_perplexity(_token_losses(learner, validation.batch, device))
    if is_sharded or rank() == 0:
        metrics |= _generated(learner, validation, device)
    return broadcast(metrics)  # only rank 0 may have generated texts; and the last bits must agree


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """Add a perplexity for each `*_nll` (mean negative log likelihood per token)."""
    perplexities = {
        name.removesuffix("nll") + "perplexity": math.exp(min(value, 700.0))
        for name, value in metrics.items()
        if name.endswith("_nll")
    }
    return metrics | perplexities


def _ranges(rows: int) -> list[tuple[int, int]]:
    """Row ranges of this worker's batches. All workers get the same number; the last may be small or empty."""
    share = math.ceil(rows / world_size())
    first = rank() * share
    bounds = [min(first + i, rows) for i in (*range(0, share, ROWS_AT_ONCE), share)]
    return list(itertools.pairwise(bounds))


def encode_shared(learner: Learner, texts: Packed, device: torch.device) -> Tensor:
    """(N, D) vectors of all texts; each worker encodes its share."""
    vectors = torch.cat([learner.encode(texts.slice(*ends).to(device)) for ends in _ranges(len(texts))])
    missing = math.ceil(len(texts) / world_size()) - len(vectors)  # the last shares may be smaller
    return gather_rows(nn.functional.pad(vectors, (0, 0, 0, missing)))[: len(texts)]


def _token_losses(learner: Learner, batch: Batch, device: torch.device) -> dict[str, float]:
    """The mean loss per target token of each generative objective."""
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
    """BLEU and ROUGE of each objective that generates texts."""
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


def ranking_metrics(anchors: Tensor, positives: Tensor, keys: Tensor, scale: float) -> dict[str, float]:
    """`loss`, `ndcg@10` and `recall@1` of retrieving the positives of each anchor; (N, D) vectors, (N, 3) `keys`.

    Equal texts, found by `Batch.keys`, are one query or one document, as in `evaluate`. The metrics are trec_eval's,
    except that ties count half. The loss is the mean over the rows; in it, other positives of an anchor are masked.
    """
    anchors, positives = (nn.functional.normalize(each, dim=-1) for each in (anchors, positives))
    queries, first_queries = _numbered(keys[:, ANCHOR].tolist())
    documents, first_documents = _numbered(keys[:, POSITIVE].tolist())
    _, distinct = _numbered([*zip(queries, documents, strict=True)])
    query_of, document_of = (torch.tensor(each, device=anchors.device) for each in (queries, documents))
    candidates = positives[first_documents]
    losses, ranks = [], []
    for rows in torch.arange(len(anchors), device=anchors.device).split(1024):
        own = document_of[rows, None]
        scores = anchors[rows] @ candidates.T
        target = scores.gather(1, own)
        ahead = (~(scores <= target)).sum(dim=1)  # not `>`, so that NaN ranks last
        ties = ((scores == target).sum(dim=1) - 1).clamp(min=0)  # count half, or a model of equal vectors would win
        ranks.append(1 + ahead + ties / 2)
        if len(first_queries) < len(anchors):
            same_query = (query_of[rows, None] == query_of).to(scores.dtype)
            is_right = torch.zeros_like(scores).index_add(1, document_of, same_query) > 0
            scores = scores.masked_fill(is_right.scatter(1, own, False), -torch.inf)
        losses.append(nn.functional.cross_entropy(scores * scale, own[:, 0], reduction="sum"))
    rank_of_positive, query = torch.cat(ranks).double()[distinct], query_of[distinct]
    answers = query.bincount()
    gain = torch.where(rank_of_positive <= 10, 1 / torch.log2(rank_of_positive + 1), 0.0)
    gains, firsts = (
        torch.zeros(len(answers), dtype=torch.float64, device=anchors.device).index_add(0, query, each)
        for each in (gain, (rank_of_positive == 1).double())
    )
    best = (1 / torch.log2(torch.arange(2, 12, dtype=torch.float64, device=anchors.device))).cumsum(dim=0)
    return {
        "loss": float(torch.stack(losses).sum()) / len(anchors),
        "ndcg@10": float((gains / best[answers.clamp(max=10) - 1]).mean()),
        "recall@1": float((firsts / answers).mean()),
    }


def _numbered(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """The number of each key, in order of first occurrence, and the position of each first occurrence."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    numbers = {key: number for number, key in enumerate(first)}
    return [numbers[key] for key in keys], list(first.values())
