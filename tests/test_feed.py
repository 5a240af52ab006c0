"""The batch plan of data of any size, and what is said about equal positives, against a count of all pairs."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config, ConfigError
from pipeline.data.feed import MANY_EQUAL_PAIRS, training_plan, warn_of_equal_positives
from pipeline.data.manifest import Manifest, Shard

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


def test_views_of_pairs_use_no_hard_negatives_and_texts_alone_have_no_positives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("a", "the label")] * 8
    monkeypatch.setitem(PAIRS.lengths, "negatives", {})
    assert said(tmp_path, rows, caplog, objective={"contrastive": {"views": "crops"}})
    monkeypatch.delitem(PAIRS.lengths, "anchor")
    assert not said(tmp_path, rows, caplog, objective={"contrastive": {"views": "crops"}})


def manifest(train: int, validation: int) -> Manifest:
    shard = Shard("train/00000.parquet", "train", train, [train], [None], "")
    return Manifest("f", [], {"train": train, "validation": validation}, [shard], {}, [], {})


@pytest.mark.parametrize(
    ("records", "size", "steps"),
    [(2, 2, 1), (3, 2, 1), (7, 2, 3), (8, 2, 4), (54, 13, 4), (255, 63, 4), (256, 256, 1), (600, 256, 2)],
)
def test_a_batch_is_no_larger_than_the_data(records: int, size: int, steps: int) -> None:
    plan = training_plan(Path(), manifest(records, 2), 256, seed=0)
    assert (plan.global_batch_size, plan.batches_per_epoch) == (size, steps)


@pytest.mark.parametrize(
    ("train", "validation", "advice"),
    [
        (1, 2, "data.sources: found 3 records; training needs 4 or more"),
        (0, 0, "data.sources: found 0 records"),
        (39, 1, "holds out 1 of 40 records; raise it to hold out at least 2, as in data.validation_fraction=0.2"),
        (1, 5, "leaves 1 of 6 records to train on; lower it, as in data.validation_fraction=0.1"),
    ],
)
def test_data_that_are_too_few_are_refused(train: int, validation: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        training_plan(Path(), manifest(train, validation), 256, seed=0)
