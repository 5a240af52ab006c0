"""A namespace of a Pinecone index.

store = PineconeStore(config.pinecone, "quickstart-9f0c4e…", width=256, key_files=["api.env"], budget=budget)
store.create()                          # checks dimension and metric; with pinecone.create, creates a missing index
refused = store.upsert(rows)            # rows not written after pinecone.max_attempts attempts, with reasons

Rows are those of the vector table. Reads lag writes by seconds. Texts longer than `pinecone.text_bytes` are truncated;
vectors survive a round trip bit for bit. A store can be pickled and connects in each process on first use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import methodcaller
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from pinecone.index import Index

from pipeline.config import Pinecone
from pipeline.core.console import log
from pipeline.index.dead_letters import Refused
from pipeline.index.pinecone_client import Budget, PineconeClient, RejectedError, TransientError
from pipeline.index.pinecone_records import bad_id, batched, batches, to_filter, to_records, to_row
from pipeline.index.search import checked_query
from pipeline.index.table import StoreError
from pipeline.index.where import checked_where, keeps

T = TypeVar("T")
R = TypeVar("R")
VALUES = "_values"  # the field that holds a vector in Pinecone's schema
PAGE_IDS = 100  # ids per page of a list, and per fetch
URL_BYTES = 6_000  # of a fetch's ids, which are part of its URL
DELETED_IDS = 1_000  # per request
TOP_K = 10_000
RUNNING = ("Pending", "InProgress")  # states of an import
READY_S = 300  # timeout for the creation of an index


class PineconeStore:
    """One namespace. Pinecone creates it with its first record."""

    def __init__(
        self,
        settings: Pinecone,
        namespace: str,
        width: int,
        key_files: Sequence[str] = ("api.env",),
        budget: Budget | None = None,
        backoff_s: float = 0.5,
    ) -> None:
        self.settings, self.namespace, self.width, self.backoff_s = settings, namespace, width, backoff_s
        self.client = PineconeClient(settings, key_files, budget, backoff_s)
        self._warned_of_truncation = False

    @property
    def name(self) -> str:
        return f"{self.settings.index}/{self.namespace}"

    @property
    def uri(self) -> str:
        """The data plane's host if the config has it, else the control plane's."""
        return self.settings.index_host or self.settings.host or "https://api.pinecone.io"

    def create(self) -> None:
        """Check the index; with `pinecone.create`, create a missing one. Raises StoreError for an unsuitable index."""
        if self.settings.create and self.client.find() is None:
            self._create_index()
        index, metric = self.client.describe(), self.settings.metric
        field = index.schema.fields.get(VALUES)
        if field is None:
            fields = ", ".join(index.schema.fields)
            raise StoreError(f"Pinecone's index {index.name} holds {fields}; allowed is an index of dense vectors")
        if field.dimension != self.width:
            raise StoreError(
                f"Pinecone's index {index.name} has {field.dimension} dimensions, the model {self.width}; choose "
                "another index with pinecone.index"
            )
        if field.metric != metric:
            raise StoreError(
                f"Pinecone's index {index.name} has the metric {field.metric}; pinecone.metric is {metric}"
            )

    def _create_index(self) -> None:
        """Create a serverless index and wait until it is ready. Another process may create it first."""
        settings = self.settings
        vectors = {"type": "dense_vector", "dimension": self.width, "metric": settings.metric}
        cloud = {"deployment_type": "managed", "cloud": settings.cloud, "region": settings.region}
        log.info("creating Pinecone's index %s on %s in %s", settings.index, settings.cloud, settings.region)
        try:
            self.client.create(name=settings.index, schema={"fields": {VALUES: vectors}}, deployment=cloud, timeout=-1)
        except StoreError:
            if self.client.find() is None:
                raise
        end = time.monotonic() + READY_S
        while not (index := self.client.describe()).status.ready:
            if time.monotonic() > end:
                raise StoreError(f"Pinecone's index {index.name} is {index.status.state} after {READY_S} s; try later")
            time.sleep(2 * self.backoff_s)

    def count(self) -> int:
        """Number of records in the namespace; recent writes may be missing."""
        namespace = self._namespace()
        return namespace.vector_count if namespace else 0

    def is_new(self) -> bool:
        """Whether the namespace does not exist yet."""
        return self._namespace() is None

    def _namespace(self) -> Any:
        stats = self.client.send("describe_index_stats", methodcaller("describe_index_stats"))
        return stats.namespaces.get(self.namespace)

    def ids(self) -> Iterator[list[str]]:
        """Yield all ids, in pages of one request each."""
        page: dict[str, Any] = {"namespace": self.namespace, "limit": PAGE_IDS, "pagination_token": None}
        while True:
            reply: Any = self.client.send("list", lambda index: index.list_paginated(**page))
            if reply.vectors:
                yield [item.id for item in reply.vectors]
            page["pagination_token"] = reply.pagination.next if reply.pagination else None
            if page["pagination_token"] is None:
                return

    def fetch(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Id → row, with a float32 `vector`, for the ids that exist; recent writes may be missing."""

        def fetch_batch(batch: list[str]) -> list[dict[str, Any]]:
            reply = self.client.send("fetch", lambda index: index.fetch(ids=batch, namespace=self.namespace)).vectors
            return [
                {**to_row(i, each.metadata), "vector": np.asarray(each.values, np.float32)} for i, each in reply.items()
            ]

        valid = (i for i in dict.fromkeys(ids) if not bad_id(i))
        groups = batched(valid, PAGE_IDS, lambda i: len(quote(i, safe="")) + len("&ids="), URL_BYTES)
        return {row["id"]: row for rows in self._map_concurrently(fetch_batch, groups) for row in rows}

    def upsert(self, rows: pa.Table) -> list[Refused]:
        """Insert or replace rows of the table. Returns the rows that were not written."""
        records, invalid = self.records(rows)
        groups = batches(records, self.settings.batch_rows, self.settings.batch_bytes)
        return [*invalid, *(each for refused in self._map_concurrently(self._write, groups) for each in refused)]

    def records(self, rows: pa.Table) -> tuple[list[dict[str, Any]], list[Refused]]:
        """Convert rows to records; returns also the rows refused. Raises StoreError for vectors of another width."""
        width = rows.schema.field("vector").type.list_size
        if width != self.width:
            raise StoreError(f"{self.name} takes vectors of {self.width} dimensions; found vectors of {width}")
        records, invalid, cut = to_records(rows, self.settings.metadata, self.settings.text_bytes)
        if cut and not self._warned_of_truncation:
            limit = f"{self.settings.text_bytes:,}"
            log.warning("%s: truncating texts to %s bytes (pinecone.text_bytes) and lists of places", self.name, limit)
            self._warned_of_truncation = True
        return records, invalid

    def _write(self, records: list[dict[str, Any]]) -> list[Refused]:
        """Write a batch; if Pinecone rejects it, bisect to find the records at fault."""

        def upsert(index: Index) -> bool:
            done = index.upsert(vectors=records, namespace=self.namespace, show_progress=False).upserted_count
            if not done and len(records) == 1:
                raise TransientError("Pinecone wrote 0 of 1 records", None)
            return bool(done == len(records))

        try:
            if self.client.attempt(partial(upsert, self.client.index)):
                return []
        except TransientError as error:
            self.client.describe()  # raises StoreError if the index is gone
            limit = self.settings.max_attempts
            return [Refused(record["id"], f"not written in {limit} attempts: {error}", limit) for record in records]
        except RejectedError as error:
            if len(records) == 1:
                return [Refused(records[0]["id"], f"Pinecone refused it: {error}", 1)]
        middle = len(records) // 2
        return [*self._write(records[:middle]), *self._write(records[middle:])]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete records; ids that do not exist are ignored."""

        def delete_batch(batch: list[str]) -> None:
            def request(index: Index) -> bool:
                index.delete(ids=batch, namespace=self.namespace)
                return True

            if not self.client.send("delete", request, absent=False):
                self.client.describe()  # a 404 may mean that only the namespace is gone; else raises StoreError

        self._map_concurrently(delete_batch, batched((i for i in ids if not bad_id(i)), DELETED_IDS))

    def query(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The k rows nearest to a (width,) vector with a place that meets all conditions, best first, with `score`."""
        vector, where = checked_query(vector, self.width, self.name), checked_where(where)
        if k > TOP_K:
            raise StoreError(f"found a query for {k:,} records; Pinecone returns at most {TOP_K:,}")
        limit = k
        while True:  # the filter may pass records that do not meet the conditions
            candidates = self._nearest(vector, limit, to_filter(where))
            kept = [row for row in candidates if not where or keeps(where, row)][:k]
            if len(kept) == k or len(candidates) < limit or limit == TOP_K:
                return kept
            limit = min(4 * limit, TOP_K)

    def _nearest(self, vector: np.ndarray, k: int, condition: dict[str, Any]) -> list[dict[str, Any]]:
        def request(index: Index) -> Any:
            return index.query(
                vector=vector.tolist(),
                top_k=k,
                namespace=self.namespace,
                filter=condition or None,
                include_metadata=True,
            )

        matches = self.client.send("query", request).matches
        return [{**to_row(match.id, match.metadata), "score": match.score} for match in matches]

    def find_import(self, uri: str) -> str | None:
        """The id of a running or completed import of a folder, or None."""
        return self.client.send("list_imports", lambda index: _import_of(index, uri))

    def start_import(self, uri: str) -> str:
        """Start an import of a folder of Parquet files, unless there is one. Returns the import's id."""

        def request(index: Index) -> str:
            # An earlier attempt may have succeeded although its reply was lost.
            return _import_of(index, uri) or str(
                index.start_import(uri, error_mode="abort", integration_id=self.settings.import_integration).id
            )

        return self.client.send("start_import", request)

    def await_import(self, import_id: str) -> None:
        """Wait for an import to end. Raises StoreError if it fails."""
        while (
            state := self.client.send("describe_import", lambda index: index.describe_import(import_id))
        ).status in RUNNING:
            log.debug("import %s: %s%%", import_id, state.percent_complete)
            time.sleep(20 * self.backoff_s)
        if state.status != "Completed":
            raise StoreError(
                f"Pinecone's import of {state.uri} {state.status.lower()}: {state.error or 'no reason given'}; run the "
                "same command again, without pinecone.import_uri if it fails again"
            )

    def _map_concurrently(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply `work` to the items in threads; the first error cancels items that have not started."""
        todo = list(items)
        if not todo:
            return []
        _ = self.client.index  # connect once, before the threads start
        with ThreadPoolExecutor(min(len(todo), self.settings.max_concurrency)) as pool:
            futures = [pool.submit(work, item) for item in todo]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _import_of(index: Index, uri: str) -> str | None:
    states = (*RUNNING, "Completed")
    return next((each.id for each in index.list_imports() if each.uri == uri and each.status in states), None)
