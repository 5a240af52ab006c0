"""The order of training: the same batches for any number of workers, from any step, each row once an epoch."""

from __future__ import annotations

import functools
import itertools
import operator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.feed import LocalFeed
from pipeline.data.plan import Plan, RowGroup, lanes_of

GROUPS = [40, 40, 40, 13, 40, 7]  # rows of the row groups, over two files


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    groups, first = [], 0
    for name, sizes in (("a.parquet", GROUPS[:4]), ("b.parquet", GROUPS[4:])):
        with pq.ParquetWriter(tmp_path / name, pa.schema([("id", pa.string())])) as writer:
            for index, size in enumerate(sizes):
                writer.write_table(pa.table({"id": [f"r{i}" for i in range(first, first + size)]}))
                groups.append(RowGroup(name, index, size))
                first += size
    return Plan(str(tmp_path), tuple(groups), global_batch_size=16, seed=3)


def batches(plan: Plan, world_size: int, start: int, stop: int) -> list[list[str]]:
    """Ids of each global batch, workers' shares together."""
    shares = [list(LocalFeed(plan, rank, world_size).batches(start, stop)) for rank in range(world_size)]
    return [sorted(i for share in shares for i in share[k]["id"].to_pylist()) for k in range(stop - start)]


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_same_batches_for_any_number_of_workers(plan: Plan, world_size: int) -> None:
    steps = 3 * plan.batches_per_epoch
    assert batches(plan, world_size, 0, steps) == batches(plan, 1, 0, steps)


@pytest.mark.parametrize("start", [1, 5, 10, 11, 12, 25])
def test_starting_anywhere_gives_the_same_rows_in_the_same_order(plan: Plan, start: int) -> None:
    whole = [t["id"].to_pylist() for t in LocalFeed(plan, 1, 2).batches(0, 30)]
    assert [t["id"].to_pylist() for t in LocalFeed(plan, 1, 2).batches(start, 30)] == whole[start:]


def test_each_row_at_most_once_an_epoch_and_all_but_a_batch_of_them(plan: Plan) -> None:
    n = plan.batches_per_epoch
    for epoch in range(3):
        ids = functools.reduce(operator.iadd, batches(plan, 2, epoch * n, (epoch + 1) * n), [])
        assert len(set(ids)) == len(ids) == n * 16
        assert sum(GROUPS) - len(ids) < 2 * 16
    assert batches(plan, 1, 0, n) != batches(plan, 1, n, 2 * n)


def test_another_seed_is_another_order(plan: Plan) -> None:
    other = Plan(plan.folder, plan.row_groups, plan.global_batch_size, seed=4)
    assert batches(plan, 1, 0, 5) != batches(other, 1, 0, 5)


def test_a_batch_mixes_row_groups(plan: Plan) -> None:
    """Rows of one batch come from many places: neighbours in storage seldom meet."""
    for ids in batches(plan, 1, 0, plan.batches_per_epoch):
        numbers = sorted(int(i[1:]) for i in ids)
        assert sum(b - a == 1 for a, b in itertools.pairwise(numbers)) <= 6


@pytest.mark.parametrize(("batch", "lanes"), [(256, 32), (512, 32), (96, 32), (100, 25), (7, 7), (37, 1), (1, 1)])
def test_lanes(batch: int, lanes: int) -> None:
    assert lanes_of(batch) == lanes
