"""Semantic textual similarity: a TSV of `score`, `sentence1`, `sentence2` under a header, and two correlations.

task = read_sts(Path("sts_b/test.tsv"))           # StsTask(name='test', first=[…], second=[…], scores=[…])
spearman(task.scores, cosines)                    # 0.8203
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.config import ConfigError
from pipeline.evaluate.tsv import read_tsv
from pipeline.storage.path import StoragePath

COLUMNS = ("score", "sentence1", "sentence2")


@dataclass(frozen=True)
class StsTask:
    """Pairs of sentences, and how alike people find them."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def read_sts(path: StoragePath) -> StsTask:
    """Read a file. Raises ConfigError naming the line that is not as it should be."""
    task = StsTask(path.stem, [], [], [])

    def take(cells: list[str]) -> None:
        score, first, second = cells
        if not math.isfinite(float(score)):
            raise ValueError(f"{score} is no score")
        task.scores.append(float(score))
        task.first.append(first)
        task.second.append(second)

    read_tsv(path, COLUMNS, "evaluation.sts_file", take)
    if len(set(task.scores)) < 2:
        raise ConfigError(f"evaluation.sts_file: {path} has fewer than two scores to tell apart; allowed are more")
    return task


def spearman(scores: list[float], cosines: list[float]) -> float:
    """Spearman's rank correlation, from -1 to 1; 0 where all cosines are alike or one is not a number."""
    from scipy.stats import spearmanr  # half a second, which a check of the file need not pay

    return _correlation(spearmanr, scores, cosines)


def pearson(scores: list[float], cosines: list[float]) -> float:
    """Pearson's linear correlation, from -1 to 1; 0 where all cosines are alike or one is not a number."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, scores, cosines)


def _correlation(of: Any, scores: list[float], cosines: list[float]) -> float:
    if len(set(cosines)) < 2 or not all(map(math.isfinite, cosines)):
        return 0.0
    return float(of(scores, cosines).statistic)
