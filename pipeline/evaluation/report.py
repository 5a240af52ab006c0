"""Formats evaluation scores as a table, and warns if hybrid search was worse. Does not import the metric libraries.

print(score_table(read_scores(config.run_dir)))
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline.core.console import table
from pipeline.core.path import StoragePath
from pipeline.index.search import FUSION_K

TITLES = {"spearman": "Spearman", "pearson": "Pearson", "v_measure": "V-measure", "macro_f1": "macro F1"}


def read_scores(run_dir: StoragePath) -> dict[str, Any]:
    """The scores of the run's last evaluation, as `score_tasks` returns them; empty before the first."""
    path = run_dir / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8"))["scores"] if path.is_file() else {}  # type: ignore[no-any-return]


def score_rows(scores: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield a row per task and system: the task with its counts, the system, its scores by metric."""
    for name, result in scores.items():
        counts = ", ".join(f"{value:,} {what}" for what, value in result.items() if isinstance(value, int))
        for system, values in result.items():
            if isinstance(values, dict):
                yield f"{name} ({counts})", system, values


def score_table(scores: dict[str, Any]) -> str:
    """A table of the retrieval tasks, one row per system, and a table of the other tasks."""
    rows = list(score_rows(scores))
    retrieval = [(task, system, values) for task, system, values in rows if "ndcg@10" in values]
    others = [
        (task, system, ", ".join(f"{TITLES.get(metric, metric)} {value:.4f}" for metric, value in values.items()))
        for task, system, values in rows
        if "ndcg@10" not in values
    ]
    tables = []
    if retrieval:
        cells = [(task, system, *(f"{value:.4f}" for value in values.values())) for task, system, values in retrieval]
        tables.append(table(cells, ("task", "", *retrieval[0][2])))
    if any(system.startswith("hybrid") for _, system, _ in retrieval):
        tables[0] += f"\nhybrid: the rankings of model and bm25, fused by reciprocal rank, 1 / ({FUSION_K} + rank)"
    tables += [table(others, ("task", "", "scores"))] if others else []
    return "\n\n".join(tables)


def hybrid_verdict(scores: dict[str, Any]) -> str | None:
    """A warning with the tasks on which hybrid search had a lower NDCG@10 than the model alone, or None."""
    worse = [
        f"NDCG@10 {result['hybrid']['ndcg@10']:.3f} against {result['model']['ndcg@10']:.3f} ({name})"
        for name, result in scores.items()
        if "hybrid" in result and result["hybrid"]["ndcg@10"] < result["model"]["ndcg@10"]
    ]
    if not worse:
        return None
    return f"hybrid search was worse than the model alone in this run's evaluation: {', '.join(worse)}"
