"""Sentence pairs, correlations, BLEU and ROUGE on cases computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.model.scores import generation_metrics, pearson, read_sts, spearman

HEADER = "score\tsentence1\tsentence2\n"


def test_sts(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text(f'{HEADER}1.5\ta "quoted\tb\n3\tc\td\n')
    task = read_sts(file)
    assert (task.name, task.first, task.second, task.scores) == ("pairs", ['a "quoted', "c"], ["b", "d"], [1.5, 3.0])
    assert spearman([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 2], [0.5, 0.5]) == 0
    assert spearman([1, 2, 3], [0.1, math.nan, 0.2]) == 0
    assert pearson([1, 2, 3], [0.2, 0.4, 0.9]) == pytest.approx(0.7 / math.sqrt(2 * 0.26), abs=1e-6)
    assert pearson([1, 2], [0.5, 0.5]) == pearson([1, 2], [0.5, math.inf]) == 0


@pytest.mark.parametrize("content", ["\ufeff{}", "{}\n\n", "\ufeff{}\r\n"])
def test_files_as_editors_leave_them(content: str, tmp_path: Path) -> None:
    rows = content.format(f"{HEADER}1\ta\tb\n2\tc\td\n")
    for name, text in {"unix.tsv": rows, "windows.tsv": rows.replace("\n", "\r\n")}.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_sts(tmp_path / name).first == ["a", "c"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a\tb\tc\n", "line 1: the header must be score, sentence1, sentence2"),
        ("", "the header must be score, sentence1, sentence2"),
        (f"{HEADER}x\ta\tb\n", "line 2: could not convert"),
        (f"{HEADER}1\ta\tb\n2\ta\n", "line 3: not enough values"),
        (f"{HEADER}nan\ta\tb\n", "line 2: nan is not a finite score"),
        (f"{HEADER}1\ta\tb\n1\tc\td\n", "fewer than two distinct scores"),
    ],
)
def test_files_of_pairs_that_are_none(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text(content)
    with pytest.raises(ConfigError, match=f"^evaluation.sts_file: .*{sentence}"):
        read_sts(tmp_path / "pairs.tsv")


@pytest.mark.parametrize(
    ("texts", "references", "share"),
    [
        (["the cat sat on the mat", "rows are removed"], ["the cat sat on the mat", "rows are removed"], 1.0),
        (["alpha beta gamma delta"], ["one two three four"], 0.0),
        ([""], ["one two three four"], 0.0),
    ],
)
def test_all_in_common_or_nothing(texts: list[str], references: list[str], share: float) -> None:
    expected = {"bleu": 100 * share, "rouge1": share, "rouge2": share, "rougeL": share}
    assert generation_metrics(texts, references) == expected


def test_a_text_that_is_too_short() -> None:
    """All of "the cat sat on" is in the reference, which has two words more."""
    scores = generation_metrics(["the cat sat on"], ["the cat sat on the mat"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4), abs=1e-4)  # all n-grams match; brevity penalty
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6), abs=1e-4)
    assert scores["rouge2"] == pytest.approx(2 * (3 / 3) * (3 / 5) / (3 / 3 + 3 / 5), abs=1e-4)


def test_words_in_another_order_count_for_rouge1_alone() -> None:
    scores = generation_metrics(["mat the cat"], ["the cat mat"])
    assert scores["rouge1"] == 1.0
    assert scores["rouge2"] == 0.5  # "the cat", of two on each side
    assert scores["rougeL"] == pytest.approx(2 / 3, abs=1e-4)  # "the cat" again, of three words


def test_bleu_is_of_the_corpus_and_rouge_a_mean_and_stemmed() -> None:
    """BLEU counts the n-grams of both texts before it divides."""
    scores = generation_metrics(["a b c d e", "f g h i x"], ["a b c d e", "f g h y z"])
    precisions = (5 + 3) / 10, (4 + 2) / 8, (3 + 1) / 6, (2 + 0) / 4
    assert scores["bleu"] == pytest.approx(100 * math.prod(precisions) ** (1 / 4), abs=1e-4)
    assert scores["rouge1"] == pytest.approx((1 + 3 / 5) / 2, abs=1e-4)
    assert generation_metrics(["cats sitting"], ["cat sits"])["rouge1"] == 1.0


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_each_text_needs_a_reference(texts: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="need one for each"):
        generation_metrics(texts, references)
