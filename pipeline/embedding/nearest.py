"""Nearest neighbours block by block: exact, and never more scores in memory than some queries times one block.

    found = None
    for ids, vectors in blocks:                                  # (n,) and (n, D), n as it comes
        found = merged(found, nearest_in_block(queries, vectors, ids, k=100), k=100)
    found.ids, found.scores                                      # (Q, k) each, best first

Equal scores are ordered as trec_eval orders them: the larger id first. So which k are kept depends neither on how the
documents are cut into blocks nor on the order in which blocks come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
QUERIES_AT_ONCE = 256  # rows of scores in memory, of 8 bytes a document of the block


@dataclass(frozen=True)
class Found:
    """The best documents of each query, best first: (Q, k) ids and float32 scores."""

    ids: npt.NDArray[Any]
    scores: Floats


def unit(vectors: npt.NDArray[Any]) -> Floats:
    """(N, D) at unit length; a zero vector stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def nearest_in_block(queries: Floats, vectors: Floats, ids: npt.NDArray[Any], k: int) -> Found:
    """The k of one block of highest cosine for each query; unit vectors, (Q, D) and (n, D)."""
    exact = vectors.T.astype(np.float64)
    parts = [
        # In double precision, so that equal vectors in different blocks come to the same float32.
        best((queries[start : start + QUERIES_AT_ONCE].astype(np.float64) @ exact).astype(np.float32), ids, k)
        for start in range(0, max(len(queries), 1), QUERIES_AT_ONCE)
    ]
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


def merged(one: Found | None, other: Found, k: int) -> Found:
    """The k best of two findings for the same queries, of different documents."""
    if one is None:
        return other
    ids, scores = (np.concatenate(pair, axis=1) for pair in ((one.ids, other.ids), (one.scores, other.scores)))
    return _sorted(ids, scores, k)


def _sorted(ids: npt.NDArray[Any], scores: Floats, k: int) -> Found:
    order = np.lexsort((ids, scores), axis=1)[:, ::-1][:, :k]
    return Found(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))
