"""Vectors between numpy and Arrow: (N, D) float32 and a column of N lists of D."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def as_column(vectors: np.ndarray, null: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """A column of the vectors, null where the mask says so."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=None if null is None else pa.array(null))


def as_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The vectors of a column without nulls."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)  # type: ignore[no-any-return]
