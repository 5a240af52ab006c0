"""Queries on their way into a store: what of them can be used."""

from __future__ import annotations

import numpy as np

from pipeline.index.stores.store import StoreError


def checked_query(vector: np.ndarray, width: int, name: str) -> np.ndarray:
    """A (width,) float32 vector that can be compared. Raises StoreError for another."""
    vector = np.asarray(vector, dtype=np.float32).ravel()
    if len(vector) != width:
        raise StoreError(f"{name} holds vectors of {width} numbers; found a query of {len(vector)}")
    if not np.isfinite(vector).all() or not vector.any():
        raise StoreError("the query's vector is zero or no number: is there nothing in it that the model can read?")
    return vector
