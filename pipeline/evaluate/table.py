"""Scores as a person reads them: as a table, and as a verdict on hybrid search."""

from __future__ import annotations

from typing import Any

from pipeline.embedding.fusion import FUSION_K
from pipeline.runtime.console import table

TITLES = {"spearman": "Spearman", "pearson": "Pearson", "v_measure": "V-measure", "macro_f1": "macro F1"}


def score_table(scores: dict[str, Any]) -> str:
    """A line a retrieval task and system under one header, and what hybrid is; then a line a system of other tasks."""
    from pipeline.evaluate.metrics import METRICS

    retrieval, others = [], []
    for name, result in scores.items():
        counts = ", ".join(f"{value:,} {what}" for what, value in result.items() if isinstance(value, int))
        for system, values in result.items():
            if not isinstance(values, dict):
                continue
            if "queries" in result:
                retrieval.append([f"{name} ({counts})", system, *(f"{values[metric]:.4f}" for metric in METRICS)])
            else:
                shown = ", ".join(f"{TITLES.get(metric, metric)} {value:.4f}" for metric, value in values.items())
                others.append([f"{name} ({counts})", system, shown])
    tables = [table(retrieval, ("task", "", *METRICS))] if retrieval else []
    if any(system.startswith("hybrid") for _, system, *_ in retrieval):
        tables[0] += f"\nhybrid: the rankings of model and bm25, fused by reciprocal rank, 1 / ({FUSION_K} + rank)"
    tables += [table(others, ("task", "", "scores"))] if others else []
    return "\n\n".join(tables)


def hybrid_verdict(scores: dict[str, Any]) -> str | None:
    """A sentence where hybrid search was worse than the model alone by NDCG@10, on each task that it was worse on.

    `scores` are those of `score_tasks`. None where it was nowhere worse, or not scored.
    """
    worse = [
        f"NDCG@10 {result['hybrid']['ndcg@10']:.3f} against {result['model']['ndcg@10']:.3f} ({name})"
        for name, result in scores.items()
        if "hybrid" in result and result["hybrid"]["ndcg@10"] < result["model"]["ndcg@10"]
    ]
    if not worse:
        return None
    return f"hybrid search was worse than the model alone in this run's evaluation: {', '.join(worse)}"
