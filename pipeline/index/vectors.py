"""Converts vectors between numpy and Arrow, and finds exact nearest neighbours.

    as_matrix(as_column(vectors))                         # (N, D) float32, without Python objects per row

    found = nearest(queries, blocks, k=100)               # blocks of ((n,) ids, (n, D) vectors), for any n
    found.ids, found.scores                               # (Q, k) each, best first
    merged(found, other, k=100)                           # results of the same queries on other blocks
    nearest_rows(table.to_batches(), vector, k=10)        # [{"id": …, "text": …, "score": 0.83}, …]

Blocks are searched one by one: memory holds only the scores of some queries times one block. Ties go to the larger id,
as in trec_eval, so the result does not depend on how documents are split into blocks, or on the blocks' order.

Columns are built from buffers, because `pa.array(...)` and `to_numpy` import pandas, which takes 0.2 s.
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
TOKENS = pa.list_(pa.int32())  # of a text; a text's windows are a list of these
QUERIES_AT_ONCE = 256  # queries per matrix of scores, with 8 bytes per document of the block
ROUNDING = 1e-7  # float32 rounding error per dimension


def as_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Convert (N, D) to a column of N float32 lists."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def as_matrix(column: Column) -> np.ndarray:
    """Convert a column of vectors without nulls to (N, D)."""
    array = one_array(column)
    return as_numbers(array.flatten()).reshape(len(array), array.type.list_size)


def as_tokens(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    """Convert lists of token ids to a column of TOKENS."""
    ids = np.fromiter(chain.from_iterable(lists), np.int32, sum(map(len, lists)))
    return as_groups(_int32_array(ids), [len(each) for each in lists])


def as_groups(values: pa.Array, counts: Sequence[int]) -> pa.ListArray:
    """Split values into lists of the given lengths: 1, 2, 3 and lengths 2, 1 → [1, 2], [3]."""
    return pa.ListArray.from_arrays(_int32_array(np.cumsum([0, *counts], dtype=np.int32)), values)


def _int32_array(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def as_ragged(column: Column) -> tuple[pa.Array, np.ndarray]:
    """Flatten a column of lists without nulls; return the values and (N + 1,) offsets.

    [[7, 8], [9]] → [7, 8, 9] and 0, 2, 3.
    """
    array = one_array(column)
    offsets = as_numbers(array.offsets)
    return array.values[offsets[0] : offsets[-1]], offsets - offsets[0]


def as_numbers(array: pa.Array) -> np.ndarray:
    """A zero-copy (N,) view of a numeric array without nulls."""
    buffer, dtype = array.buffers()[1], np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(buffer or b"", dtype)[array.offset : array.offset + len(array)]


def one_array(column: Column) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclass(frozen=True)
class TopK:
    """The top k documents of each query, best first: (Q, k) ids and float32 scores."""

    ids: npt.NDArray[Any]
    scores: Floats

    @classmethod
    def empty(cls, queries: int) -> TopK:
        """The result of searching no documents."""
        return cls(np.empty((queries, 0), np.int64), np.empty((queries, 0), np.float32))


def unit(vectors: npt.NDArray[Any]) -> Floats:
    """Normalise (N, D) vectors to unit length; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def nearest(queries: Floats, blocks: Iterable[tuple[npt.NDArray[Any], Floats]], k: int) -> TopK:
    """The k nearest vectors to each query, over blocks of ids and vectors; unit vectors, (Q, D) and (n, D)."""
    found = TopK.empty(len(queries))
    for ids, vectors in blocks:
        found = merged(found, nearest_in_block(queries, vectors, ids, k), k)
    return found


def nearest_in_block(
    queries: Floats, vectors: Floats, ids: npt.NDArray[Any], k: int, excluded: tuple[Ints, Ints] | None = None
) -> TopK:
    """The k nearest of one block. `excluded` are rows of queries and rows of vectors; these pairs score -inf."""
    transposed = vectors.T.astype(np.float64)
    parts = []
    for start in range(0, max(len(queries), 1), QUERIES_AT_ONCE):
        batch = queries[start : start + QUERIES_AT_ONCE].astype(np.float64)
        # In double precision, so that equal vectors in different blocks round to the same float32.
        scores = (batch @ transposed).astype(np.float32)
        if excluded is not None:
            rows, columns = excluded
            in_batch = (rows >= start) & (rows < start + len(batch))
            scores[rows[in_batch] - start, columns[in_batch]] = -np.inf
        parts.append(best(scores, ids, k))
    return TopK(np.concatenate([part.ids for part in parts]), np.concatenate([part.scores for part in parts]))


def best(scores: Floats, ids: npt.NDArray[Any], k: int) -> TopK:
    """The top k (at most n) of (Q, n) scores of n distinct ids. NaN counts as lowest."""
    k = min(k, len(ids))
    if k == 0:
        return TopK(np.empty((len(scores), 0), ids.dtype), np.empty((len(scores), 0), np.float32))
    scores = np.where(np.isnan(scores), -np.inf, scores)
    least = np.partition(scores, len(ids) - k, axis=1)[:, len(ids) - k, None]
    kept = scores >= least
    if (kept.sum(axis=1) > k).any():  # ties at rank k
        order = np.argsort(ids)[::-1]
        scores, ids = scores[:, order], ids[order]
        above, equal = scores > least, scores == least
        kept = above | (equal & (equal.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)))
    columns = np.nonzero(kept)[1].reshape(-1, k)
    return _sorted(ids[columns], np.take_along_axis(scores, columns, axis=1), k)


def merged(one: TopK, other: TopK, k: int) -> TopK:
    """The top k of two results for the same queries, on different documents."""
    if not one.ids.shape[1] or not other.ids.shape[1]:
        return other if other.ids.shape[1] else one
    ids, scores = (np.concatenate(pair, axis=1) for pair in ((one.ids, other.ids), (one.scores, other.scores)))
    return _sorted(ids, scores, k)


def _sorted(ids: npt.NDArray[Any], scores: Floats, k: int) -> TopK:
    order = np.argsort(scores, axis=1)[:, ::-1]
    falling = np.take_along_axis(scores, order, axis=1)
    tied = (falling[:, 1:] == falling[:, :-1]).any(axis=1)
    order[tied] = np.lexsort((ids[tied], scores[tied]), axis=1)[:, ::-1]  # slow for text ids, so only if tied
    order = order[:, :k]
    return TopK(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))


def nearest_rows(
    batches: Iterable[pa.RecordBatch],
    vector: Floats,
    k: int,
    keep: Callable[[pa.RecordBatch], Sequence[bool]] | None = None,
) -> list[dict[str, Any]]:
    """The k rows nearest to a (D,) vector, best first, with `score` and all columns but `vector`.

    Batches have distinct `id`, and `vector`; `keep` returns a mask of the rows to consider.
    """
    query, found, rows = unit(vector[None]), TopK.empty(1), dict[str, dict[str, Any]]()
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


def _likely(vectors: Floats, query: Floats, k: int, found: TopK) -> Ints:
    """Rows of (n, D) vectors that may be in the top k, by float32 scores; `found` are the results so far."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    scores = np.nan_to_num(vectors @ query / lengths, nan=-np.inf)
    least = float(np.partition(scores, -k)[-k]) if len(scores) > k else -np.inf
    if found.scores.shape[1] == k:
        least = max(least, float(found.scores[0, -1]))
    return np.flatnonzero(scores >= least - len(query) * ROUNDING)
