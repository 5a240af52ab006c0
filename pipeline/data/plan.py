"""Which rows make up global batch k of epoch e, as a function of only the seed and the shards.

A pass over rows permutes their row groups, and the rows inside each, by (seed, pass). The resulting order of N rows is
cut into L lanes of N // L rows. Rows are taken from the lanes in turn; a batch has the next B of them, sorted by lane.
Each of W workers trains on a contiguous part of the batch, so it reads little more than its own share, and the shares
of all workers together are the same batch for any W. A position is one integer, the step; seeking costs nothing.

    B = 4, L = 2, N = 10 rows in the pass's order:   lane 0: a b c d e     lane 1: f g h i j
    batch 0 = a b f g      batch 1 = c d h i      (e and j sit this pass out)
    with three workers, worker 0 trains on a then c, worker 1 on b then d, worker 2 on f g then h i

If sources have weights, or each batch comes from one source, each source has its own lanes and passes: a small source
with a high weight is repeated several times an epoch. An epoch has as many batches as all rows fill.
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
"""A batch with more rows a lane has more than MAX_LANES lanes. A row group of 1024 rows then lasts 16 steps. Ours."""
MIN_SOURCE_LANES = 8  # a batch has rows from at least so many row groups of a source with a small share. Ours.
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, fill the unit interval evenly: Kronecker's sequence

Ints = npt.NDArray[np.int64]


def lanes_of(global_batch_size: int) -> int:
    """The number of lanes: up to 32, or one for 64 rows, that divides the batch size.

    If no number in the upper half of that range divides it, the maximum; some lanes then give one row more than others.
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
    """Some rows of a plan and where they are stored: small enough to send to another process, which reads them."""

    folder: str
    seed: int
    groups: list[tuple[RowGroup, int, int]]
    """Row groups, each with its number in the plan and the pass, which determines the order of its rows."""
    rows: Ints
    """Positions in the concatenated rows of those groups."""
    steps: Ints
    """The step in which each row is trained on."""

    def read(self) -> pa.Table:
        """The rows in training order, with a `step` column."""
        first, tables, order = 0, [], []
        folder, files = as_path(self.folder), lru_cache(maxsize=None)(open_parquet)
        for group, number, turn in self.groups:
            tables.append(files(folder / group.path).read_row_group(group.index))
            order.append(first + np.random.default_rng([self.seed, turn, number, 1]).permutation(group.rows))
            first += group.rows
        table = pa.concat_tables(tables).combine_chunks().take(np.concatenate(order)[self.rows])
        return table.append_column("step", pa.array(self.steps))


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless sequence of rows: all rows of some row groups, in another order in each pass."""

    number: int
    groups: Ints  # (G,) numbers in the plan
    sizes: Ints  # (G,) rows of each
    lanes: int
    rows_per_pass: int

    def find(self, turns: Ints, seed: int, turn: int) -> tuple[Ints, Ints]:
        """For rows of one pass, given by when they are taken: the row group of each, and its position in that order."""
        order = np.random.default_rng([seed, turn, self.number, 0]).permutation(len(self.groups))
        ends = self.sizes[order].cumsum()
        per_lane = ends[-1] // self.lanes
        dealt = turns % self.lanes * per_lane + turns // self.lanes
        places = np.where(turns < self.lanes * per_lane, dealt, turns)
        at = np.searchsorted(ends, places, side="right")
        return self.groups[order[at]], places - ends[at] + self.sizes[order[at]]


@dataclass(frozen=True)
class Plan:
    """The order of a training run over a prepared split."""

    folder: str
    row_groups: tuple[RowGroup, ...]
    global_batch_size: int
    seed: int
    batching: Literal["mixed", "by_source"] = "mixed"
    weights: tuple[tuple[str, float], ...] = ()
    """Relative weights of sources. Without them, their shares are proportional to their rows."""

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
        """Steps to read at once: about as many as a lane is fed by one row group."""
        return max(1, max(group.rows for group in self.row_groups) * self.lanes // self.global_batch_size)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(start, stop) of reads that together cover steps `start` to `stop` and do not cross an epoch."""
        bounds = [start]
        while bounds[-1] < stop:
            epoch_end = (bounds[-1] // self.batches_per_epoch + 1) * self.batches_per_epoch
            bounds.append(min(bounds[-1] + self.steps_per_chunk, epoch_end, stop))
        return list(itertools.pairwise(bounds))

    def share(self, rank: int, world_size: int) -> int:
        """Number of rows of a global batch that this worker trains on; shares differ by one at most."""
        first, last = self._bounds(rank, world_size)
        return last - first

    def check_workers(self, world_size: int) -> None:
        """Raise ConfigError if there are more workers than rows in a batch."""
        if not 1 <= world_size <= self.global_batch_size:
            raise ConfigError(
                f"scaling.num_workers: found {world_size}; allowed with training.global_batch_size="
                f"{self.global_batch_size} are 1 to {self.global_batch_size}, a row or more for each"
            )

    def check_sources(self) -> None:
        """Raise ConfigError if a source has too few rows, or too small a share, for its batches."""
        if self._as_they_come:
            return
        for unknown in dict(self.weights).keys() - self.shares.keys():
            raise ConfigError(
                f"data.sources: found a weight of {unknown}, which has no training record; allowed are weights of "
                "sources that have some"
            )
        for (name, share), stream, quota in zip(self.shares.items(), self.streams, self.quotas, strict=True):
            rows, needed = int(stream.sizes.sum()), self._rows_at_once(share)
            if rows < needed:
                raise ConfigError(
                    f"data.sources: found {rows} training records of {name}, of which a batch takes {needed}; allowed "
                    f"with training.batching={self.batching} are as many records as that, a smaller batch or weight"
                )
            if quota == 0:
                raise ConfigError(
                    f"data.sources: found {name} with {float(share):.2g} of the weights, too little for one of "
                    f"the {self.batches_per_epoch} batches of an epoch; allowed are weights that give it one or more"
                )

    def read(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> pa.Table:
        """This worker's rows of steps `start` to `stop` (one epoch), in training order, with a `step` column."""
        return self.select(start, stop, rank, world_size).read()

    def select(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Selection:
        """The rows that `read` reads, without reading them."""
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
        return Selection(self.folder, self.seed, found, begin[place] + rows, steps)

    @cached_property
    def shares(self) -> dict[str | None, Fraction]:
        """Each source's share of the training rows; the shares add up to one."""
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
        """What each stream contributes to an epoch: batches if each has one source, else rows."""
        if self.batching == "by_source":
            return largest_remainder(self.batches_per_epoch, tuple(self.shares.values()))
        return tuple(self._given[-1].tolist())

    @property
    def _as_they_come(self) -> bool:
        return self.batching == "mixed" and not self.weights

    def _rows_at_once(self, share: Fraction) -> int:
        """The most rows that a batch takes from a source."""
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
        """What batches `first` to `last` draw, in order: (stream, first row, number of rows), an array each."""
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

        Each batch takes the whole part of B times a stream's share; the remaining rows rotate among the fractions.
        """
        shares = [Fraction(1)] if self._as_they_come else list(self.shares.values())
        exact = [self.global_batch_size * share for share in shares]
        edges = np.cumsum([0.0, *(float(rows % 1) for rows in exact)])
        edges[-1] = round(edges[-1])
        turns = np.arange(self.batches_per_epoch)[:, None] * GOLDEN % 1
        counts = np.diff(np.ceil(edges - turns), axis=1).astype(np.int64) + np.array([int(rows) for rows in exact])
        return np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])

    def _find(self, number: Ints, passes: Ints, turns: Ints) -> tuple[Ints, Ints]:
        """The row group of each row, and its position in that group's order."""
        groups, rows = np.empty_like(turns), np.empty_like(turns)
        for stream in np.unique(number):
            for turn in np.unique(passes[number == stream]):
                here = (number == stream) & (passes == turn)
                groups[here], rows[here] = self.streams[stream].find(turns[here], self.seed, int(turn))
        return groups, rows


def largest_remainder(seats: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Divide `seats` in proportion to shares that add up to one: whole parts, then one each to the largest rests."""
    exact = [seats * share for share in shares]
    rests = sorted(range(len(exact)), key=lambda i: (-(exact[i] % 1), i))
    more = set(rests[: seats - sum(int(each) for each in exact)])
    return tuple(int(each) + (i in more) for i, each in enumerate(exact))


@lru_cache(maxsize=2)
def _choices(quotas: tuple[int, ...], seed: int, epoch: int) -> tuple[Ints, Ints]:
    """(K,): the stream of each batch of an epoch, and how many of its batches came before in the epoch."""
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
