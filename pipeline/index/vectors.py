"""Vectors between numpy and Arrow, and exact nearest neighbours among them.

    as_matrix(as_column(vectors))                         # (N, D) float32, without a Python object a row

    found = nearest(queries, blocks, k=100)               # blocks of ((n,) ids, (n, D) vectors), n as it comes
    found.ids, found.scores                               # (Q, k) each, best first
    merged(one, other, k=100)                             # of the same queries, from other blocks
    nearest_rows(table.to_batches(), vector, k=10)        # [{"id": …, "text": …, "score": 0.83}, …]

Neighbours are found block by block: never more scores in memory than those of some queries times one block. Equal
scores are ordered as trec_eval orders them, the larger id first, so the result depends neither on how the documents are
cut into blocks nor on the order in which blocks come.

Columns are built from buffers, because `pa.array(...)` and `to_numpy` import pandas, which takes a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Column: TypeAlias = pa.Array | pa.ChunkedArray
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
TOKENS = pa.list_(pa.int32())  # of a text; of a text's windows: a list of these
QUERIES_AT_ONCE = 256  # rows of scores in memory, of 8 bytes a document of the block
ROUNDING = 1e-7  # of float32, a number of a vector


def as_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """(N, D) float32 as N lists of D."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


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


@dataclass(frozen=True)
class Found:
    """The best documents of each query, best first: (Q, k) ids and float32 scores."""

    ids: npt.NDArray[Any]
    scores: Floats

    @classmethod
    def none(cls, queries: int) -> Found:
        """Of no documents."""
        return cls(np.empty((queries, 0), np.int64), np.empty((queries, 0), np.float32))


def unit(vectors: npt.NDArray[Any]) -> Floats:
    """(N, D) at unit length; a zero vector stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def nearest(queries: Floats, blocks: Iterable[tuple[npt.NDArray[Any], Floats]], k: int) -> Found:
    """The k vectors of highest cosine for each query, of blocks of ids and vectors; unit vectors, (Q, D) and (n, D)."""
    found = Found.none(len(queries))
    for ids, vectors in blocks:
        found = merged(found, nearest_in_block(queries, vectors, ids, k), k)
    return found


def nearest_in_block(
    queries: Floats, vectors: Floats, ids: npt.NDArray[Any], k: int, excluded: tuple[Ints, Ints] | None = None
) -> Found:
    """The k of one block. `excluded` are rows of queries and rows of vectors: such a pair scores -inf."""
    exact = vectors.T.astype(np.float64)
    parts = []
    for start in range(0, max(len(queries), 1), QUERIES_AT_ONCE):
        some = queries[start : start + QUERIES_AT_ONCE].astype(np.float64)
        # In double precision, so that equal vectors in different blocks come to the same float32.
        scores = (some @ exact).astype(np.float32)
        if excluded is not None:
            rows, columns = excluded
            here = (rows >= start) & (rows < start + len(some))
            scores[rows[here] - start, columns[here]] = -np.inf
        parts.append(best(scores, ids, k))
    return Found(np.concatenate([part.ids for part in parts]), np.concatenate([part.scores for part in parts]))


def best(scores: Floats, ids: npt.NDArray[Any], k: int) -> Found:
    """The k highest of (Q, n) scores of n distinct ids, or all n where there are fewer. A NaN counts as lowest."""
    k = min(k, len(ids))
    if k == 0:
        return Found(np.empty((len(scores), 0), ids.dtype), np.empty((len(scores), 0), np.float32))
    scores = np.where(np.isnan(scores), -np.inf, scores)
    least = np.partition(scores, len(ids) - k, axis=1)[:, len(ids) - k, None]
    kept = scores >= least
    if (kept.sum(axis=1) > k).any():  # more are tied for the last places than there are places
        order = np.argsort(ids)[::-1]
        scores, ids = scores[:, order], ids[order]
        above, equal = scores > least, scores == least
        kept = above | (equal & (equal.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)))
    columns = np.nonzero(kept)[1].reshape(-1, k)
    return _sorted(ids[columns], np.take_along_axis(scores, columns, axis=1), k)


def merged(one: Found, other: Found, k: int) -> Found:
    """The k best of two findings for the same queries, of different documents."""
    if not one.ids.shape[1] or not other.ids.shape[1]:
        return other if other.ids.shape[1] else one
    ids, scores = (np.concatenate(pair, axis=1) for pair in ((one.ids, other.ids), (one.scores, other.scores)))
    return _sorted(ids, scores, k)


def _sorted(ids: npt.NDArray[Any], scores: Floats, k: int) -> Found:
    order = np.argsort(scores, axis=1)[:, ::-1]
    falling = np.take_along_axis(scores, order, axis=1)
    tied = (falling[:, 1:] == falling[:, :-1]).any(axis=1)
    order[tied] = np.lexsort((ids[tied], scores[tied]), axis=1)[:, ::-1]  # several times as slow where ids are texts
    order = order[:, :k]
    return Found(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))


def nearest_rows(
    batches: Iterable[pa.RecordBatch],
    vector: Floats,
    k: int,
    keep: Callable[[pa.RecordBatch], Sequence[bool]] | None = None,
) -> list[dict[str, Any]]:
    """The k rows of highest cosine to a (D,) vector, best first, with `score` and all columns but `vector`.

    Batches have `id`, distinct texts, and `vector`; `keep` says which rows of a batch may be found.
    """
    query, found, rows = unit(vector[None]), Found.none(1), dict[str, dict[str, Any]]()
    for batch in batches:
        if keep is not None:
            batch = batch.filter(pa.array(keep(batch), pa.bool_()))
        vectors = as_matrix(batch["vector"])
        likely = _likely(vectors, query[0], k, found)
        batch, vectors = batch.take(pa.array(likely)), vectors[likely]
        found = merged(found, nearest_in_block(query, unit(vectors), np.array(batch["id"].to_pylist()), k), k)
        new = batch.select([name for name in batch.schema.names if name != "vector"]).to_pylist()
        rows |= {row["id"]: row for row in new}
        rows = {name: rows[name] for name in found.ids[0].tolist()}
    return [{**row, "score": score} for row, score in zip(rows.values(), found.scores[0].tolist(), strict=True)]


def _likely(vectors: Floats, query: Floats, k: int, found: Found) -> Ints:
    """Which of (n, D) vectors may be among the k best, as far as single precision can tell; found are those before."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    scores = np.nan_to_num(vectors @ query / lengths, nan=-np.inf)
    least = float(np.partition(scores, -k)[-k]) if len(scores) > k else -np.inf
    if found.scores.shape[1] == k:
        least = max(least, float(found.scores[0, -1]))
    return np.flatnonzero(scores >= least - len(query) * ROUNDING)
