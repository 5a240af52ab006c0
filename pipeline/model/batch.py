"""A worker's rows of a global batch as packed tokens, and the micro-batches that it is split into.

    batch = Batch(ids=["r1", "r2"], fields={"anchor": …, "positive": …}, negatives=EMPTY, negative_counts=[0, 0])
    batch.slice(0, 1)                           # the first row
    batch.keys(slots=0)                         # (2, 3): hashes of record, anchor and positive, to find equal texts
    part = learner.prepare(batch, seed=step)    # a MicroBatch

Plain data; `Learner.prepare` turns a batch into a micro-batch. Cost: slices are views; hashing is negligible.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
import xxhash
from torch import Tensor

from pipeline.model.packing import Packed, pack


@dataclass(frozen=True)
class Batch:
    """n rows. `negatives` holds the hard negatives of all rows end to end, `negative_counts` their number per row."""

    ids: list[str]  # of records
    fields: dict[str, Packed]  # anchor and positive, or text
    negatives: Packed
    negative_counts: list[int]
    views: tuple[Packed, Packed] | None = None
    """Two views of each text, which are contrasted instead of anchors and positives (model/views.py)."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """The teacher's vectors of each field's texts and of the negatives, (n, E) and (sum of counts, E), or `scores` of
    the positives and negatives, (n, 1 + slots)."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> list[Packed]:
        """The texts that count as the batch's tokens: of each field, or of both views."""
        return list(self.views or self.fields.values())

    @property
    def tokens(self) -> int:
        return sum(len(packed.ids) for packed in (*self.texts, self.negatives))

    @property
    def row_tokens(self) -> list[int]:
        """(n,) tokens of each row, including its negatives."""
        sizes = sum((packed.lengths for packed in self.texts), torch.zeros(len(self), dtype=torch.int64))
        if len(self.negatives):
            owner = torch.arange(len(self)).repeat_interleave(torch.tensor(self.negative_counts))
            sizes = sizes.index_add(0, owner, self.negatives.lengths)
        return sizes.tolist()  # type: ignore[no-any-return]

    @property
    def text(self) -> Packed:
        """The texts for generative objectives: `text`, or the positives of pairs."""
        return self.fields["text"] if "text" in self.fields else self.fields["positive"]

    def slice(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, as views."""
        first, last = sum(self.negative_counts[:start]), sum(self.negative_counts[:stop])
        return Batch(
            self.ids[start:stop],
            {name: packed.slice(start, stop) for name, packed in self.fields.items()},
            self.negatives.slice(first, last),
            self.negative_counts[start:stop],
            self.views and (self.views[0].slice(start, stop), self.views[1].slice(start, stop)),
            {
                name: vectors[first:last] if name == "negatives" else vectors[start:stop]
                for name, vectors in self.teacher.items()
            },
        )

    def compared(self, *, whole: bool) -> dict[str, Packed]:
        """The texts whose vectors the objectives compare: anchors and positives, or two views of each text, or texts.

        `whole` adds the texts that the views are of.
        """
        if self.views is None:
            return self.fields
        return dict(zip(("anchor", "positive"), self.views, strict=True)) | ({"text": self.text} if whole else {})

    @property
    def teacher_of_views(self) -> dict[str, Tensor]:
        """The teacher's vectors of the texts in `compared`; a teacher sees no views."""
        if self.views is None:
            return self.teacher
        return {"text": self.teacher["text" if "text" in self.fields else "positive"]} if self.teacher else {}

    def keys(self, slots: int) -> Tensor:
        """(n, 3 + slots) int64 hashes of record, anchor, positive and negatives; 0 for an empty slot.

        Views count as the whole text, so that views of equal texts are no negatives of each other.
        """
        record = [text_hash(one.encode()) for one in self.ids]
        anchors, positives = (self.fields.get(name, self.text) for name in ("anchor", "positive"))
        if self.views:
            anchors = positives
        columns = [record, hashes(anchors), hashes(positives)]
        keys = torch.zeros(len(self), 3 + slots, dtype=torch.int64)
        keys[:, :3] = torch.tensor(columns, dtype=torch.int64).T
        if slots:
            keys[:, 3:][self.filled_slots(slots)] = torch.tensor(hashes(self.negatives), dtype=torch.int64)
        return keys

    def filled_slots(self, slots: int) -> Tensor:
        """(n, slots) bool: which slots hold a negative."""
        return torch.arange(slots)[None, :] < torch.tensor(self.negative_counts, dtype=torch.int64)[:, None]


Sees = Literal["states", "vectors", "nothing"]


@dataclass(frozen=True)
class Special:
    """Ids of special tokens. `start` and `end` frame the decoder's output; `kept` are never corrupted."""

    start: int
    end: int
    mask: int
    kept: frozenset[int]
    vocab_size: int


@dataclass(frozen=True)
class GenerativeTask:
    """A generative objective's inputs and labels.

    The encoder reads `source`. The decoder reads `inputs`, and attends to the source's token states, to its vectors, or
    to nothing. Without `inputs` there is no decoder, and `labels` belong to the source's tokens at `positions`.
    """

    labels: Tensor
    source: Packed | None = None
    sees: Sees = "nothing"
    inputs: Packed | None = None
    positions: Tensor | None = None
    label_smoothing: float = 0.0

    def emptied(self) -> GenerativeTask:
        """The same objective with no texts."""
        return replace(
            self,
            labels=self.labels[:0],
            source=None if self.source is None else self.source.slice(0, 0),
            inputs=None if self.inputs is None else self.inputs.slice(0, 0),
            positions=None if self.positions is None else self.positions[:0],
        )


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch: n rows, ready for one forward pass."""

    rows: int
    fields: tuple[str, ...]  # anchor and positive, or text
    texts: Packed | None  # those of each field and the hard negatives, end to end; None if no objective needs vectors
    filled: Tensor  # (n, M) which slots hold a negative
    keys: Tensor  # (n, 3 + M)
    tasks: dict[str, GenerativeTask]
    teacher: dict[str, Tensor] = field(default_factory=dict)  # see `Batch`

    def emptied(self) -> MicroBatch:
        """The same objectives with no rows, for workers that have fewer parts than others."""
        return replace(
            self,
            rows=0,
            texts=None if self.texts is None else self.texts.slice(0, 0),
            filled=self.filled[:0],
            keys=self.keys[:0],
            tasks={name: task.emptied() for name, task in self.tasks.items()},
            teacher={name: vectors[:0] for name, vectors in self.teacher.items()},
        )


def hashes(texts: Packed) -> list[int]:
    """A hash of each sequence's tokens, in 1 to 2^63 - 1."""
    ids, bounds = texts.ids.numpy(), texts.offsets.tolist()
    return [text_hash(ids[a:b].tobytes()) for a, b in pairwise(bounds)]


def text_hash(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) >> 1 or 1


EMPTY = pack([])
