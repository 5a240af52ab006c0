"""Says whether a model is better than another system on the same queries, by a paired bootstrap.

    compare("beir", "bm25", of_model, of_bm25).sentence
    # 'On beir the model is better than BM25: NDCG@10 0.852, and 0.818 for BM25; the difference is +0.034,
    #  95% interval +0.021 to +0.047 (2,000 queries).'

Queries are drawn with replacement 10,000 times, the same for both systems; the interval holds the middle 95% of the
mean differences. A model is better, or worse, if the interval lies on one side of zero (Koehn 2004; Sakai 2006).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

SAMPLES = 10_000
AT_ONCE = 2_000_000  # drawn queries in memory
NAMES = {"bm25": "BM25", "base": "the base", "previous": "the published model"}

ByQuery = dict[str, dict[str, dict[str, float]]]
"""Task → system → query → NDCG@10."""


@dataclass(frozen=True)
class Comparison:
    """The model beside another system on one task. `low` and `high` bound the difference of the mean NDCG@10."""

    task: str
    other: str
    queries: int
    model_ndcg: float
    other_ndcg: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.model_ndcg - self.other_ndcg

    @property
    def verdict(self) -> Literal["better", "worse", "not clearly different"]:
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not clearly different"

    @property
    def sentence(self) -> str:
        name = NAMES[self.other]
        than = "from" if self.verdict == "not clearly different" else "than"
        return (
            f"On {self.task} the model is {self.verdict} {than} {name}: NDCG@10 {self.model_ndcg:.3f}, and "
            f"{self.other_ndcg:.3f} for {name}; the difference is {self.difference:+.3f}, 95% interval {self.low:+.3f} "
            f"to {self.high:+.3f} ({self.queries:,} queries)."
        )


def compare(task: str, other: str, of_model: Mapping[str, float], of_other: Mapping[str, float]) -> Comparison:
    """Compare NDCG@10 by query; both have the same queries."""
    names = sorted(of_model)
    model, rival = (np.array([scores[name] for name in names]) for scores in (of_model, of_other))
    low, high = interval(model - rival)
    return Comparison(task, other, len(names), float(model.mean()), float(rival.mean()), low, high)


def interval(differences: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of (Q,) differences, by bootstrap."""
    chance, count = np.random.default_rng(seed), len(differences)
    rows = max(1, AT_ONCE // count)
    means = [
        differences[chance.integers(0, count, (min(rows, samples - start), count))].mean(axis=1)
        for start in range(0, samples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def comparisons(own: ByQuery, others: Mapping[str, ByQuery]) -> list[Comparison]:
    """Compare the model with BM25, if `own` has it, and with the `others`, on each task that both have."""
    found = []
    for task, systems in own.items():
        if "bm25" in systems:
            found.append(compare(task, "bm25", systems["model"], systems["bm25"]))
        found += [
            compare(task, name, systems["model"], theirs[task]["model"])
            for name, theirs in others.items()
            if task in theirs
        ]
    return found
