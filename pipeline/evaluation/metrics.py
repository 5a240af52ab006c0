"""Metrics for retrieval, clustering and classification; BM25 rankings, and reciprocal rank fusion.

>>> retrieval_metrics({"q": {"d1": 1}}, {"q": {"d2": 0.9, "d1": 0.8}})                  # computed by trec_eval
{'ndcg@10': 0.6309, 'mrr@10': 0.5, 'map@100': 0.5, 'recall@1': 0.0, 'recall@10': 1.0, 'recall@100': 1.0}
>>> fused({"q": {"a": 0.9, "b": 0.1}}, {"q": {"b": 7.0}})
{'q': {'b': 0.0325…, 'a': 0.0163…}}

Clustering and classification follow MTEB (Muennighoff et al. 2023, section 3.1, and its code): mini-batch k-means with
batches of 500 and one cluster per label, and the vote of the five nearest neighbours by cosine. Seeds are fixed, so
scores are reproducible. Cost: k-means holds all vectors of the file in memory; neighbours are searched in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import bm25s
import numpy as np
import pytrec_eval

from pipeline.data.beir import Qrels
from pipeline.index.search import reciprocal_ranks
from pipeline.index.vectors import Floats, TopK, nearest, unit
from pipeline.index.words import index_words

Ranking = dict[str, dict[str, float]]
"""Query id → document id → score."""

DEPTH = 100  # documents ranked for each query
CANDIDATES = DEPTH + 1  # found for each query, one of which may be the query's own document
KMEANS_BATCH, NEIGHBOURS = 500, 5
TRAINING_ROWS = 8192  # training texts per block of scores
METRICS = ("ndcg@10", "mrr@10", "map@100", "recall@1", "recall@10", "recall@100")


def retrieval_metrics(qrels: Qrels, ranking: Ranking) -> dict[str, float]:
    """Means over the queries in `qrels`; a query without results counts as zero."""
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.100", "recall.1,10,100"})
    scores = evaluator.evaluate(ranking)
    top_ten = {query: dict(_best(documents, 10)) for query, documents in ranking.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top_ten)

    results = [scores[query] | reciprocal[query] for query in scores]
    names = ("ndcg_cut_10", "recip_rank", "map_cut_100", "recall_1", "recall_10", "recall_100")
    means = (sum(result[name] for result in results) / len(qrels) for name in names)
    return dict(zip(METRICS, (round(value, 4) for value in means), strict=True))


def ndcg_by_query(qrels: Qrels, ranking: Ranking) -> dict[str, float]:
    """NDCG@10 of each query in `qrels`; zero without results."""
    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(ranking)
    return {query: scores[query]["ndcg_cut_10"] if query in scores else 0.0 for query in qrels}


def _best(scores: dict[str, float], k: int) -> list[tuple[str, float]]:
    """The k best documents in trec_eval's order: by score, then by document id, both descending."""
    return sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)[:k]


def to_ranking(query_ids: Sequence[str], found: TopK) -> Ranking:
    """Convert results, whose document ids are UTF-8 bytes, to a ranking."""
    return {
        query: {name.decode(): score for name, score in zip(ids, scores, strict=True)}
        for query, ids, scores in zip(query_ids, found.ids.tolist(), found.scores.tolist(), strict=True)
    }


def without_own_documents(ranking: Ranking, qrels: Qrels) -> Ranking:
    """The DEPTH best documents of each query, without the document whose id is the query's.

    As in BEIR: in ArguAna and Quora, queries are documents of the corpus. Such a document stays if it is relevant,
    which shows that queries and documents are numbered separately. Rankings must be in falling order of score.
    """
    return {
        query: dict(
            islice(((name, score) for name, score in found.items() if name != query or query in qrels[query]), DEPTH)
        )
        for query, found in ranking.items()
    }


def bm25_ranking(
    query_ids: list[str], queries: list[str], document_ids: list[str], documents: list[str], k: int = CANDIDATES
) -> Ranking:
    """BM25 by bm25s at its defaults (k1 1.5, b 0.75), with the words of the vector table's full-text index."""
    document_words = index_words(documents)
    if not any(document_words):
        return {query_id: {} for query_id in query_ids}
    index = bm25s.BM25()
    index.index(document_words, show_progress=False)
    rows, scores = index.retrieve(index_words(queries), k=min(k, len(documents)), show_progress=False)
    return {
        query_id: {document_ids[i]: float(score) for i, score in zip(rows[row], scores[row], strict=True) if score > 0}
        for row, query_id in enumerate(query_ids)
    }


def fused(*rankings: Ranking, depth: int = DEPTH) -> Ranking:
    """Rankings of the same queries, fused by reciprocal rank."""
    result: Ranking = {}
    for query in rankings[0]:
        ordered = ([name for name, _ in _best(ranking[query], depth)] for ranking in rankings)
        result[query] = dict(_best(reciprocal_ranks(*ordered), depth))
    return result


def v_measure(vectors: Floats, labels: list[str]) -> float:
    """Harmonic mean of the homogeneity and completeness of k-means clusters of (N, D) vectors, from 0 to 1."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    count = len(set(labels))
    clusters = MiniBatchKMeans(count, batch_size=KMEANS_BATCH, n_init="auto", random_state=0).fit_predict(vectors)
    return float(v_measure_score(labels, clusters))


def neighbour_scores(train: Floats, train_labels: list[str], test: Floats, test_labels: list[str]) -> dict[str, float]:
    """`accuracy` and `macro_f1` of k-nearest-neighbour voting; (N, D) and (M, D) vectors of any length."""
    from sklearn.metrics import accuracy_score, f1_score

    rows = (np.arange(start, min(start + TRAINING_ROWS, len(train))) for start in range(0, len(train), TRAINING_ROWS))
    blocks = ((block, unit(train[block])) for block in rows)
    neighbours = nearest(unit(test), blocks, NEIGHBOURS).ids
    names, codes = np.unique(train_labels, return_inverse=True)
    predicted = names[[np.bincount(votes).argmax() for votes in codes[neighbours]]]  # ties go to the first by name
    return {
        "accuracy": float(accuracy_score(test_labels, predicted)),
        "macro_f1": float(f1_score(test_labels, predicted, average="macro")),
    }
