"""Decides which rows form each global batch, as a function of only the seed and the shards.

Each pass over the rows permutes the row groups, and the rows inside each, by (seed, pass). The resulting order of N
rows is cut into L lanes of N // L rows. Batches take rows from the lanes round-robin, B at a time, and sort them by
lane. Each of W workers trains on a contiguous part of the batch, so it reads little more than its own rows, and
together the workers train on the same batch for any W. A position is one integer, the step; seeking costs nothing.

    B = 4, L = 2, N = 10 rows in the pass's order:   lane 0: a b c d e     lane 1: f g h i j
    batch 0 = a b f g      batch 1 = c d h i      (this pass skips e and j)
    with three workers, worker 0 trains on a, then c; worker 1 on b, then d; worker 2 on f g, then h i

If sources have weights, or each batch comes from one source, each source has its own lanes and passes: a small source
with a high weight is repeated several times per epoch. An epoch has N // B batches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.core.artifact import open_parquet
from pipeline.core.path import as_path

MAX_LANES = 32
MAX_ROWS_A_LANE = 64
"""Larger batches have more than MAX_LANES lanes, so that a row group of 1024 rows lasts 16 steps. Ours."""
MIN_SOURCE_LANES = 8  # a source with a small share still draws from this many row groups per batch. Ours.
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 fill the unit interval evenly (Kronecker's sequence)

Ints = npt.NDArray[np.int64]


def lanes_of(global_batch_size: int) -> int:
    """The number of lanes, at most 32 or one per 64 rows, that divides the batch size.

    The maximum if no number in the upper half of that range divides it; some lanes then give one more row than others.
    """
    most = min(global_batch_size, max(MAX_LANES, global_batch_size // MAX_ROWS_A_LANE))
    return next((lanes for lanes in range(most, most // 2 - 1, -1) if lanes and global_batch_size % lanes == 0), most)


@dataclass(frozen=True)
class RowGroup:
    path: str
    index: int
    rows: int
    source: str | None = None


@dataclass(frozen=True)
class Selection:
    """References to rows of a plan; small enough to send to another process, which reads them."""

    folder: str
    seed: int
    groups: list[tuple[RowGroup, int, int]]
    """(row group, its number in the plan, pass); the pass determines the order of its rows."""
    rows: Ints
    """Indices into the concatenated rows of `groups`."""
    steps: Ints
    """The training step of each row."""
    epoch: int = 0
    teacher: str | None = None
    """The folder of the teacher's vectors, in files of the same names, with the same row groups."""

    def read(self) -> pa.Table:
        """The rows in training order, with the columns `step` and `epoch`, and a teacher's vectors if there are any."""
        first, tables, order = 0, [], []
        folders = [as_path(folder) for folder in (self.folder, self.teacher) if folder]
        files = lru_cache(maxsize=None)(open_parquet)
        for group, number, turn in self.groups:
            parts = [files(folder / group.path).read_row_group(group.index) for folder in folders]
            tables.append(with_columns(*parts))
            order.append(first + np.random.default_rng([self.seed, turn, number, 1]).permutation(group.rows))
            first += group.rows
        table = pa.concat_tables(tables).combine_chunks().take(np.concatenate(order)[self.rows])
        columns = {"step": pa.array(self.steps), "epoch": pa.repeat(self.epoch, len(table))}
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless sequence of rows: passes over some row groups, each in a new order."""

    number: int
    groups: Ints  # (G,) numbers in the plan
    sizes: Ints  # (G,) rows of each
    lanes: int
    rows_per_pass: int

    def locate(self, turns: Ints, seed: int, pass_number: int) -> tuple[Ints, Ints]:
        """Locate the rows at these turns of one pass: each row's group, and its position in the group's order."""
        order = np.random.default_rng([seed, pass_number, self.number, 0]).permutation(len(self.groups))
        ends = self.sizes[order].cumsum()
        per_lane = ends[-1] // self.lanes
        dealt = turns % self.lanes * per_lane + turns // self.lanes
        places = np.where(turns < self.lanes * per_lane, dealt, turns)
        at = np.searchsorted(ends, places, side="right")
        return self.groups[order[at]], places - ends[at] + self.sizes[order[at]]


@dataclass(frozen=True)
class BatchPlan:
    """The order in which a training run visits a prepared split."""

    folder: str
    row_groups: tuple[RowGroup, ...]
    global_batch_size: int
    seed: int
    batching: Literal["mixed", "by_source"] = "mixed"
    weights: tuple[tuple[str, float], ...] = ()
    """Relative weights of sources. Without weights, shares are proportional to row counts."""
    teacher: str | None = None
    """See `Selection`."""

    @property
    def lanes(self) -> int:
        return lanes_of(self.global_batch_size)

    @cached_property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def batches_per_epoch(self) -> int:
        return self.rows // self.global_batch_size

    @property
    def steps_per_chunk(self) -> int:
        """Steps to read at once: about as many as one row group per lane lasts."""
        return max(1, max(group.rows for group in self.row_groups) * self.lanes // self.global_batch_size)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Split steps `start` to `stop` into reads (start, stop) that do not cross an epoch."""
        bounds = [start]
        while bounds[-1] < stop:
            epoch_end = (bounds[-1] // self.batches_per_epoch + 1) * self.batches_per_epoch
            bounds.append(min(bounds[-1] + self.steps_per_chunk, epoch_end, stop))
        return list(itertools.pairwise(bounds))

    def share(self, rank: int, world_size: int) -> int:
        """Rows of a global batch that this worker trains on; workers differ by at most one row."""
        first, last = self._bounds(rank, world_size)
        return last - first

    def check_workers(self, world_size: int) -> None:
        """Raise ConfigError if there are more workers than rows in a batch."""
        if not 1 <= world_size <= self.global_batch_size:
            raise ConfigError(
                f"scaling.num_workers: found {world_size}; use 1 to {self.global_batch_size}, one row or more per "
                f"worker of training.global_batch_size={self.global_batch_size}"
            )

    def check_sources(self) -> None:
        """Raise ConfigError if a source has too few rows or too small a share for its batches."""
        if self._as_they_come:
            return
        for unknown in dict(self.weights).keys() - self.shares.keys():
            raise ConfigError(
                f"data.sources: found a weight for {unknown}, which has no training records; remove the weight or the "
                "source"
            )
        for (name, share), stream, quota in zip(self.shares.items(), self.streams, self.quotas, strict=True):
            rows, needed = int(stream.sizes.sum()), self._rows_at_once(share)
            if rows < needed:
                raise ConfigError(
                    f"data.sources: found {rows} training records of {name}, but each batch takes {needed} with "
                    f"training.batching={self.batching}; add records, or lower the batch size or the weight"
                )
            if quota == 0:
                raise ConfigError(
                    f"data.sources: found {name} with {float(share):.2g} of the weights, too little for one of "
                    f"the {self.batches_per_epoch} batches of an epoch; raise its weight"
                )

    def read(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> pa.Table:
        """This worker's rows of steps `start` to `stop` (one epoch), in training order, with `step` and `epoch`."""
        return self.select(start, stop, rank, world_size).read()

    def select(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Selection:
        """References to the rows that `read` reads."""
        epoch, first = divmod(start, self.batches_per_epoch)
        number, starts, counts = self._draws(epoch, first, first + stop - start)
        draw, turns = np.repeat(np.arange(len(counts)), counts), _ranges(starts, counts)
        lanes, per_pass = (np.array(each)[number][draw] for each in zip(*map(_dealing, self.streams), strict=True))
        passes, turns = np.divmod(turns, per_pass)
        by_lane = np.argsort(draw * lanes.max() + turns % lanes, kind="stable")
        own = by_lane.reshape(stop - start, -1)[:, slice(*self._bounds(rank, world_size))].ravel()
        groups, rows = self._find(number[draw[own]], passes[own], turns[own])
        used, place = np.unique(passes[own] * len(self.row_groups) + groups, return_inverse=True)
        found = [
            (self.row_groups[i], i, turn) for turn, i in (divmod(key, len(self.row_groups)) for key in used.tolist())
        ]
        begin = np.cumsum([0, *(group.rows for group, _, _ in found)])
        steps = np.repeat(np.arange(start, stop), self.share(rank, world_size))
        return Selection(self.folder, self.seed, found, begin[place] + rows, steps, epoch, self.teacher)

    @cached_property
    def shares(self) -> dict[str | None, Fraction]:
        """Each source's share of the training rows; shares sum to one."""
        counts: Counter[str | None] = Counter()
        for group in self.row_groups:
            counts[group.source] += group.rows
        given = {name: Fraction(repr(weight)) for name, weight in self.weights}
        parts = {name: given[str(name)] if given else Fraction(rows) for name, rows in sorted(counts.items(), key=str)}
        return {name: part / sum(parts.values()) for name, part in parts.items()}

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """One stream of all rows, or one for each source."""
        sources = [group.source for group in self.row_groups]
        if self._as_they_come:
            return (self._stream(0, np.arange(len(sources)), Fraction(1)),)
        return tuple(
            self._stream(number, np.array([i for i, source in enumerate(sources) if source == name]), share)
            for number, (name, share) in enumerate(self.shares.items())
        )

    @property
    def quotas(self) -> tuple[int, ...]:
        """Each stream's contribution to an epoch: in batches if a batch has one source, else in rows."""
        if self.batching == "by_source":
            return largest_remainder(self.batches_per_epoch, tuple(self.shares.values()))
        return tuple(self._given[-1].tolist())

    @property
    def _as_they_come(self) -> bool:
        return self.batching == "mixed" and not self.weights

    def _rows_at_once(self, share: Fraction) -> int:
        """The most rows that a batch takes from a source with this share."""
        return self.global_batch_size if self.batching == "by_source" else -int(-self.global_batch_size * share // 1)

    def _stream(self, number: int, groups: Ints, share: Fraction) -> Stream:
        sizes = np.array([self.row_groups[i].rows for i in groups])
        at_once = self._rows_at_once(share)
        lanes = min(max(round(self.lanes * share), MIN_SOURCE_LANES), lanes_of(at_once))
        whole = 1 if self.batching == "mixed" and self.weights else self.global_batch_size
        return Stream(number, groups, sizes, lanes, int(sizes.sum()) // whole * whole)

    def _bounds(self, rank: int, world_size: int) -> tuple[int, int]:
        return self.global_batch_size * rank // world_size, self.global_batch_size * (rank + 1) // world_size

    def _draws(self, epoch: int, first: int, last: int) -> tuple[Ints, Ints, Ints]:
        """The draws of batches `first` to `last`, as three arrays: stream, first row, number of rows."""
        if self.batching == "by_source":
            number, batch = _choices(self.quotas, self.seed, epoch)
            number, batch = number[first:last], batch[first:last] + epoch * np.array(self.quotas)[number[first:last]]
            return number, batch * self.global_batch_size, np.full(last - first, self.global_batch_size)
        starts = epoch * self._given[-1] + self._given[first:last]
        counts = np.diff(self._given[first : last + 1], axis=0)
        return np.tile(np.arange(len(self.streams)), last - first), starts.ravel(), counts.ravel()

    @cached_property
    def _given(self) -> Ints:
        """(K + 1, S): rows of each stream that a mixed epoch has used before batch k.

        A batch takes the integer part of B times each stream's share; the streams take turns at the remaining rows.
        """
        shares = [Fraction(1)] if self._as_they_come else list(self.shares.values())
        exact = [self.global_batch_size * share for share in shares]
        edges = np.cumsum([0.0, *(float(rows % 1) for rows in exact)])
        edges[-1] = round(edges[-1])
        turns = np.arange(self.batches_per_epoch)[:, None] * GOLDEN % 1
        counts = np.diff(np.ceil(edges - turns), axis=1).astype(np.int64) + np.array([int(rows) for rows in exact])
        return np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])

    def _find(self, number: Ints, passes: Ints, turns: Ints) -> tuple[Ints, Ints]:
        """Locate rows: each row's group, and its position in the group's order."""
        groups, rows = np.empty_like(turns), np.empty_like(turns)
        for stream in np.unique(number):
            for turn in np.unique(passes[number == stream]):
                here = (number == stream) & (passes == turn)
                groups[here], rows[here] = self.streams[stream].locate(turns[here], self.seed, int(turn))
        return groups, rows


def with_columns(rows: pa.Table, *others: pa.Table) -> pa.Table:
    """The columns of tables of equally many rows side by side."""
    for other in others:
        for name in other.column_names:
            rows = rows.append_column(name, other[name])
    return rows


def largest_remainder(seats: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Divide `seats` in proportion to shares that sum to one, by the largest remainder method."""
    exact = [seats * share for share in shares]
    rests = sorted(range(len(exact)), key=lambda i: (-(exact[i] % 1), i))
    more = set(rests[: seats - sum(int(each) for each in exact)])
    return tuple(int(each) + (i in more) for i, each in enumerate(exact))


@lru_cache(maxsize=2)
def _choices(quotas: tuple[int, ...], seed: int, epoch: int) -> tuple[Ints, Ints]:
    """(K,) each: the stream of each batch of an epoch, and how many batches of that stream precede it."""
    number = np.repeat(np.arange(len(quotas)), quotas)
    np.random.default_rng([seed, epoch, 0, 2]).shuffle(number)
    before = np.empty_like(number)
    before[np.argsort(number, kind="stable")] = _ranges(np.zeros(len(quotas), np.int64), np.array(quotas))
    return number, before


def _dealing(stream: Stream) -> tuple[int, int]:
    return stream.lanes, stream.rows_per_pass


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """5 6 7, 0 1 for starts 5, 0 and counts 3, 2."""
    return np.repeat(starts - counts.cumsum() + counts, counts) + np.arange(counts.sum())
