"""The nearest rows, exactly, by looking at all of them block by block.

    nearest(store.scan(names), vector, k=10, where={"source": "debian"})

What is held is a block of vectors and the best k rows so far.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embedding.columns import as_matrix
from pipeline.embedding.stores.store import TEXTS
from pipeline.embedding.stores.where import Where, keeps


def nearest(batches: Iterable[pa.RecordBatch], vector: np.ndarray, k: int, where: Where) -> list[dict[str, Any]]:
    """The k rows of highest cosine to a (width,) vector, best first, with `score`; batches have SCHEMA's columns."""
    best: list[tuple[float, int, dict[str, Any]]] = []
    query, seen = vector / np.linalg.norm(vector), 0
    for batch in batches:
        if where:
            rows = batch.select(["places"]).to_pylist()
            batch = batch.take(pa.array([i for i, row in enumerate(rows) if keeps(where, row)], pa.int64()))
        if not len(batch):
            continue
        vectors = as_matrix(batch["vector"])
        scores = vectors @ query / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
        top = np.argsort(-scores, kind="stable")[:k]
        for score, row in zip(scores[top], batch.select(["id", *TEXTS]).take(pa.array(top)).to_pylist(), strict=True):
            heapq.heappush(best, (float(score), -seen, row))  # of equal scores, the one that came first
            seen += 1
            if len(best) > k:
                heapq.heappop(best)
    return [{**row, "score": score} for score, _, row in sorted(best, key=lambda found: found[:2], reverse=True)]
