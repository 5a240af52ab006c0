"""Vectors by what they are of, shared by all jobs of a storage.root: no text is embedded twice under one model.

    cache = VectorCache(home, "cache-9f0c4e…-256", width=256)
    cache.put([cache_key("remove duplicate rows")], vectors)        # (1, 256)
    vectors, found = cache.get([cache_key("remove duplicate rows")])

A Lance table of key and vector for each model, size and way of reading; a key is the hash of the text as the model is
given it, prompt included. Writers only add, so they do not meet; a key that two of them add is there twice and does no
harm until `trim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embedding.columns import as_column, as_matrix
from pipeline.embedding.lance import Frozen, connect
from pipeline.storage.path import StoragePath
from pipeline.text.identity import content_id

INDEXED_ROWS = 50_000  # from here on an index by key is worth its while


def cache_key(text: str, window: int | None = None) -> str:
    """Of a text with its prompt, or of one of its windows."""
    return content_id([text] if window is None else [text, str(window)])


class VectorCache:
    """Sent to other processes by pickle, it connects in each on first use."""

    def __init__(self, home: StoragePath, name: str, width: int) -> None:
        self.home, self.name, self.width = home, name, width
        self._table: Any = None
        self._past: Frozen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([("key", pa.string()), ("vector", pa.list_(pa.float32(), self.width))])

    def create(self) -> None:
        connect(self.home).create_table(self.name, schema=self.schema, exist_ok=True)

    def get(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(N, width) float32 vectors, and (N,) whether each was there; zeros stand for those that were not.

        After `freeze` these are the vectors that were there then.
        """
        vectors, found = np.zeros((len(keys), self.width), np.float32), np.zeros(len(keys), bool)
        if not keys:
            return vectors, found
        quoted = ", ".join(f"'{key}'" for key in set(keys))
        table = self._past.table if self._past else self.table
        rows = table.search().where(f"key IN ({quoted})").select(["key", "vector"]).to_arrow()
        place = {key: i for i, key in enumerate(rows["key"].to_pylist())}
        there = as_matrix(rows["vector"])
        for i, key in enumerate(keys):
            if key in place:
                vectors[i], found[i] = there[place[key]], True
        return vectors, found

    def freeze(self) -> None:
        """Index what is there, and look no further: a job's texts differ, so its own vectors are not asked for."""
        self._index()
        self._past = Frozen(self.home, self.name)

    def put(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        sound = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)  # what a store refuses is to be made anew
        keys, vectors = list(compress(keys, sound)), vectors[sound]
        if keys:
            self.table.add(pa.table([pa.array(keys, pa.string()), as_column(vectors)], schema=self.schema))

    def trim(self, most_bytes: float) -> None:
        """Drop the oldest vectors until the rest takes less than `most_bytes`; join small files, and index."""
        surplus = self.table.count_rows() - int(most_bytes / (4 * self.width + 32))
        if surplus > 0:
            keys = self.table.search().select(["key"]).limit(surplus).to_arrow()["key"].to_pylist()
            for start in range(0, surplus, 10_000):
                quoted = ", ".join(f"'{key}'" for key in keys[start : start + 10_000])
                self.table.delete(f"key IN ({quoted})")
        self._index()

    def _index(self) -> None:
        if self.table.count_rows() >= INDEXED_ROWS and not self.table.list_indices():
            self.table.create_scalar_index("key")
        self.table.optimize(cleanup_older_than=timedelta(days=2))  # longer than another job looks at an old version

    @property
    def table(self) -> Any:
        if self._table is None:
            self._table = connect(self.home).open_table(self.name)
        return self._table
