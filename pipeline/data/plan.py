"""Which rows make up global batch k of epoch e: a function of the seed and the shards, and of nothing else.

An epoch permutes the row groups, and the rows inside each, by (seed, epoch). The resulting order of N rows is cut into
L lanes of N // L rows, and batch k takes the next B / L rows of every lane. A worker serves the lanes r, r + W, …, so
that it reads only its own share, and the same records meet in batch k whatever W is. A position is one integer, the
step; seeking costs nothing.

    B = 4, L = 2, N = 10 rows in epoch order:   lane 0: a b c d e     lane 1: f g h i j
    batch 0 = a b | f g      batch 1 = c d | h i      (e and j sit this epoch out)
    with two workers, worker 0 trains on a b then c d, worker 1 on f g then h i
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAX_LANES = 32


def lanes_of(global_batch_size: int) -> int:
    """The largest number of lanes up to MAX_LANES that deals a batch evenly."""
    return max(lanes for lanes in range(1, MAX_LANES + 1) if global_batch_size % lanes == 0)


@dataclass(frozen=True)
class RowGroup:
    path: str
    index: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """The order of a training run over a prepared split."""

    folder: str
    row_groups: tuple[RowGroup, ...]
    global_batch_size: int
    seed: int

    @property
    def lanes(self) -> int:
        return lanes_of(self.global_batch_size)

    @cached_property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def rows_per_lane(self) -> int:
        return self.rows // self.lanes

    @property
    def batches_per_epoch(self) -> int:
        return self.rows_per_lane // (self.global_batch_size // self.lanes)

    @property
    def steps_per_chunk(self) -> int:
        """Steps read at once: about as many as one row group feeds a lane."""
        return max(1, max(group.rows for group in self.row_groups) // (self.global_batch_size // self.lanes))

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Steps `start` to `stop` cut into reads that do not cross an epoch."""
        bounds = [start]
        while bounds[-1] < stop:
            epoch_end = (bounds[-1] // self.batches_per_epoch + 1) * self.batches_per_epoch
            bounds.append(min(bounds[-1] + self.steps_per_chunk, epoch_end, stop))
        return list(itertools.pairwise(bounds))

    def read(self, start: int, stop: int, rank: int, world_size: int) -> pa.Table:
        """This worker's rows of steps `start` to `stop` (one epoch), in training order, with a `step` column."""
        epoch, first = divmod(start, self.batches_per_epoch)
        steps, share = stop - start, self.global_batch_size // self.lanes
        order, offsets = _epoch_order(self, epoch)
        read_group = lru_cache(maxsize=None)(lambda position: self._shuffled(order[position], epoch))
        lanes = []
        for lane in range(rank, self.lanes, world_size):
            begin = lane * self.rows_per_lane + first * share
            lanes.append(_rows(read_group, offsets, begin, begin + steps * share))
        table = pa.concat_tables(lanes)
        by_step = np.arange(len(table)).reshape(len(lanes), steps, share).transpose(1, 0, 2).ravel()
        step = np.repeat(np.arange(start, stop), len(lanes) * share)
        return table.take(by_step).append_column("step", pa.array(step))

    def _shuffled(self, index: int, epoch: int) -> pa.Table:
        group = self.row_groups[index]
        table = pq.ParquetFile(Path(self.folder) / group.path).read_row_group(group.index)
        return table.take(np.random.default_rng([self.seed, epoch, index, 1]).permutation(group.rows))


@lru_cache(maxsize=4)
def _epoch_order(plan: Plan, epoch: int) -> tuple[Sequence[int], np.ndarray]:
    """The epoch's row groups in order, and the row at which each begins (and the last ends)."""
    order = np.random.default_rng([plan.seed, epoch, 0, 0]).permutation(len(plan.row_groups))
    rows = np.array([plan.row_groups[i].rows for i in order])
    return order.tolist(), np.concatenate([[0], rows.cumsum()])


def _rows(read_group, offsets: np.ndarray, begin: int, end: int) -> pa.Table:  # type: ignore[no-untyped-def]
    """Rows `begin` to `end` of the epoch's order."""
    first, last = np.searchsorted(offsets, [begin, end - 1], side="right") - 1
    parts = []
    for position in range(first, last + 1):
        start = max(begin, offsets[position])
        parts.append(read_group(position).slice(start - offsets[position], min(end, offsets[position + 1]) - start))
    return pa.concat_tables(parts)
