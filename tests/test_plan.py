"""The order of training: the same batches for any number of workers, from any step, each row once a pass."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.data.feed import CHUNKS_A_DATASET, LocalFeed, RayFeed, training_plan
from pipeline.data.manifest import Manifest, Shard, SourceCount
from pipeline.data.plan import BatchPlan, RowGroup, lanes_of, largest_remainder

GROUPS = [40, 40, 40, 13, 40, 7]  # rows of the row groups, over two files
SOURCES = ["a", "b", "a", "c", "a", "b"]  # 120 rows of a, 47 of b, 13 of c
FIRST = dict(enumerate(np.cumsum([0, *GROUPS[:-1]]).tolist()))
WEIGHTS = (("a", 0.5), ("b", 0.2), ("c", 0.3))
EVEN = (("a", 1.0), ("b", 1.0), ("c", 1.0))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BatchPlan:
    """Row i has the id "i"; row groups have sources, which count for nothing in a plan without weights."""
    folder, groups = tmp_path_factory.mktemp("shards"), []
    for name, numbers in (("a.parquet", range(4)), ("b.parquet", range(4, 6))):
        with pq.ParquetWriter(folder / name, pa.schema([("id", pa.string())])) as writer:
            for index, number in enumerate(numbers):
                ids = range(FIRST[number], FIRST[number] + GROUPS[number])
                writer.write_table(pa.table({"id": [str(i) for i in ids]}))
                groups.append(RowGroup(name, index, GROUPS[number], SOURCES[number]))
    return BatchPlan(str(folder), tuple(groups), global_batch_size=16, seed=3)


def ids(table: pa.Table) -> list[int]:
    return [int(i) for i in table["id"].to_pylist()]


def batches(plan: BatchPlan, world_size: int, start: int, stop: int) -> list[list[int]]:
    """Ids of each global batch, workers' shares end to end."""
    shares = [list(LocalFeed(plan, rank, world_size).batches(start, stop)) for rank in range(world_size)]
    return [[i for share in shares for i in ids(share[k])] for k in range(stop - start)]


def source_of(row: int) -> str:
    return SOURCES[max(number for number, first in FIRST.items() if first <= row)]


# The order anew, one row at a time.


def stream(plan: BatchPlan, numbers: list[int], name: int, lanes: int, whole: int) -> Iterator[tuple[int, int]]:
    """Rows of these row groups without end, each with its lane."""
    for turn in itertools.count():
        order: list[int] = []
        for place in np.random.default_rng([plan.seed, turn, name, 0]).permutation(len(numbers)):
            number = numbers[place]
            inside = np.random.default_rng([plan.seed, turn, number, 1]).permutation(GROUPS[number])
            order += [FIRST[number] + int(i) for i in inside]
        long = len(order) // lanes
        cut = [order[lane * long : (lane + 1) * long] for lane in range(lanes)]
        dealt = [(lane, cut[lane][i]) for i in range(long) for lane in range(lanes)]
        dealt += [(i % lanes, order[i]) for i in range(lanes * long, len(order))]
        yield from dealt[: len(dealt) // whole * whole]


def by_lane(rows: list[tuple[int, int]]) -> list[int]:
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def oracle(plan: BatchPlan, steps: int) -> list[list[int]]:
    """A mixed plan's batches: of all sources as they come, or of each what the plan's own counts say."""
    size, epoch = plan.global_batch_size, sum(GROUPS) // plan.global_batch_size
    if plan.batching == "mixed" and not plan.weights:
        rows = stream(plan, list(range(len(GROUPS))), 0, lanes_of(size), size)
        return [by_lane([next(rows) for _ in range(size)]) for _ in range(steps)]
    names = sorted(set(SOURCES))
    of = {name: [i for i, source in enumerate(SOURCES) if source == name] for name in names}
    whole = size if plan.batching == "by_source" else 1
    streams = {name: stream(plan, of[name], i, plan.streams[i].lanes, whole) for i, name in enumerate(names)}
    if plan.batching == "by_source":
        drawn: list[int] = []
        for turn in range(steps // epoch + 1):
            numbers = np.repeat(np.arange(len(names)), plan.quotas)
            np.random.default_rng([plan.seed, turn, 0, 2]).shuffle(numbers)
            drawn += numbers.tolist()
        return [by_lane([next(streams[names[number]]) for _ in range(size)]) for number in drawn[:steps]]
    given = [Counter(map(source_of, batch)) for batch in batches(plan, 1, 0, steps)]
    return [
        [row for name in names for row in by_lane([next(streams[name]) for _ in range(counts[name])])]
        for counts in given
    ]


PLANS: list[dict[str, Any]] = [
    {},
    {"global_batch_size": 1},
    {"global_batch_size": 100},
    {"global_batch_size": 37},  # no number from 16 to 32 divides it
    {"global_batch_size": 179},
    {"batching": "by_source", "global_batch_size": 8},
    {"batching": "by_source", "global_batch_size": 13},
    {"batching": "by_source", "global_batch_size": 5, "weights": (("a", 1.0), ("b", 0.5), ("c", 3.0))},
    {"weights": (("a", 0.1), ("b", 0.2), ("c", 0.7))},
    {"weights": EVEN, "global_batch_size": 37},
    {"weights": (("a", 50.0), ("b", 1.0), ("c", 1.0)), "global_batch_size": 7},
]


@pytest.mark.parametrize("changes", PLANS, ids=str)
def test_the_order_of_brute_force_from_any_step_for_any_number_of_workers(
    plan: BatchPlan, changes: dict[str, Any]
) -> None:
    plan = replace(plan, **changes)
    plan.check_sources()
    steps = 3 * plan.batches_per_epoch + 1
    expected = oracle(plan, steps)
    assert all(len(batch) == plan.global_batch_size for batch in expected)
    chance = random.Random(0)
    for world_size in {1, 2, 3, 5, 7, plan.lanes, plan.global_batch_size}:
        if world_size <= plan.global_batch_size:
            start = chance.choice([0, chance.randrange(steps)])
            assert batches(plan, world_size, start, steps) == expected[start:]


def test_the_order_of_mixed_batches_is_what_it_was(plan: BatchPlan) -> None:
    """Literal ids of the first plan of this project; runs that began with it go on with it."""
    n = plan.batches_per_epoch
    assert n == 11
    found = {k: batches(plan, 1, k, k + 1)[0] for k in (0, n - 1, n)}
    assert found[0] == [97, 93, 112, 105, 178, 154, 151, 162, 78, 63, 75, 72, 121, 23, 33, 16]
    assert found[n - 1] == [85, 87, 106, 175, 166, 134, 133, 69, 42, 57, 46, 129, 12, 37, 9, 34]
    assert found[n] == [56, 64, 63, 77, 107, 80, 86, 87, 14, 37, 0, 134, 144, 152, 160, 177]


def test_shares_differ_by_a_row_at_most_and_are_what_is_read(plan: BatchPlan) -> None:
    for world_size in (1, 2, 3, 5, 7, 16):
        plan.check_workers(world_size)
        shares = [plan.share(rank, world_size) for rank in range(world_size)]
        assert sum(shares) == 16
        assert max(shares) - min(shares) <= 1
        tables = [plan.read(3, 5, rank, world_size) for rank in range(world_size)]
        assert [table["step"].to_pylist() for table in tables] == [[3] * n + [4] * n for n in shares]
    for world_size in (0, 17):
        with pytest.raises(ConfigError, match=f"found {world_size}; use 1 to 16, .*=16"):
            plan.check_workers(world_size)


def test_a_worker_reads_little_more_than_its_share(plan: BatchPlan) -> None:
    """Neighbours share the row groups at their border alone."""
    for world_size in (2, 3):
        read = [len(plan.select(0, plan.batches_per_epoch, rank, world_size).groups) for rank in range(world_size)]
        assert sum(read) <= len(GROUPS) + world_size - 1


def test_each_row_at_most_once_an_epoch_and_all_but_a_batch_of_them(plan: BatchPlan) -> None:
    n = plan.batches_per_epoch
    for epoch in range(3):
        rows = list(itertools.chain(*batches(plan, 2, epoch * n, (epoch + 1) * n)))
        assert len(set(rows)) == len(rows) == n * 16
        assert sum(GROUPS) - len(rows) < 16
    first = batches(plan, 1, 0, n)
    assert first != batches(plan, 1, n, 2 * n)
    assert first[:5] != batches(replace(plan, seed=4), 1, 0, 5)


def test_a_batch_mixes_row_groups(plan: BatchPlan) -> None:
    """Rows of one batch come from many places: neighbours in storage seldom meet."""
    for size in (16, 37):
        mixed = replace(plan, global_batch_size=size)
        for rows in batches(mixed, 1, 0, mixed.batches_per_epoch):
            assert sum(b - a == 1 for a, b in itertools.pairwise(sorted(rows))) <= size // 2 - 2


def test_lanes() -> None:
    expected = {1: 1, 7: 7, 37: 32, 96: 32, 100: 25, 254: 32, 256: 32, 2048: 32, 4096: 64, 16384: 256}
    assert {batch: lanes_of(batch) for batch in expected} == expected


@pytest.mark.parametrize(("weights", "quotas"), [((), (15, 6, 1)), (WEIGHTS, (11, 4, 7)), (EVEN, (8, 7, 7))])
def test_batches_of_one_source_in_exact_proportion(
    plan: BatchPlan, weights: tuple[tuple[str, float], ...], quotas: tuple[int, ...]
) -> None:
    """22 batches an epoch: by rows 120, 47 and 13 of 180; else by weight; what is left over to the largest rests."""
    plan = replace(plan, batching="by_source", global_batch_size=8, weights=weights)
    plan.check_sources()
    n, orders = plan.batches_per_epoch, set()
    for epoch in range(3):
        rows = batches(plan, 1, epoch * n, (epoch + 1) * n)
        assert all(len(set(map(source_of, batch))) == 1 and len(set(batch)) == 8 for batch in rows)
        orders.add(order := "".join(source_of(batch[0]) for batch in rows))
        assert tuple(order.count(name) for name in "abc") == quotas
    assert len(orders) == 3


def test_a_source_is_gone_through_whole_before_any_row_comes_again(plan: BatchPlan) -> None:
    plan = replace(plan, batching="by_source", global_batch_size=4, weights=WEIGHTS)
    n = plan.batches_per_epoch
    rows: list[int] = [row for batch in batches(plan, 1, 0, 2 * n) for row in batch if source_of(row) == "c"]
    assert len(rows) == 2 * plan.quotas[2] * 4
    passes = [rows[i : i + 12] for i in range(0, len(rows), 12)]  # 3 batches of the 13 rows
    assert all(len(set(some)) == len(some) for some in passes)
    assert passes[0] != passes[1]
    assert set(rows) == {i for i in range(sum(GROUPS)) if source_of(i) == "c"}


def test_a_mixed_batch_has_of_each_source_its_share(plan: BatchPlan) -> None:
    """Rounded down or up, and over any number of batches from the first on within two rows of the exact share."""
    for size in (7, 10, 16, 30):
        mixed = replace(plan, global_batch_size=size, weights=WEIGHTS)
        mixed.check_sources()
        counts = [Counter(map(source_of, batch)) for batch in batches(mixed, 1, 0, mixed.batches_per_epoch)]
        for name, weight in WEIGHTS:
            exact, given = size * weight, [count[name] for count in counts]
            assert all(exact - 1 < n < exact + 1 for n in given)
            assert all(abs(total - k * exact) < 2 for k, total in enumerate(itertools.accumulate(given), 1))


def test_weights_that_are_those_of_the_rows_give_each_row_once_an_epoch(plan: BatchPlan) -> None:
    plan = replace(plan, global_batch_size=18, weights=(("a", 120.0), ("b", 47.0), ("c", 13.0)))
    rows = list(itertools.chain(*batches(plan, 2, 0, 10)))
    assert plan.batches_per_epoch == 10
    assert len(set(rows)) >= 178  # what an epoch of 18 * 47 / 180 rows a batch rounds


def heavy(weight: float, **changes: Any) -> dict[str, Any]:
    return {"weights": (("a", 1.0), ("b", 1.0), ("c", weight)), **changes}


def test_shares_that_cannot_be_kept_are_refused(plan: BatchPlan) -> None:
    too_few = "found 13 training records of c, but each batch takes 14"
    for changes, message in (
        ({"batching": "by_source", "global_batch_size": 13}, None),
        ({"batching": "by_source", "global_batch_size": 14}, too_few),
        (heavy(2.0, global_batch_size=26), None),
        (heavy(2.0, global_batch_size=27), too_few),
        (
            heavy(0.01, batching="by_source", global_batch_size=8),
            r"found c with 0\.005 of the weights, too little for one of the 22 batches",
        ),
        ({"weights": (*WEIGHTS, ("d", 1.0))}, "found a weight for d, which has no training records"),
    ):
        with pytest.raises(ConfigError, match=message) if message else nullcontext():
            replace(plan, **changes).check_sources()


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(10, [Fraction(1, 3)] * 3) == (4, 3, 3)
    assert largest_remainder(7, [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]) == (4, 2, 1)
    assert largest_remainder(0, [Fraction(1)]) == (0,)


def manifest_of(plan: BatchPlan, weights: dict[str, float | None]) -> Manifest:
    """What prepare writes beside these row groups, and one without a row."""
    shards = []
    for path in ("a.parquet", "b.parquet"):
        groups = [group for group in plan.row_groups if group.path == path]
        rows, names = [group.rows for group in groups], [group.source for group in groups]
        groups_of = {"row_groups": [*rows, 0], "row_group_sources": [*names, "a"]}
        shards.append(Shard(path, "train", sum(rows), **groups_of, sha256=""))
    sources = [SourceCount(name, 0, 0, {}, weight) for name, weight in weights.items()]
    return Manifest("f", sources, {"train": 180, "validation": 2}, shards, {}, [], {})


def test_a_manifest_s_plan(plan: BatchPlan) -> None:
    folder = Path(plan.folder)
    as_they_come = training_plan(folder, manifest_of(plan, {"a": None, "b": None, "c": None}), 16, 3)
    assert as_they_come == plan
    assert training_plan(folder, manifest_of(plan, dict(WEIGHTS)), 8, 3, "by_source") == replace(
        plan, global_batch_size=8, batching="by_source", weights=WEIGHTS
    )
    with pytest.raises(ConfigError, match="but each batch takes 16"):
        training_plan(folder, manifest_of(plan, dict(WEIGHTS)), 16, 3, "by_source")
    assert training_plan(folder, manifest_of(plan, {}), 181, 3).global_batch_size == 45  # four batches of 180 records


@pytest.mark.usefixtures("ray_cluster")
def test_rows_through_ray_data_are_those_read_here(plan: BatchPlan) -> None:
    """Over several reads, datasets and epochs; left in the midst, no thread stays."""
    plan = replace(plan, weights=WEIGHTS, global_batch_size=100)
    feeds = RayFeed(plan, 1, 3), LocalFeed(plan, 1, 3)
    here, there = (list(feed.batches(2, 8)) for feed in feeds)
    assert len(plan.chunks(2, 8)) > CHUNKS_A_DATASET
    assert [table.to_pydict() for table in here] == [table.to_pydict() for table in there]
    some = feeds[0].batches(0, 8)
    next(some)
    some.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]
