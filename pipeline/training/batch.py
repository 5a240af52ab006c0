"""Rows of token ids, as the feed brings them, as packed tensors."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.model.batch import EMPTY, Batch
from pipeline.model.packing import Packed

FIELDS = ("anchor", "positive", "text")


def to_batch(rows: pa.Table, hard_negatives: int = 0) -> Batch:
    """A table of `id` and token ids as a batch, with at most so many of each row's `negatives`, the first ones."""
    fields = {name: packed(rows[name]) for name in FIELDS if name in rows.column_names}
    ids = rows["id"].to_pylist()
    if not hard_negatives or "negatives" not in rows.column_names:
        return Batch(ids, fields, EMPTY, [0] * len(ids))
    lists = pc.list_slice(rows["negatives"].combine_chunks(), 0, hard_negatives)
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_pylist()
    return Batch(ids, fields, packed(pa.chunked_array([lists.drop_null().flatten()])), counts)


def packed(column: pa.ChunkedArray) -> Packed:
    """A column of token-id lists, as it lies in the shard, as packed sequences."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    return Packed.of(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])
