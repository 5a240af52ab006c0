"""LanceDB, embedded: a table a model, keyed by record id.

store = LanceStore(Path("…/lancedb"), name="quickstart-9f0c4e…", width=256)       # or a BucketPath
store.upsert(table)                     # id, vector, source, source_id, text, metadata
store.query(vector, k=10)               # nearest first, with `score`, the cosine
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl

import lancedb
import numpy as np
import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.storage.bucket import AnyPath, BucketPath

SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}  # LanceDB's names for ours
SCAN_ROWS = 8192  # a batch of a scan: 8 MB of vectors of 256 numbers


class LanceStore:
    """One table, which `create` makes where it is not there."""

    def __init__(self, home: AnyPath, name: str, width: int) -> None:
        self.home, self.name, self.width = home, name, width
        self._table: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # connections stay in their process

    @property
    def schema(self) -> pa.Schema:
        texts = [(name, pa.string()) for name in ("source", "source_id", "text", "metadata")]
        return pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), self.width)), *texts])

    @property
    def uri(self) -> str:
        return str(self.home)

    def _connect(self) -> Any:
        uri, options = self.uri, None
        if isinstance(self.home, BucketPath):
            uri, options = f"{SCHEMES[self.home.scheme]}://{self.home.key}", storage_options(self.home)
        # see what others have written
        return lancedb.connect(uri, read_consistency_interval=timedelta(0), storage_options=options)

    def exists(self) -> bool:
        return self.home.is_dir() and self.name in self._connect().list_tables(limit=1_000_000).tables

    def create(self) -> None:
        self._connect().create_table(self.name, schema=self.schema, exist_ok=True)

    @property
    def table(self) -> Any:
        if self._table is None:
            self._table = self._connect().open_table(self.name)
        return self._table

    def count(self) -> int:
        return int(self.table.count_rows())

    def ids_between(self, first: str, last: str) -> set[str]:
        """Ids in the table from `first` to `last`, both included. They are hex digits, so quoting them is safe."""
        rows = self.table.search().where(f"id >= '{first}' AND id <= '{last}'").select(["id"]).to_arrow()
        return set(rows["id"].to_pylist())

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of every row, batch by batch, in no order to rely on."""
        yield from self.table.search().select(list(columns)).to_batches(SCAN_ROWS)

    def upsert(self, rows: pa.Table) -> None:
        """Write rows; one whose id is there replaces it."""
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(rows.select(self.schema.names).cast(self.schema))

    def query(self, vector: np.ndarray, k: int) -> list[dict[str, Any]]:
        """The k nearest records, best first; `score` is the cosine."""
        found = self.table.search(vector).metric("cosine").limit(k).to_arrow().drop_columns(["vector"])
        rows = found.rename_columns({"_distance": "score"}).to_pylist()
        return [{**row, "score": 1 - row["score"]} for row in rows]

    def compact(self) -> None:
        """Join the small files that many writes leave."""
        self.table.optimize()


def storage_options(home: BucketPath) -> dict[str, str]:
    """LanceDB's words for the options of pyarrow's URIs. Raises ConfigError for one that it has no word for."""
    options, found = dict(parse_qsl(home.query)), {}
    scheme, endpoint = options.pop("scheme", "https"), options.pop("endpoint_override", None)
    options.pop("retry_limit_seconds", None)
    if options.pop("anonymous", "false") == "true":
        found["skip_signature"] = "true"
    if home.scheme == "s3":
        if region := options.pop("region", None):
            found["aws_region"] = region
        if endpoint:
            found |= {"aws_endpoint": f"{scheme}://{endpoint}", "allow_http": str(scheme == "http").lower()}
            endpoint = None
    left = [*options, *(["endpoint_override"] if endpoint else [])]
    if left:
        raise ConfigError(
            f"storage.root: found the option {left[0]}, which LanceDB has no like of; allowed with it is "
            "embedding.uri=/folder/on/disk"
        )
    return found
