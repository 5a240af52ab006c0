"""What a billion records are planned as: tasks and memory in bounds, and cluster/SCALING.md's arithmetic."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from benchmarks import scaling, scaling_plan
from pipeline.data.manifest import read_prepared
from pipeline.data.partitions import shard_of
from pipeline.data.prepare import MAX_SHARDS
from pipeline.data.sources import MAX_TASKS
from pipeline.index import embed
from pipeline.index.embed import MAX_FRAGMENT_ROWS, MIN_FRAGMENT_ROWS, WaveCommitter, fragment_rows
from pipeline.index.table import Fragment
from tests.conftest import progress

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
    read_bytes = sum(size for _, plan in small.plans for _, size, _ in plan.inputs)
    assert read_bytes == pytest.approx(500 * MILLION, rel=0.01)
    assert len(small.work) == -(-500 * MILLION // (4 << 20))
    (tmp_path / "large").mkdir()
    tracemalloc.reset_peak()
    large = scaling_plan.inputs_of(tmp_path / "large", BILLION)
    assert tracemalloc.get_traced_memory()[1] < 64e6
    files = len(list((tmp_path / "large" / "in").iterdir()))
    assert sum(task.bytes for _, task in large.work) == pytest.approx(500 * BILLION, rel=0.001)
    assert MAX_TASKS <= len(large.work) <= MAX_TASKS + files
    assert large.shards == MAX_SHARDS
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
    assert scaling_plan.read_empty(inputs, tmp_path, progress()) == len(inputs.work) == 120
    assert scaling_plan.look_empty(inputs, tmp_path) == inputs.shards == 60


@pytest.mark.parametrize("ranges", [1, 7, 60, 4096])
def test_ranges_of_ids_have_no_gaps_and_do_not_overlap(ranges: int, tmp_path: Path) -> None:
    """A record is in the range of its record file, wherever its id lies between the bounds or at one of them."""
    documents = scaling_plan.documents_of(tmp_path, ranges)
    bounds = [documents.bounds(index) for index in range(len(documents))]
    assert (len(bounds), bounds[0][0], bounds[-1][1]) == (ranges, "", None)
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    firsts = [first for first, _ in bounds]
    assert firsts == sorted(set(firsts))
    numbers = [*np.random.default_rng(0).integers(0, 1 << 32, 1000).tolist(), 0, (1 << 32) - 1]
    numbers += [int(first, 16) + off for first in firsts[1:] for off in (-1, 0)]
    for number in numbers:
        for row_id in (f"{number:08x}{'0' * 24}", f"{number:08x}{'f' * 24}#00002"):
            first, last = bounds[shard_of(row_id, ranges)]
            assert first <= row_id < (last or "g")


class Clocked:
    """A writer whose commits take time on a clock of its own: a part always, and a part for each fragment there."""

    def __init__(self, fixed_s: float, fragment_s: float) -> None:
        self.fixed_s, self.fragment_s, self.now, self.there = fixed_s, fragment_s, 0.0, 0

    def append(self, fragments: list[Fragment]) -> None:
        self.there += len(fragments)
        self.now += self.fixed_s + self.fragment_s * self.there


@pytest.mark.parametrize("scale", [scaling.Scale(name) for name in scaling.SCALES], ids=list(scaling.SCALES))
def test_commits_are_few_and_short_beside_the_encoding(scale: scaling.Scale) -> None:
    """The real waves, on a clock that does not wait, against the arithmetic."""
    a_fragment_s, ends = 3600 * scale.encode_hours / scale.fragments, [0.0]
    writer = Clocked(*(scaling.RATES[name].value for name in ("a commit", "a commit, a fragment there")))
    with patch.object(embed, "time", SimpleNamespace(monotonic=lambda: writer.now)):
        waves = WaveCommitter(writer)  # type: ignore[arg-type]
        for number in range(scale.fragments):
            writer.now += a_fragment_s
            held = writer.there
            waves.add([Fragment(f"{number % 7}", 1, f"{number:09}")])
            if writer.there > held:
                ends.append(writer.now)
        waves.commit()
    assert writer.there == scale.fragments
    assert waves.commit_s < 0.02 * writer.now
    commits, commit_s, last = scale.waves
    assert np.diff(ends).max() == pytest.approx(last, rel=0.1)
    assert last < max(5, 0.02 * writer.now)
    assert waves.commits == pytest.approx(commits, rel=0.02)
    assert waves.commit_s == pytest.approx(commit_s, rel=0.02)
    assert commits < 900


def test_the_page_has_what_the_code_computes() -> None:
    page = (ROOT / "cluster" / "SCALING.md").read_text()
    for heading, text in scaling.tables().items():
        assert f"## {heading}\n\n{text}\n" in page, heading


@pytest.mark.parametrize("of", ["prepare", "distinct texts"])
def test_meetings_of_the_arithmetic_are_those_of_a_draw(of: str) -> None:
    scale = scaling.Scale("1 M")
    parts = scaling.parts_at_most(scale.text_bytes, scale.read_tasks) if of == "prepare" else scale.shards
    shards = np.random.default_rng(0).integers(0, scale.shards, MILLION)
    met = np.unique(np.arange(MILLION) % parts * scale.shards + shards)
    assert scale.meetings(parts) == pytest.approx(len(met), rel=0.01)


def test_fragments_are_larger_where_there_are_many_documents() -> None:
    """So that neither a small table has files of few rows, nor a large one a manifest that no commit can write."""
    assert [fragment_rows(rows) for rows in (0, 819_200, 819_300)] == [
        MIN_FRAGMENT_ROWS,
        MIN_FRAGMENT_ROWS,
        MIN_FRAGMENT_ROWS + 1,
    ]
    assert [fragment_rows(rows) for rows in (13_107_100, 13_107_200, 100 * BILLION)] == [
        131_071,
        *[MAX_FRAGMENT_ROWS] * 2,
    ]
    assert scaling.Scale("1 G").fragments * scaling.FRAGMENT_BYTES < 1e6


def test_the_guides_prices_are_those_of_the_arithmetic() -> None:
    guide = (ROOT / "cluster" / "README.md").read_text()
    for name in ("m7i.xlarge", "c7i.4xlarge", "g6.2xlarge"):
        own = [price for key, price in scaling.PRICES.items() if key.startswith(name)]
        (row,) = re.findall(rf"^\| {re.escape(name)}.*$", guide, re.MULTILINE)
        assert [float(cell) for cell in re.findall(r"\| (\d*\.\d+) ", row)] == own
