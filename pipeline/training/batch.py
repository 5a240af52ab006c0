"""Rows of token ids, as the feed brings them, as packed tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.model.packing import Packed, join


@dataclass(frozen=True)
class PairBatch:
    """This worker's n pairs of the global batch; `ids` are their records'."""

    anchors: Packed
    positives: Packed
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self, start: int = 0, stop: int | None = None) -> Packed:
        """Anchors, then positives, of pairs `start` to `stop`, as one packed batch for one forward pass."""
        stop = len(self) if stop is None else stop
        return join(self.anchors.slice(start, stop), self.positives.slice(start, stop))

    @property
    def tokens(self) -> int:
        return len(self.anchors.ids) + len(self.positives.ids)

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(self.anchors.to(device), self.positives.to(device), self.ids)


def pair_batch(rows: pa.Table) -> PairBatch:
    """A table of `id`, `anchor` and `positive` token ids as a batch."""
    return PairBatch(packed(rows["anchor"]), packed(rows["positive"]), rows["id"].to_pylist())


def packed(column: pa.ChunkedArray) -> Packed:
    """A column of token-id lists, as it lies in the shard, as packed sequences."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    ids = lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64)
    return Packed(torch.from_numpy(ids), torch.from_numpy(offsets - offsets[0]))
