"""Semantic textual similarity: a TSV of `score`, `sentence1`, `sentence2` under a header, and Spearman's correlation.

task = read_sts(Path("sts_b/test.tsv"))           # StsTask(name='test', first=[…], second=[…], scores=[…])
spearman(task.scores, cosines)                    # 0.8203
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError

COLUMNS = ["score", "sentence1", "sentence2"]


@dataclass(frozen=True)
class StsTask:
    """Pairs of sentences, and how alike people find them."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def read_sts(path: Path) -> StsTask:
    """Read a file. Raises ConfigError naming the line that is not as it should be."""
    task = StsTask(path.stem, [], [], [])
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if next(rows, None) != COLUMNS:
                raise ValueError(f"a header of {', '.join(COLUMNS)} is wanted")
            for score, first, second in rows:
                if not math.isfinite(float(score)):
                    raise ValueError(f"{score} is no score")
                task.scores.append(float(score))
                task.first.append(first)
                task.second.append(second)
    except OSError as error:
        raise ConfigError(
            f"evaluation.sts_file: {path}: {error.strerror}; allowed is a TSV of {', '.join(COLUMNS)}"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"evaluation.sts_file: {path} line {rows.line_num}: {error}; allowed are rows of {', '.join(COLUMNS)}"
        ) from None
    if len(set(task.scores)) < 2:
        raise ConfigError(f"evaluation.sts_file: {path} has fewer than two scores to tell apart; allowed are more")
    return task


def spearman(scores: list[float], cosines: list[float]) -> float:
    """Spearman's rank correlation, from -1 to 1; 0 where all cosines are alike or one is not a number."""
    from scipy.stats import spearmanr  # half a second, which a check of the file need not pay

    value = float(spearmanr(scores, cosines).statistic) if len(set(cosines)) > 1 else 0.0
    return value if math.isfinite(value) else 0.0
