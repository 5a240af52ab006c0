"""A namespace of a Pinecone index.

store = PineconeStore(config.pinecone, "quickstart-9f0c4e…", width=256, key_files=["api.env"], budget=budget)
store.create()                          # checks dimension and metric; makes the index where pinecone.create says so
refused = store.upsert(rows)            # what could not be written after pinecone.max_attempts tries, with reasons

Rows are the vector table's. Reads lag writes by seconds. Texts longer than `pinecone.text_bytes` come back cut. Vectors
come back as they were written, to the last bit of a float32. A store is sent to other processes by pickle, and connects
in each on first use.
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
from pipeline.index.pinecone_client import Budget, PassingError, PineconeClient, RejectedError
from pipeline.index.pinecone_records import bad_id, batched, batches, to_filter, to_records, to_row
from pipeline.index.search import checked_query
from pipeline.index.table import StoreError
from pipeline.index.where import checked_where, keeps

T = TypeVar("T")
R = TypeVar("R")
VALUES = "_values"  # the field under which Pinecone's vector operations find a vector
PAGE_IDS = 100  # ids a page of a list, and a fetch
URL_BYTES = 6_000  # of a fetch's ids, which are part of its address
DELETED_IDS = 1_000  # a request
TOP_K = 10_000
RUNNING = ("Pending", "InProgress")  # an import
READY_S = 300  # seconds that a new index may take


class PineconeStore:
    """One namespace, which comes to be with its first record."""

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
        self._told = False

    @property
    def name(self) -> str:
        return f"{self.settings.index}/{self.namespace}"

    @property
    def uri(self) -> str:
        """The data plane's host, as far as it is known without asking."""
        return self.settings.index_host or self.settings.host or "https://api.pinecone.io"

    def create(self) -> None:
        """Make the index if it is not there and may be made. Raises StoreError for one of another kind."""
        if self.settings.create and self.client.find() is None:
            self._make()
        found, metric = self.client.describe(), self.settings.metric
        field = found.schema.fields.get(VALUES)
        if field is None:
            fields = ", ".join(found.schema.fields)
            raise StoreError(f"Pinecone's index {found.name} holds {fields}; allowed is one of plain dense vectors")
        if field.dimension != self.width:
            raise StoreError(
                f"Pinecone's index {found.name} takes vectors of {field.dimension} numbers; the model gives "
                f"{self.width}"
            )
        if field.metric != metric:
            raise StoreError(f"Pinecone's index {found.name} compares by {field.metric}; pinecone.metric is {metric}")

    def _make(self) -> None:
        """A serverless index for vectors, once it is ready. Another process may have made it first."""
        settings = self.settings
        vectors = {"type": "dense_vector", "dimension": self.width, "metric": settings.metric}
        place = {"deployment_type": "managed", "cloud": settings.cloud, "region": settings.region}
        log.info("makes Pinecone's index %s on %s in %s", settings.index, settings.cloud, settings.region)
        try:
            self.client.create(name=settings.index, schema={"fields": {VALUES: vectors}}, deployment=place, timeout=-1)
        except StoreError:
            if self.client.find() is None:
                raise
        end = time.monotonic() + READY_S
        while not (found := self.client.describe()).status.ready:
            if time.monotonic() > end:
                raise StoreError(f"Pinecone's index {found.name} is {found.status.state} after {READY_S} s; try later")
            time.sleep(2 * self.backoff_s)

    def count(self) -> int:
        """Records in the namespace, as far as the service knows by now."""
        there = self._namespace()
        return there.vector_count if there else 0

    def is_new(self) -> bool:
        """Whether the namespace is not there yet."""
        return self._namespace() is None

    def _namespace(self) -> Any:
        stats = self.client.send("describe_index_stats", methodcaller("describe_index_stats"))
        return stats.namespaces.get(self.namespace)

    def ids(self) -> Iterator[list[str]]:
        """Every id, page by page: a request for 100."""
        page: dict[str, Any] = {"namespace": self.namespace, "limit": PAGE_IDS, "pagination_token": None}
        while True:
            found: Any = self.client.send("list", lambda index: index.list_paginated(**page))
            if found.vectors:
                yield [item.id for item in found.vectors]
            page["pagination_token"] = found.pagination.next if found.pagination else None
            if page["pagination_token"] is None:
                return

    def fetch(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The rows with these ids that can be read by now, by id, each with its float32 `vector`."""

        def ask(some: list[str]) -> list[dict[str, Any]]:
            found = self.client.send("fetch", lambda index: index.fetch(ids=some, namespace=self.namespace)).vectors
            return [
                {**to_row(i, one.metadata), "vector": np.asarray(one.values, np.float32)} for i, one in found.items()
            ]

        sound = (i for i in dict.fromkeys(ids) if not bad_id(i))
        groups = batched(sound, PAGE_IDS, lambda i: len(quote(i, safe="")) + len("&ids="), URL_BYTES)
        return {row["id"]: row for rows in self._all(ask, groups) for row in rows}

    def upsert(self, rows: pa.Table) -> list[Refused]:
        """Write rows of the table, each in place of the one of its id. Returns those that were not written."""
        records, misfits = self.records(rows)
        groups = batches(records, self.settings.batch_rows, self.settings.batch_bytes)
        return [*misfits, *(one for some in self._all(self._write, groups) for one in some)]

    def records(self, rows: pa.Table) -> tuple[list[dict[str, Any]], list[Refused]]:
        """Rows as records, and those that cannot be one. Raises StoreError for vectors of another width."""
        width = rows.schema.field("vector").type.list_size
        if width != self.width:
            raise StoreError(f"{self.name} takes vectors of {self.width} numbers; found vectors of {width}")
        records, misfits, cut = to_records(rows, self.settings.metadata, self.settings.text_bytes)
        if cut and not self._told:
            limit = f"{self.settings.text_bytes:,}"
            log.warning(
                "%s: texts are cut to %s bytes (pinecone.text_bytes), and many places to the first", self.name, limit
            )
            self._told = True
        return records, misfits

    def _write(self, records: list[dict[str, Any]]) -> list[Refused]:
        """A batch; where a part of it is at fault, the part is found by halving."""

        def upsert(index: Index) -> bool:
            done = index.upsert(vectors=records, namespace=self.namespace, show_progress=False).upserted_count
            if not done and len(records) == 1:
                raise PassingError("Pinecone wrote 0 of 1 records", None)
            return bool(done == len(records))

        try:
            if self.client.attempt(partial(upsert, self.client.index)):
                return []
        except PassingError as error:
            self.client.describe()  # raises StoreError where the index is no more, whatever was sent
            limit = self.settings.max_attempts
            return [Refused(record["id"], f"not written in {limit} tries: {error}", limit) for record in records]
        except RejectedError as error:
            if len(records) == 1:
                return [Refused(records[0]["id"], f"Pinecone refused it: {error}", 1)]
        middle = len(records) // 2
        return [*self._write(records[:middle]), *self._write(records[middle:])]

    def delete(self, ids: Sequence[str]) -> None:
        """Remove records; ids that are not there are no error."""

        def remove(some: list[str]) -> None:
            def ask(index: Index) -> bool:
                index.delete(ids=some, namespace=self.namespace)
                return True

            if not self.client.send("delete", ask, absent=False):
                self.client.describe()  # the service answers 404 also where a namespace has come to nothing

        self._all(remove, batched((i for i in ids if not bad_id(i)), DELETED_IDS))

    def query(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The k rows nearest to a (width,) vector of which a place meets all conditions, best first, with `score`."""
        vector, where = checked_query(vector, self.width, self.name), checked_where(where)
        if k > TOP_K:
            raise StoreError(f"found a query for {k:,} records; Pinecone gives {TOP_K:,} at most")
        asked = k
        while True:  # the filter passes some records that do not meet the conditions
            found = self._nearest(vector, asked, to_filter(where))
            kept = [row for row in found if not where or keeps(where, row)][:k]
            if len(kept) == k or len(found) < asked or asked == TOP_K:
                return kept
            asked = min(4 * asked, TOP_K)

    def _nearest(self, vector: np.ndarray, k: int, condition: dict[str, Any]) -> list[dict[str, Any]]:
        def ask(index: Index) -> Any:
            return index.query(
                vector=vector.tolist(),
                top_k=k,
                namespace=self.namespace,
                filter=condition or None,
                include_metadata=True,
            )

        matches = self.client.send("query", ask).matches
        return [{**to_row(match.id, match.metadata), "score": match.score} for match in matches]

    def found_import(self, uri: str) -> str | None:
        """The id of an import of a folder that runs, or ended well."""
        return self.client.send("list_imports", lambda index: _import_of(index, uri))

    def start_import(self, uri: str) -> str:
        """Let the service read a folder of Parquet files by itself, once. Returns the import's id."""

        def ask(index: Index) -> str:
            # A reply may have been lost, so each try looks first.
            return _import_of(index, uri) or str(
                index.start_import(uri, error_mode="abort", integration_id=self.settings.import_integration).id
            )

        return self.client.send("start_import", ask)

    def await_import(self, import_id: str) -> None:
        """Wait until an import has ended. Raises StoreError unless it ended well."""
        while (
            found := self.client.send("describe_import", lambda index: index.describe_import(import_id))
        ).status in RUNNING:
            log.debug("import %s: %s%%", import_id, found.percent_complete)
            time.sleep(20 * self.backoff_s)
        if found.status != "Completed":
            raise StoreError(
                f"Pinecone's import of {found.uri} {found.status.lower()}: {found.error or 'no reason given'}; run the "
                "same command again, without pinecone.import_uri if it fails again"
            )

    def _all(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`work` of each item, several at once; the first error stops those that have not begun."""
        todo = list(items)
        if not todo:
            return []
        _ = self.client.index  # connected once, before there are threads
        with ThreadPoolExecutor(min(len(todo), self.settings.max_concurrency)) as pool:
            futures = [pool.submit(work, item) for item in todo]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _import_of(index: Index, uri: str) -> str | None:
    good = (*RUNNING, "Completed")
    return next((one.id for one in index.list_imports() if one.uri == uri and one.status in good), None)
