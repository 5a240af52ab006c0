"""Feeds a worker its rows of every global batch, in the plan's order, read ahead by Ray Data.

    for batch in RayFeed(plan, rank=0, world_size=2).batches(start=1200, stop=1400): ...   # the rows of a step

A feed can start at any step, at the cost of opening the first row groups, so a restarted worker begins at its
checkpoint's step. Each worker creates its own datasets, with one read task for several consecutive steps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.config import Config, ConfigError
from pipeline.core.artifact import open_parquet
from pipeline.core.console import log
from pipeline.core.files import sorted_glob
from pipeline.core.path import StoragePath, as_path
from pipeline.data.manifest import SPLITS, Manifest
from pipeline.data.partitions import MIN_VALIDATION
from pipeline.data.plan import BatchPlan, RowGroup, with_columns

if TYPE_CHECKING:
    from ray.data import Dataset

READ_AHEAD_BATCHES = 2
CHUNKS_A_DATASET = 4
"""Reads per dataset, few enough to all run at once.

NOTE: while reads wait for room, Ray Data's executor polls in a thread of the training worker and holds the interpreter
lock: one dataset for a whole run halved training speed (py-spy, Ray 2.60).
"""
FEW_PAIRS = 3_000  # below, fine-tuned MiniLM beats a token table. Ours, measured (README)
SAMPLED_RECORDS = 10_000
MANY_EQUAL_PAIRS = 0.5  # two labels that are equally frequent are not above it. Ours
MIN_BATCH = 2  # a single pair has no negatives
MIN_EPOCH_BATCHES = 4  # of records that are fewer than a batch: smaller batches, but several steps an epoch. Ours


def training_plan(
    folder: StoragePath,
    manifest: Manifest,
    global_batch_size: int,
    seed: int,
    batching: Literal["mixed", "by_source"] = "mixed",
) -> BatchPlan:
    """The batch plan of a prepared data set's training split, with its sources' weights.

    A batch of more records than the split has is made smaller. Raises ConfigError if a split, or a source for its
    share, is too small.
    """
    groups = tuple(
        RowGroup(shard.path, index, rows, source)
        for shard in manifest.of_split("train")
        for index, (rows, source) in enumerate(zip(shard.row_groups, shard.row_group_sources, strict=True))
        if rows
    )
    weights = tuple((source.name, source.weight) for source in manifest.sources if source.weight is not None)
    rows, held_out = (manifest.splits[split] for split in SPLITS)
    if rows + held_out < 2 * MIN_VALIDATION:
        raise ConfigError(f"data.sources: found {rows + held_out} records; training needs {2 * MIN_VALIDATION} or more")
    if held_out < MIN_VALIDATION:
        raise ConfigError(
            f"data.validation_fraction: holds out {held_out} of {rows + held_out} records; raise it to hold out at "
            f"least {MIN_VALIDATION}, as in data.validation_fraction={min(0.4, 10 / (rows + held_out)):.1g}"
        )
    if rows < MIN_BATCH:
        raise ConfigError(
            f"data.validation_fraction: leaves {rows} of {rows + held_out} records to train on; lower it, as in "
            "data.validation_fraction=0.1"
        )
    size = global_batch_size if rows >= global_batch_size else max(MIN_BATCH, rows // MIN_EPOCH_BATCHES)
    teacher = manifest.teacher.folder if manifest.teacher else None
    plan = BatchPlan(str(folder), groups, size, seed, batching, weights, teacher)
    plan.check_sources()
    return plan


def warn_of_equal_positives(config: Config, folder: StoragePath, manifest: Manifest) -> None:
    """Warn if most records have the same positive, judged by the first records, which are a random sample.

    The contrastive objective learns from the wrong answers in a batch, and equal positives are none to each other. With
    batches `by_source`, each source is judged. Hard negatives are wrong answers too, so with them nothing is said.
    """
    contrastive, by_source = config.objective.contrastive, config.training.batching == "by_source"
    if not contrastive or not manifest.holds_pairs:
        return
    if contrastive.views == "given" and contrastive.hard_negatives and "negatives" in manifest.text_fields:
        return
    counts: dict[str, Counter[int]] = {}
    for source, positive in itertools.islice(_positives(folder), SAMPLED_RECORDS):
        of = f" of source {source}" if by_source else ""
        counts.setdefault(of, Counter())[hash(positive)] += 1
    for of, positives in counts.items():
        rows = positives.total()
        equal = sum(count * (count - 1) for count in positives.values()) / max(rows * (rows - 1), 1)
        if equal == 1:
            log.warning(
                "train: all positives%s are one text, so nothing can be learnt from them; check the field `positive` "
                "in data.sources",
                of,
            )
        elif equal > MANY_EQUAL_PAIRS:
            log.warning(
                "train: two records%s have the same positive in %.0f%% of all cases, and nothing can be learnt from "
                "such a pair; check the field `positive` in data.sources",
                of,
                100 * equal,
            )


def _positives(folder: StoragePath) -> Iterator[tuple[str, str]]:
    """The source and positive of each record."""
    for path in sorted_glob(folder / "records", "*.parquet"):
        for batch in open_parquet(path).iter_batches(1024, columns=["source", "positive"]):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


@dataclass(frozen=True)
class LocalFeed:
    """A feed without Ray, which reads on demand."""

    plan: BatchPlan
    rank: int = 0
    world_size: int = 1

    def batches(self, start: int, stop: int) -> Generator[pa.Table]:
        for first, last in self.plan.chunks(start, stop):
            yield from _cut(self.plan.read(first, last, self.rank, self.world_size))


@dataclass(frozen=True)
class RayFeed:
    """A feed through Ray Data: read tasks run ahead of training, on any node."""

    plan: BatchPlan
    rank: int
    world_size: int

    def batches(self, start: int, stop: int) -> Generator[pa.Table]:
        with closing(_one_ahead(self._tables(start, stop))) as tables:
            for table in tables:
                yield from _cut(table)

    def _tables(self, start: int, stop: int) -> Generator[pa.Table]:
        """One table per read, with the rows of several steps, from consecutive datasets."""
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
    """Prefetch the next table while the current one is used, because a dataset takes about a second to start."""
    with closing(tables), ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        upcoming = thread.submit(next, tables, None)
        while (table := upcoming.result()) is not None:
            upcoming = thread.submit(next, tables, None)
            yield table


def _cut(table: pa.Table) -> Iterator[pa.Table]:
    """Split a table of several steps into one table per step."""
    table = table.combine_chunks()
    steps = table["step"].to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    for start, stop in itertools.pairwise(bounds):
        yield table.slice(start, stop - start)


def validation_rows(folder: StoragePath, manifest: Manifest, limit: int) -> pa.Table:
    """The first `limit` rows of the validation split, which is stored in random order."""
    folders = [folder, *([as_path(manifest.teacher.folder)] if manifest.teacher else [])]
    tables = []
    for shard in manifest.of_split("validation"):
        tables.append(with_columns(*(open_parquet(each / shard.path).read() for each in folders)))
        if sum(map(len, tables)) >= limit:
            break
    return pa.concat_tables(tables).slice(0, limit)
