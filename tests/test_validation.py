"""Ranking metrics of held-out pairs: by hand, and against trec_eval over distinct texts."""

from __future__ import annotations

import math

import pytest
import pytrec_eval
import torch
import torch.nn.functional as F

from pipeline.training.validation import ranking_metrics


def keys_of(anchors: list[int], positives: list[int]) -> torch.Tensor:
    """As `Batch.keys`: record, anchor, positive."""
    return torch.tensor([range(1, len(anchors) + 1), anchors, positives]).T


def distinct(rows: int) -> torch.Tensor:
    return keys_of([100 + i for i in range(rows)], [500 + i for i in range(rows)])


def test_ranking_metrics_by_hand() -> None:
    anchors = torch.eye(3)
    positives = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 0.6, 0.8]])  # ranks 1, 2.5 (a tie), 2
    metrics = ranking_metrics(anchors, positives, distinct(3), scale=1.0)
    scores = anchors @ positives.T
    assert metrics["recall@1"] == pytest.approx(1 / 3)
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3.5) + 1 / math.log2(3)) / 3)
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(scores, torch.arange(3))))


def test_vectors_that_are_all_alike_score_badly() -> None:
    alike = torch.ones(100, 4) / 2
    assert ranking_metrics(alike, alike, distinct(100), scale=20.0)["ndcg@10"] == 0


def test_vectors_that_are_no_numbers_score_nothing() -> None:
    vectors = torch.full((20, 4), torch.nan)
    assert ranking_metrics(vectors, vectors, distinct(20), scale=20.0)["ndcg@10"] == 0


@pytest.mark.parametrize("questions", [1, 2, 16, 100])
def test_a_perfect_model_with_many_questions_for_each_passage(questions: int) -> None:
    passages = torch.randn(15, 32, generator=torch.Generator().manual_seed(0)).repeat_interleave(questions, dim=0)
    passage_keys = [900 + i // questions for i in range(len(passages))]
    keys = keys_of([10_000 + i for i in range(len(passages))], passage_keys)
    metrics = ranking_metrics(passages, passages, keys, scale=100.0)
    assert (metrics["ndcg@10"], metrics["recall@1"]) == (1.0, 1.0)
    by_passage = F.normalize(passages[::questions], dim=-1)
    expected = F.cross_entropy(by_passage @ by_passage.T * 100, torch.arange(15))
    assert metrics["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_questions_and_passages_that_occur_several_times() -> None:
    """trec_eval's measures, and the loss of each row with its anchor's other positives left out."""
    chance = torch.Generator().manual_seed(1)
    questions, passages = torch.randn(40, 8, generator=chance), torch.randn(25, 8, generator=chance)
    pairs = torch.unique(torch.stack([torch.randint(40, (90,)), torch.randint(25, (90,))], dim=1), dim=0)
    pairs = pairs[torch.randperm(len(pairs), generator=chance)]
    asked, given = pairs.T.tolist()
    keys = keys_of([100 + i for i in asked], [500 + i for i in given])
    metrics = ranking_metrics(questions[asked], passages[given], keys, scale=5.0)

    scores = F.normalize(questions, dim=-1) @ F.normalize(passages, dim=-1).T
    documents = sorted(set(given))
    qrels: dict[str, dict[str, int]] = {}
    for question, passage in pairs.tolist():
        qrels.setdefault(str(question), {})[str(passage)] = 1
    ranking = {query: {str(i): float(scores[int(query), i]) for i in documents} for query in qrels}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.1"}).evaluate(ranking)
    for name, measure in (("ndcg@10", "ndcg_cut_10"), ("recall@1", "recall_1")):
        assert metrics[name] == pytest.approx(sum(one[measure] for one in found.values()) / len(found))
    losses = []
    for question, passage in pairs.tolist():
        wrong = [i for i in documents if str(i) not in qrels[str(question)]]
        losses.append(-torch.log_softmax(5 * scores[question, [passage, *wrong]], dim=0)[0])
    assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert max(map(len, qrels.values())) > 2
