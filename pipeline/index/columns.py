"""Vectors and token ids between numpy and Arrow, without a Python object a row.

By buffers where a query comes along: `pa.array(...)` and `to_numpy` import pandas, which takes a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
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
    array = one_array(column)
    return as_numbers(array.flatten()).reshape(len(array), array.type.list_size)


def as_tokens(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of token ids as a column of TOKENS."""
    ids = np.fromiter(chain.from_iterable(lists), np.int32, sum(map(len, lists)))
    return as_groups(_of_int32(ids), [len(one) for one in lists])


def as_groups(values: pa.Array, counts: Sequence[int]) -> pa.ListArray:
    """Lists of so many of the values each: 1, 2, 3 and counts of 2, 1 → [1, 2], [3]."""
    return pa.ListArray.from_arrays(_of_int32(np.cumsum([0, *counts], dtype=np.int32)), values)


def _of_int32(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def as_ragged(column: Column) -> tuple[pa.Array, np.ndarray]:
    """Lists laid end to end, and the (N + 1,) offsets at which they begin; of a column without nulls.

    [[7, 8], [9]] → [7, 8, 9] and 0, 2, 3.
    """
    array = one_array(column)
    offsets = as_numbers(array.offsets)
    return array.values[offsets[0] : offsets[-1]], offsets - offsets[0]


def as_numbers(array: pa.Array) -> np.ndarray:
    """(N,) numbers without nulls, as they lie in the array's buffer."""
    buffer, dtype = array.buffers()[1], np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(buffer or b"", dtype)[array.offset : array.offset + len(array)]


def one_array(column: Column) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
