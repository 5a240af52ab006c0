"""What a billion records are planned as: tasks and memory in bounds, and cluster/SCALING.md's arithmetic."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import scaling, scaling_plan
from pipeline.data.manifest import read_prepared
from pipeline.data.prepare import MAX_SHARDS
from pipeline.embedding import ledger
from pipeline.embedding.embed import MOST_WRITE_ROWS, WRITE_ROWS, write_rows
from pipeline.sources.source import MAX_TASKS
from tests.conftest import board

ROOT = Path(__file__).parents[1]
MILLION, BILLION = 10**6, 10**9


@pytest.fixture
def traced() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_a_billion_records_are_planned_as_some_thousand_tasks(tmp_path: Path) -> None:
    """The driver's lists have an entry a task, a shard, a file: none a record."""
    small = scaling_plan.inputs_of(tmp_path, MILLION)
    assert sum(plan.total_bytes for _, plan in small.plans) == pytest.approx(500 * MILLION, rel=0.01)
    assert len(small.work) == -(-500 * MILLION // (4 << 20))
    (tmp_path / "large").mkdir()
    tracemalloc.reset_peak()
    large = scaling_plan.inputs_of(tmp_path / "large", BILLION)
    assert tracemalloc.get_traced_memory()[1] < 64e6
    files = len(list((tmp_path / "large" / "in").iterdir()))
    assert sum(task.bytes for _, task in large.work) == pytest.approx(500 * BILLION, rel=0.001)
    assert MAX_TASKS <= len(large.work) <= MAX_TASKS + files
    assert large.shards == MAX_SHARDS
    assert len(scaling_plan.spans_of(tmp_path, large.shards)) == MAX_SHARDS
    assert len(json.dumps([vars(task) for _, task in large.work])) < 1e6


@pytest.mark.usefixtures("traced")
def test_a_manifest_and_a_plan_of_training_take_what_the_page_says(tmp_path: Path) -> None:
    records = BILLION // 20
    manifest = scaling_plan.manifest_of(records, MAX_SHARDS // 20)
    groups = sum(len(shard.row_groups) for shard in manifest.of_split("train"))
    assert groups == pytest.approx(0.98 * records / 1024, rel=0.02)
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    del manifest
    before = tracemalloc.get_traced_memory()[0]
    read = read_prepared(tmp_path)
    assert read
    plan = scaling_plan.training_plan(tmp_path, read, 512, 0)
    held = (tracemalloc.get_traced_memory()[0] - before) / groups
    assert 0.5 * scaling.ROW_GROUP_BYTES < held < 1.2 * scaling.ROW_GROUP_BYTES
    chosen = plan.select(plan.batches_per_epoch - 60, plan.batches_per_epoch)
    assert (len(chosen.rows), len(chosen.groups) < 4 * plan.lanes) == (60 * 512, True)


@pytest.mark.usefixtures("ray_cluster")
def test_all_tasks_of_a_plan_go_through_ray(tmp_path: Path) -> None:
    """The simulated run of benchmarks/scaling_plan.py, of a million records."""
    inputs = scaling_plan.inputs_of(tmp_path, MILLION)
    assert scaling_plan.read_empty(inputs, tmp_path, board()) == len(inputs.work) == 120
    assert scaling_plan.look_empty(inputs, tmp_path) == inputs.shards == 60


@pytest.mark.parametrize("entries", [0, MILLION, BILLION, 100 * BILLION])
def test_the_ledger_is_gone_through_in_ranges_that_fit_in_memory(entries: int, tmp_path: Path) -> None:
    ranges: list[tuple[str, str | None]] = []
    table = SimpleNamespace(count_rows=lambda: entries)
    with patch.object(ledger.Ledger, "table", table), patch.object(ledger, "_between", lambda _, *r: ranges.append(r)):
        list(ledger.Ledger(tmp_path, "t")._parts())
    assert (ranges[0][0], ranges[-1][1]) == ("", None)
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    starts = [int(first.ljust(4, "0"), 16) for first, _ in ranges]
    widest = max(np.diff([*starts, 1 << 16])) / (1 << 16)  # ids are hashes: as many entries as it is wide
    assert widest * entries <= 1.1 * max(ledger.PART_ENTRIES, entries / (1 << 16))
    assert scaling.entries_at_once(entries) == pytest.approx(entries / len(ranges), abs=1)


def test_a_ledger_in_many_ranges_has_each_entry_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PART_ENTRIES", 7)
    ids = [os.urandom(16).hex() for _ in range(300)]
    one = ledger.Ledger(tmp_path, "t")
    one.begin()
    columns = {"id": ids, "source": ["s"] * 300, "source_id": ids, "digest": ids}
    one.note(pa.table({**columns, "parts": pa.array([1] * 300, pa.int32())}), ledger.THERE)
    one.compact()
    assert one.counts() == (300, 0)
    assert sorted(one.table.to_arrow()["id"].to_pylist()) == sorted(ids)


def test_the_page_has_what_the_code_computes() -> None:
    page = (ROOT / "cluster" / "SCALING.md").read_text()
    for heading, text in scaling.tables().items():
        assert f"## {heading}\n\n{text}\n" in page, heading


def test_sums_of_the_arithmetic_are_those_of_a_loop() -> None:
    scale = scaling.Scale("1 M")
    rates = scaling.RATES
    fixed, a_row = rates["LanceDB, a write"].value, rates["LanceDB, a write, a row there"].value
    assert scale.merge_s == pytest.approx(sum(fixed + a_row * WRITE_ROWS * i for i in range(scale.writes)), rel=0.02)
    fixed, a_fragment = rates["ledger, an entry"].value, rates["ledger, an entry, a fragment there"].value
    assert scale.ledger_s == pytest.approx(sum(fixed + a_fragment * i for i in range(2 * scale.writes)), rel=0.02)
    parts = scaling.parts_at_most(scale.text_bytes, scale.read_tasks)
    shards = np.random.default_rng(0).integers(0, scale.shards, MILLION)
    met = np.unique(np.arange(MILLION) % parts * scale.shards + shards)
    assert scale.pairs == pytest.approx(len(met), rel=0.01)


def test_writes_are_larger_where_there_are_many() -> None:
    assert [write_rows(records) for records in (0, MILLION, 81_930_000)] == [WRITE_ROWS, WRITE_ROWS, WRITE_ROWS + 1]
    assert write_rows(BILLION) == 100_000
    assert write_rows(100 * BILLION) == MOST_WRITE_ROWS


def test_the_guides_prices_are_those_of_the_arithmetic() -> None:
    guide = (ROOT / "cluster" / "README.md").read_text()
    for name in ("m7i.xlarge", "c7i.4xlarge", "g6.2xlarge"):
        own = [price for key, price in scaling.PRICES.items() if key.startswith(name)]
        (row,) = re.findall(rf"^\| {re.escape(name)}.*$", guide, re.MULTILINE)
        assert [float(cell) for cell in re.findall(r"\| (\d*\.\d+) ", row)] == own
