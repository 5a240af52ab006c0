"""Scores shared by validation and evaluation: similarity of sentence pairs, and quality of generated texts.

>>> read_sts(Path("sts_b/test.tsv"))                      # a TSV of score, sentence1, sentence2 under a header
StsTask(name='test', first=[…], second=[…], scores=[…])
>>> spearman([1, 2, 3], [0.1, 0.3, 0.2])
0.5
>>> generation_metrics(["the cat sat on the mat"], ["the cats sat on the mat"])
{'bleu': 53.7285, 'rouge1': 1.0, 'rouge2': 1.0, 'rougeL': 1.0}

Cost: importing rouge-score takes seconds, on the first call of `generation_metrics`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.config import ConfigError
from pipeline.core.files import local_copy
from pipeline.core.path import StoragePath

ROUGE = ("rouge1", "rouge2", "rougeL")
Row = TypeVar("Row")


@dataclass(frozen=True)
class StsTask:
    """Sentence pairs with similarity scores from human raters."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def read_sts(path: StoragePath, key: str = "evaluation.sts_file") -> StsTask:
    """Sentence pairs from a TSV of `score`, `sentence1`, `sentence2` under a header; errors name the config's `key`."""

    def scored(cells: list[str]) -> tuple[float, str, str]:
        if not math.isfinite(float(cells[0])):
            raise ValueError(f"{cells[0]} is not a finite score")
        return float(cells[0]), cells[1], cells[2]

    rows = read_tsv(path, ("score", "sentence1", "sentence2"), key, scored)
    if len({score for score, _, _ in rows}) < 2:
        raise ConfigError(f"{key}: {path} has fewer than two distinct scores; give a file with more")
    scores, first, second = (list(column) for column in zip(*rows, strict=True))
    return StsTask(path.stem, first, second, scores)


def read_tsv(path: StoragePath, columns: Sequence[str], key: str, parse: Callable[[list[str]], Row]) -> list[Row]:
    """Rows of a TSV without quoting, whose header is `columns`. `parse` raises ValueError for an invalid row.

    A byte order mark and blank lines are skipped. Raises ConfigError, naming the config `key`, file and line.
    """
    names, found = ", ".join(columns), []
    try:
        with local_copy(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if next(rows, None) != list(columns):
                raise ValueError(f"the header must be {names}")
            for cells in filter(None, rows):
                if len(cells) != len(columns):
                    raise ValueError(f"{'not enough' if len(cells) < len(columns) else 'too many'} values")
                found.append(parse(cells))
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}; give a TSV of {names}") from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{key}: {path} line {rows.line_num}: {error}; each row must have {names}") from None
    return found


def spearman(scores: list[float], cosines: list[float]) -> float:
    """Spearman's rank correlation, from -1 to 1; 0 if all cosines are equal or one is not finite."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, scores, cosines)


def pearson(scores: list[float], cosines: list[float]) -> float:
    """Pearson's linear correlation, from -1 to 1; 0 if all cosines are equal or one is not finite."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, scores, cosines)


def _correlation(of: Any, scores: list[float], cosines: list[float]) -> float:
    if len(set(cosines)) < 2 or not all(map(math.isfinite, cosines)):
        return 0.0
    return float(of(scores, cosines).statistic)


def generation_metrics(hypotheses: list[str], references: list[str]) -> dict[str, float]:
    """`bleu` of all texts, 0 to 100, and mean F1 of `rouge1`, `rouge2` and `rougeL`, 0 to 1.

    BLEU is sacrebleu's with its defaults (Post 2018): cased, tokenizer 13a, and zero if no text has four words. ROUGE
    is Google's rouge-score with Porter's stemmer; words are runs of a-z and 0-9, so it suits English. Raises ValueError
    unless there are texts, with one reference each.
    """
    # Imported here, because rouge-score's nltk takes seconds and few runs need it.
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from sacrebleu import corpus_bleu

    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"found {len(hypotheses)} generated texts and {len(references)} references; need one for each")
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(hypotheses, references, strict=True)]
    rouge = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
    values = {"bleu": corpus_bleu(hypotheses, [references]).score} | rouge
    return {name: round(value, 4) for name, value in values.items()}
