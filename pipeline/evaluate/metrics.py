"""Retrieval metrics by trec_eval's own code, and rankings: by vectors, by BM25, and by both together.

>>> retrieval_metrics({"q": {"d1": 1}}, {"q": {"d2": 0.9, "d1": 0.8}})
{'ndcg@10': 0.6309, 'mrr@10': 0.5, 'map@100': 0.5, 'recall@1': 0.0, 'recall@10': 1.0, 'recall@100': 1.0}
>>> fused({"q": {"a": 0.9, "b": 0.1}}, {"q": {"b": 7.0}})
{'q': {'b': 0.0325…, 'a': 0.0163…}}
"""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import numpy as np
import pytrec_eval

from pipeline.embedding.fusion import reciprocal_ranks
from pipeline.embedding.nearest import Found, nearest_in_block
from pipeline.embedding.words import word_settings, words

Qrels = dict[str, dict[str, int]]
"""Query id → document id → relevance, above zero where relevant."""
Ranking = dict[str, dict[str, float]]
"""Query id → document id → score."""

DEPTH = 100  # documents ranked for each query
METRICS = ("ndcg@10", "mrr@10", "map@100", "recall@1", "recall@10", "recall@100")


def retrieval_metrics(qrels: Qrels, ranking: Ranking) -> dict[str, float]:
    """Means over the queries in `qrels`; a query that found nothing counts as zero."""
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.100", "recall.1,10,100"})
    scores = evaluator.evaluate(ranking)
    first_ten = {query: dict(_best(found, 10)) for query, found in ranking.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten)

    def mean(results: dict[str, dict[str, float]], name: str) -> float:
        return sum(result[name] for result in results.values()) / len(qrels)

    values = (
        mean(scores, "ndcg_cut_10"),
        mean(reciprocal, "recip_rank"),
        mean(scores, "map_cut_100"),
        mean(scores, "recall_1"),
        mean(scores, "recall_10"),
        mean(scores, "recall_100"),
    )
    return dict(zip(METRICS, (round(value, 4) for value in values), strict=True))


def _best(found: dict[str, float], k: int) -> list[tuple[str, float]]:
    """The k best documents in trec_eval's order: by score, then by document id, both falling."""
    return sorted(found.items(), key=lambda item: (item[1], item[0]), reverse=True)[:k]


def to_ranking(query_ids: Sequence[str], found: Found) -> Ranking:
    """What was found for each query; of ids in UTF-8."""
    return {
        query: {name.decode(): score for name, score in zip(ids, scores, strict=True)}
        for query, ids, scores in zip(query_ids, found.ids.tolist(), found.scores.tolist(), strict=True)
    }


def nearest(
    query_ids: list[str], queries: np.ndarray, document_ids: list[str], documents: np.ndarray, k: int = DEPTH
) -> Ranking:
    """The k documents of highest cosine for each query, exact; unit vectors, (Q, D) and (N, D)."""
    names = np.array([name.encode() for name in document_ids])
    return to_ranking(query_ids, nearest_in_block(queries, documents, names, k))


def bm25_ranking(
    query_ids: list[str], queries: list[str], document_ids: list[str], documents: list[str], k: int = DEPTH
) -> Ranking:
    """BM25 by bm25s at its defaults (k1 1.5, b 0.75), over the words that the index of the vector table would have."""
    settings = word_settings(documents)
    found_words = words(documents, settings)
    if not any(found_words):
        return {query_id: {} for query_id in query_ids}
    index = bm25s.BM25()
    index.index(found_words, show_progress=False)
    found, scores = index.retrieve(words(queries, settings), k=min(k, len(documents)), show_progress=False)
    return {
        query_id: {document_ids[i]: float(score) for i, score in zip(found[row], scores[row], strict=True) if score > 0}
        for row, query_id in enumerate(query_ids)
    }


def fused(*rankings: Ranking, depth: int = DEPTH) -> Ranking:
    """Rankings of the same queries as one, by reciprocal rank."""
    together: Ranking = {}
    for query in rankings[0]:
        ordered = ([name for name, _ in _best(ranking[query], depth)] for ranking in rankings)
        together[query] = dict(_best(reciprocal_ranks(*ordered), depth))
    return together
