"""The training feed: this worker's share of every global batch, in the plan's order, read ahead by Ray Data.

    for batch in RayFeed(plan, rank=0, world_size=2).batches(start=1200, stop=1400): ...   # a table of a step's rows

A feed can start at any step; that costs the opening of its first row groups. The dataset is created in the worker, with
a read task for each run of steps and in order, so a restarted worker begins at its checkpoint's step.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.core.artifact import open_parquet
from pipeline.core.path import StoragePath
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Plan, RowGroup

if TYPE_CHECKING:
    from ray.data import Dataset

READ_AHEAD_BATCHES = 2
CHUNKS_A_DATASET = 4
"""Reads of one dataset, few enough to run all at once.

NOTE: while reads wait for room, Ray Data's executor polls in a thread of the training worker and holds the interpreter:
one dataset for a whole run halved the training speed (seen with py-spy, Ray 2.60).
"""
MIN_VALIDATION = 2  # with one pair there is nothing to tell it from


def training_plan(
    folder: StoragePath,
    manifest: Manifest,
    global_batch_size: int,
    seed: int,
    batching: Literal["mixed", "by_source"] = "mixed",
) -> Plan:
    """The plan of a prepared data set's training split, with its sources' weights.

    Raises ConfigError if a split is too small, or a source is too small for its share.
    """
    groups = tuple(
        RowGroup(shard.path, index, rows, source)
        for shard in manifest.of_split("train")
        for index, (rows, source) in enumerate(zip(shard.row_groups, shard.row_group_sources, strict=True))
        if rows
    )
    weights = tuple((source.name, source.weight) for source in manifest.sources if source.weight is not None)
    plan = Plan(str(folder), groups, global_batch_size, seed, batching, weights)
    if plan.batches_per_epoch == 0:
        raise ConfigError(
            f"training.global_batch_size: found {global_batch_size}; "
            f"allowed is at most the {plan.rows} records of the training split"
        )
    plan.check_sources()
    if manifest.splits["validation"] < MIN_VALIDATION:
        raise ConfigError(
            f"data.validation_fraction: it holds out {manifest.splits['validation']} of "
            f"{sum(manifest.splits.values())} records; allowed is a share that holds out {MIN_VALIDATION} or more"
        )
    return plan


@dataclass(frozen=True)
class LocalFeed:
    """The feed without Ray: reads on demand."""

    plan: Plan
    rank: int = 0
    world_size: int = 1

    def batches(self, start: int, stop: int) -> Generator[pa.Table]:
        for first, last in self.plan.chunks(start, stop):
            yield from _cut(self.plan.read(first, last, self.rank, self.world_size))


@dataclass(frozen=True)
class RayFeed:
    """The feed through Ray Data: read tasks run ahead of training, anywhere in the cluster."""

    plan: Plan
    rank: int
    world_size: int

    def batches(self, start: int, stop: int) -> Generator[pa.Table]:
        with closing(_one_ahead(self._tables(start, stop))) as tables:
            for table in tables:
                yield from _cut(table)

    def _tables(self, start: int, stop: int) -> Generator[pa.Table]:
        """A table of several steps' rows for each read, from consecutive datasets."""
        chunks = self.plan.chunks(start, stop)
        for first in range(0, len(chunks), CHUNKS_A_DATASET):
            yield from self._dataset(chunks[first : first + CHUNKS_A_DATASET]).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=READ_AHEAD_BATCHES
            )

    def _dataset(self, chunks: list[tuple[int, int]]) -> Dataset:
        import ray.data

        selections = [self.plan.select(first, last, self.rank, self.world_size) for first, last in chunks]

        def read(batch: dict[str, Any]) -> pa.Table:
            return selections[int(batch["id"][0])].read()

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        indices = ray.data.range(len(chunks), override_num_blocks=len(chunks))
        return indices.map_batches(read, batch_size=1, num_cpus=0.5)


def _one_ahead(tables: Generator[pa.Table]) -> Generator[pa.Table]:
    """The same tables, fetching the next one while one is used: a dataset takes about a second to start."""
    with closing(tables), ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        coming = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table


def _cut(table: pa.Table) -> Iterator[pa.Table]:
    """Cut a table of several steps' rows into one batch a step."""
    table = table.combine_chunks()
    steps = table["step"].to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    for start, stop in itertools.pairwise(bounds):
        yield table.slice(start, stop - start)


def validation_rows(folder: StoragePath, manifest: Manifest, limit: int) -> pa.Table:
    """The first `limit` rows of the validation split, whose canonical order is random."""
    tables = []
    for shard in manifest.of_split("validation"):
        tables.append(open_parquet(folder / shard.path).read())
        if sum(map(len, tables)) >= limit:
            break
    return pa.concat_tables(tables).slice(0, limit)
