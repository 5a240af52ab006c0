"""Rows and queries on their way into a store: what of them can be used, and what is wrong with the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embedding.columns import as_matrix
from pipeline.embedding.stores.store import SCHEMA, Refused, StoreError


def checked(rows: pa.Table, width: int, name: str) -> tuple[pa.Table, list[Refused]]:
    """The rows that can be stored, with SCHEMA's columns, and the others with what is wrong with them.

    Of rows with the same id the last is taken. Raises StoreError where all vectors are of another width.
    """
    found = getattr(rows.schema.field("vector").type, "list_size", width)
    if found != width:
        raise StoreError(f"{name} takes vectors of {width} numbers; found vectors of {found}: is it another model's?")
    schema = SCHEMA(width)
    rows = rows.select(schema.names).cast(schema).combine_chunks()
    ids = rows["id"].to_pylist()
    bad = [*_bad_ids(ids)]
    bad += [(i, "it has no vector") for i in _positions(rows["vector"].is_null())]
    there = _without(range(len(ids)), bad)
    length = np.linalg.norm(as_matrix(rows.take(there)["vector"]).astype(np.float64), axis=1)
    bad += [(int(i), "its vector holds NaN or infinity") for i in there[~np.isfinite(length)]]
    bad += [(int(i), "its vector is zero, which has no direction to compare") for i in there[length == 0]]
    last = {i: position for position, i in enumerate(ids)}
    return rows.take(_without(last.values(), bad)), [Refused(ids[i] or "", reason, 0) for i, reason in bad]


def _bad_ids(ids: list[str | None]) -> list[tuple[int, str]]:
    return [(position, "its id is empty") for position, i in enumerate(ids) if not i]


def _without(positions: Iterable[int], bad: Sequence[tuple[int, str]]) -> np.ndarray:
    """The positions that are not bad, in order."""
    return np.setdiff1d(np.array([*positions], np.int64), np.array([i for i, _ in bad], np.int64))


def _positions(mask: pa.ChunkedArray) -> list[int]:
    return pc.indices_nonzero(mask).to_pylist()


def checked_query(vector: np.ndarray, width: int, name: str) -> np.ndarray:
    """A (width,) float32 vector that can be compared. Raises StoreError for another."""
    vector = np.asarray(vector, dtype=np.float32).ravel()
    if len(vector) != width:
        raise StoreError(f"{name} holds vectors of {width} numbers; found a query of {len(vector)}")
    if not np.isfinite(vector).all() or not vector.any():
        raise StoreError("the query's vector is zero or no number: is there nothing in it that the model can read?")
    return vector
