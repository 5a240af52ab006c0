"""What is said before training about positives that are equal, against a count of all pairs of records."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.data.feed import MANY_EQUAL_PAIRS, warn_of_equal_positives
from pipeline.data.manifest import Manifest

PAIRS = Manifest("", [], {}, [], {"anchor": {}, "positive": {}}, [], {})


def said(folder: Path, positives: list[tuple[str, str]], caplog: pytest.LogCaptureFixture, **config: Any) -> list[str]:
    """The warnings for records of these sources and positives, in two files."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((positives[:3], positives[3:])):
        rows = [{"source": source, "positive": text} for source, text in part]
        pq.write_table(pa.Table.from_pylist(rows), folder / "records" / f"{number}.parquet")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pipeline"):
        warn_of_equal_positives(Config.model_validate(config), folder, PAIRS)
    return [record.getMessage() for record in caplog.records]


def test_one_positive_for_all_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = said(tmp_path, [("a", "the label")] * 8, caplog)
    assert len(found) == 1
    assert found[0].startswith("train: all positives are one text, so nothing can be learnt from them")
    assert not said(tmp_path, [("a", f"text {i}") for i in range(8)], caplog)
    assert not said(tmp_path, [("a", "the only record")], caplog)


@pytest.mark.parametrize("other", range(1, 20))
def test_positives_of_which_most_are_equal(other: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["yes"] * 20 + ["no"] * other
    pairs = list(itertools.combinations(texts, 2))
    share = sum(a == b for a, b in pairs) / len(pairs)
    found = said(tmp_path, [("a", text) for text in texts], caplog)
    assert bool(found) == (share > MANY_EQUAL_PAIRS)
    assert all(f"the same positive in {100 * share:.0f}% of all cases" in sentence for sentence in found)


def test_batches_of_one_source_need_positives_that_differ_within_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("a", "yes"), ("b", "no")] * 4 + [("c", f"text {i}") for i in range(4)]
    assert not said(tmp_path, rows, caplog)
    found = said(tmp_path, rows, caplog, training={"batching": "by_source"})
    assert [sentence.split(" are one text")[0] for sentence in found] == [
        "train: all positives of source a",
        "train: all positives of source b",
    ]


def test_objectives_that_need_no_wrong_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("a", "the label")] * 8
    assert not said(tmp_path, rows, caplog, objective={"contrastive": None, "seq2seq": {}})
    monkeypatch.setitem(PAIRS.lengths, "negatives", {})  # hard negatives are wrong answers too
    assert not said(tmp_path, rows, caplog, objective={"contrastive": {"hard_negatives": 1}})
    assert said(tmp_path, rows, caplog, objective={"contrastive": {"hard_negatives": 0}})
