"""A worker's rows of a global batch, as packed tokens, and the hashes by which equal texts know each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
import xxhash
from torch import Tensor

from pipeline.model.packing import Packed, join, pack


@dataclass(frozen=True)
class Batch:
    """n rows. `negatives` are all rows' hard negatives end to end, `negative_counts` how many each row has."""

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
        """What generative objectives and masking learn from: `text`, or a pair's positive."""
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
        """(n, 3 + slots) int64 hashes: of the record, its anchor, its positive and its negatives; 0 is none."""
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


def hashes(texts: Packed) -> list[int]:
    """A hash of each sequence's tokens, from 1 to 2^63 - 1."""
    ids, bounds = texts.ids.numpy(), texts.offsets.tolist()
    return [text_hash(ids[a:b].tobytes()) for a, b in pairwise(bounds)]


def text_hash(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) >> 1 or 1


EMPTY = pack([])
