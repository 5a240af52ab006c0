"""Vectors and token ids between numpy and Arrow, without a Python object a row."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import pyarrow as pa

Column: TypeAlias = pa.Array | pa.ChunkedArray
TOKENS = pa.list_(pa.int32())  # of a text; of a text's windows: a list of these


def as_column(vectors: np.ndarray, null: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """(N, D) float32 as N lists of D, null where the mask says so."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=None if null is None else pa.array(null))


def as_matrix(column: Column) -> np.ndarray:
    """(N, D), the vectors of a column without nulls."""
    array = _one_array(column)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)  # type: ignore[no-any-return]


def as_ragged(column: Column) -> tuple[pa.Array, np.ndarray]:
    """Lists laid end to end, and the (N + 1,) offsets at which they begin; of a column without nulls.

    [[7, 8], [9]] → [7, 8, 9] and 0, 2, 3.
    """
    array = _one_array(column)
    offsets = array.offsets.to_numpy()
    return array.values[offsets[0] : offsets[-1]], offsets - offsets[0]


def _one_array(column: Column) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
