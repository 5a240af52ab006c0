"""Scores as a person reads them."""

from __future__ import annotations

from typing import Any

from pipeline.runtime.console import table

TITLES = {"spearman": "Spearman", "pearson": "Pearson", "v_measure": "V-measure", "macro_f1": "macro F1"}


def score_table(scores: dict[str, Any]) -> str:
    """A line a retrieval task and system under one header; below it a line a system of every other task."""
    from pipeline.evaluation.metrics import METRICS

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
    tables += [table(others, ("task", "", "scores"))] if others else []
    return "\n\n".join(tables)
