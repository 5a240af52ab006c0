"""A worker's rows of a global batch as packed tokens, and the parts that go through the model at once.

    batch = Batch(ids=["r1", "r2"], fields={"anchor": …, "positive": …}, negatives=EMPTY, negative_counts=[0, 0])
    batch.slice(0, 1)                           # its first row
    batch.keys(slots=0)                         # (2, 3): hashes of record, anchor and positive; equal texts are equal
    part = learner.prepare(batch, seed=step)    # a Part

Plain data; `Learner` makes parts of batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Literal

import torch
import xxhash
from torch import Tensor

from pipeline.model.packing import Packed, join, pack


@dataclass(frozen=True)
class Batch:
    """n rows. `negatives` are the hard negatives of all rows end to end, `negative_counts` how many each row has."""

    ids: list[str]  # of records
    fields: dict[str, Packed]  # anchor and positive, or text
    negatives: Packed
    negative_counts: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(len(packed.ids) for packed in (*self.fields.values(), self.negatives))

    @property
    def row_tokens(self) -> list[int]:
        """(n,) tokens of each row, its negatives included."""
        sizes = sum((packed.lengths for packed in self.fields.values()), torch.zeros(len(self), dtype=torch.int64))
        if len(self.negatives):
            owner = torch.arange(len(self)).repeat_interleave(torch.tensor(self.negative_counts))
            sizes = sizes.index_add(0, owner, self.negatives.lengths)
        return sizes.tolist()  # type: ignore[no-any-return]

    @property
    def text(self) -> Packed:
        """The texts for generative objectives: `text`, or the positive of a pair."""
        return self.fields["text"] if "text" in self.fields else self.fields["positive"]

    def slice(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, as views."""
        first, last = sum(self.negative_counts[:start]), sum(self.negative_counts[:stop])
        return Batch(
            self.ids[start:stop],
            {name: packed.slice(start, stop) for name, packed in self.fields.items()},
            self.negatives.slice(first, last),
            self.negative_counts[start:stop],
        )

    def pairs(self) -> Packed:
        """Anchors, positives and hard negatives end to end, for one forward pass."""
        return reduce(join, (self.fields["anchor"], self.fields["positive"], self.negatives))

    def keys(self, slots: int) -> Tensor:
        """(n, 3 + slots) int64 hashes: of the record, its anchor, its positive and its negatives; 0 for no negative."""
        record = [text_hash(one.encode()) for one in self.ids]
        columns = [record, hashes(self.fields["anchor"]), hashes(self.fields["positive"])]
        keys = torch.zeros(len(self), 3 + slots, dtype=torch.int64)
        keys[:, :3] = torch.tensor(columns, dtype=torch.int64).T
        if slots:
            keys[:, 3:][self.filled_slots(slots)] = torch.tensor(hashes(self.negatives), dtype=torch.int64)
        return keys

    def filled_slots(self, slots: int) -> Tensor:
        """(n, slots) bool: where a row has a negative."""
        return torch.arange(slots)[None, :] < torch.tensor(self.negative_counts, dtype=torch.int64)[:, None]


Sees = Literal["states", "vectors", "nothing"]


@dataclass(frozen=True)
class Special:
    """Ids of special tokens. `start` and `end` frame what the decoder writes; `kept` are never corrupted."""

    start: int
    end: int
    mask: int
    kept: frozenset[int]
    vocab_size: int


@dataclass(frozen=True)
class Task:
    """A generative objective's inputs and labels.

    The encoder reads `source`. The decoder reads `inputs` and sees the source's states, its vectors or nothing of it.
    Without `inputs` the labels are those of the source's tokens at `positions`.
    """

    labels: Tensor
    source: Packed | None = None
    sees: Sees = "nothing"
    inputs: Packed | None = None
    positions: Tensor | None = None
    label_smoothing: float = 0.0

    def emptied(self) -> Task:
        """The same objective, without texts."""
        return replace(
            self,
            labels=self.labels[:0],
            source=None if self.source is None else self.source.slice(0, 0),
            inputs=None if self.inputs is None else self.inputs.slice(0, 0),
            positions=None if self.positions is None else self.positions[:0],
        )


@dataclass(frozen=True)
class Part:
    """A micro-batch: n rows of a worker's batch, ready for one forward pass."""

    rows: int
    pairs: Packed | None  # anchors, positives and hard negatives end to end
    filled: Tensor  # (n, M) the slots that the negatives take
    keys: Tensor  # (n, 3 + M)
    tasks: dict[str, Task]

    def emptied(self) -> Part:
        """No rows, for the same objectives: run by a worker whose rows make fewer parts than another's."""
        pairs = None if self.pairs is None else self.pairs.slice(0, 0)
        tasks = {name: task.emptied() for name, task in self.tasks.items()}
        return Part(0, pairs, self.filled[:0], self.keys[:0], tasks)


def hashes(texts: Packed) -> list[int]:
    """A hash of each sequence's tokens, from 1 to 2^63 - 1."""
    ids, bounds = texts.ids.numpy(), texts.offsets.tolist()
    return [text_hash(ids[a:b].tobytes()) for a, b in pairwise(bounds)]


def text_hash(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) >> 1 or 1


EMPTY = pack([])
