"""LanceDB, embedded: a table a model, keyed by record id.

store = LanceStore(uri="…/lancedb", name="quickstart-9f0c4e…", width=256)
store.upsert(table)                     # id, vector, source, source_id, text, metadata
store.query(vector, k=10)               # nearest first, with `score`, the cosine
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from pipeline.embedding.stores.store import SCHEMA, TEXTS, Refused

SCAN_ROWS = 8192  # a batch of a scan: 8 MB of vectors of 256 numbers


class LanceStore:
    """One table, which `create` makes where it is not there."""

    def __init__(self, uri: str, name: str, width: int) -> None:
        self.uri, self.name, self.width = uri, name, width
        self._table: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # connections stay in their process

    def _connect(self) -> Any:
        return lancedb.connect(self.uri, read_consistency_interval=timedelta(0))  # see what others have written

    def exists(self) -> bool:
        return self.name in self._connect().list_tables(limit=1_000_000).tables

    def create(self) -> None:
        self._connect().create_table(self.name, schema=SCHEMA(self.width), exist_ok=True)

    @property
    def table(self) -> Any:
        if self._table is None:
            self._table = self._connect().open_table(self.name)
        return self._table

    def count(self) -> int:
        return int(self.table.count_rows())

    def ids(self) -> Iterator[list[str]]:
        for batch in self.scan(["id"]):
            yield batch["id"].to_pylist()

    def ids_between(self, first: str, last: str) -> set[str]:
        """Ids in the table from `first` to `last`, both included. They are hex digits, so quoting them is safe."""
        rows = self.table.search().where(f"id >= '{first}' AND id <= '{last}'").select(["id"]).to_arrow()
        return set(rows["id"].to_pylist())

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of every row, batch by batch, in no order to rely on."""
        yield from self.table.search().select(list(columns)).to_batches(SCAN_ROWS)

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        schema = SCHEMA(self.width)
        if not ids:
            return schema.empty_table()
        return self.table.search().where(_among(ids)).select(schema.names).to_arrow().select(schema.names)

    def upsert(self, rows: pa.Table) -> list[Refused]:
        """Write rows; one whose id is there replaces it."""
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        schema = SCHEMA(self.width)
        merge.execute(rows.select(schema.names).cast(schema))
        return []

    def update(self, rows: pa.Table) -> list[Refused]:
        self.table.merge_insert("id").when_matched_update_all().execute(rows.select(["id", *TEXTS]))
        return []

    def delete(self, ids: Sequence[str]) -> None:
        if ids:
            self.table.delete(_among(ids))

    def query(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The k nearest records, best first; `score` is the cosine."""
        found = self.table.search(vector).metric("cosine").limit(k).to_arrow().drop_columns(["vector"])
        rows = found.rename_columns({"_distance": "score"}).to_pylist()
        return [{**row, "score": 1 - row["score"]} for row in rows]

    def describe(self) -> dict[str, Any]:
        return {"kind": "lancedb", "rows": self.count(), "width": self.width, "metric": "cosine", "place": self.uri}

    def finish(self) -> None:
        """Join the small files that many writes leave."""
        self.table.optimize()


def _among(ids: Sequence[str]) -> str:
    """SQL that holds for rows of these ids."""
    quoted = ", ".join("'" + i.replace("'", "''") + "'" for i in ids)
    return f"id IN ({quoted})"
