"""A namespace of a Pinecone index.

store = PineconeStore(config.pinecone, "quickstart-9f0c4e…", width=256, key_files=["api.env"], budget=budget)
store.create()                          # checks dimension and metric; makes the index where pinecone.create says so
refused = store.upsert(rows)            # what could not be written after pinecone.max_attempts tries, with reasons

Its reads lag its writes by seconds. Texts longer than `pinecone.text_bytes` come back cut. Vectors come back as they
were written, to the last bit of a float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from pinecone.index import Index

from pipeline.config.pinecone import Pinecone
from pipeline.embedding.stores.budget import Budget
from pipeline.embedding.stores.pinecone_records import bad_id, batches, to_records, to_row, to_table
from pipeline.embedding.stores.pinecone_service import PassingError, PineconeService, RejectedError
from pipeline.embedding.stores.rows import checked, checked_query, grouped, with_vectors
from pipeline.embedding.stores.store import SCHEMA, Refused, StoreError
from pipeline.embedding.stores.where import checked_where, to_pinecone
from pipeline.runtime.console import log

T = TypeVar("T")
R = TypeVar("R")
VALUES = "_values"  # the field under which Pinecone's vector operations find a vector
PAGE_IDS = 100  # ids a page of a list, and a fetch
URL_BYTES = 6_000  # of a fetch's ids, which are part of its address
DELETED_IDS = 1_000  # a request
TOP_K = 10_000
SETTLED = 3  # counts in a row that are the same
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
        self.service = PineconeService(settings, key_files, budget, backoff_s)
        self._told = False

    @property
    def name(self) -> str:
        return f"{self.settings.index}/{self.namespace}"

    @property
    def uri(self) -> str:
        """The data plane's host, as far as it is known without asking."""
        return self.settings.index_host or self.settings.host or "https://api.pinecone.io"

    def exists(self) -> bool:
        return self.service.find() is not None

    def create(self) -> None:
        found = self.service.find()
        if found is None and self.settings.create:
            found = self._make()
        found = found or self.service.describe()
        if VALUES not in found.schema.fields:
            fields = ", ".join(found.schema.fields)
            raise StoreError(f"Pinecone's index {found.name} holds {fields}; allowed is one of plain dense vectors")
        field = found.schema.fields[VALUES]
        if field.dimension != self.width:
            raise StoreError(
                f"Pinecone's index {found.name} takes vectors of {field.dimension} numbers; the model gives "
                f"{self.width}"
            )
        if field.metric != self.settings.metric:
            raise StoreError(
                f"Pinecone's index {found.name} compares by {field.metric}; pinecone.metric is {self.settings.metric}"
            )

    def _make(self) -> Any:
        """A serverless index for vectors, once it is ready. Another process may have made it first."""
        vectors = {"type": "dense_vector", "dimension": self.width, "metric": self.settings.metric}
        place = {"deployment_type": "managed", "cloud": self.settings.cloud, "region": self.settings.region}
        log.info("makes Pinecone's index %s on %s in %s", self.settings.index, place["cloud"], place["region"])

        def make() -> Any:
            schema = {"fields": {VALUES: vectors}}
            return self.service.client.indexes.create(
                name=self.settings.index, schema=schema, deployment=place, timeout=-1
            )

        try:
            self.service.send("create_index", make)
        except StoreError:
            if self.service.find() is None:
                raise
        end = time.monotonic() + READY_S
        while not (found := self.service.describe()).status.ready:
            if time.monotonic() > end:
                raise StoreError(f"Pinecone's index {found.name} is {found.status.state} after {READY_S} s; try later")
            time.sleep(2 * self.backoff_s)
        return found

    def count(self) -> int:
        stats = self._ask("describe_index_stats", lambda index: index.describe_index_stats())
        there = stats.namespaces.get(self.namespace)
        return there.vector_count if there else 0

    def ids(self) -> Iterator[list[str]]:
        token: str | None = None
        while True:
            page = self._page(token)
            if page.vectors:
                yield [item.id for item in page.vectors]
            token = page.pagination.next if page.pagination else None
            if token is None:
                return

    def _page(self, token: str | None) -> Any:
        def ask(index: Index) -> Any:
            return index.list_paginated(namespace=self.namespace, limit=PAGE_IDS, pagination_token=token)

        return self._ask("list", ask)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of every row, batch by batch, in no order to rely on; each 100 rows are a request."""
        for page in self.ids():
            rows = pa.table({"id": page}) if list(columns) == ["id"] else self.fetch(page).select(list(columns))
            yield from rows.to_batches()

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        schema = SCHEMA(self.width)

        def ask(some: list[str]) -> pa.Table:
            found = self._ask("fetch", lambda index: index.fetch(ids=some, namespace=self.namespace))
            return to_table(found.vectors, schema)

        sound = (i for i in dict.fromkeys(ids) if not bad_id(i))
        groups = grouped(sound, lambda i: len(quote(i, safe="")) + len("&ids="), PAGE_IDS, URL_BYTES)
        return pa.concat_tables([schema.empty_table(), *self._all(ask, groups)])

    def upsert(self, rows: pa.Table) -> list[Refused]:
        good, refused = checked(rows, self.width, self.name)
        records, misfits, cut = to_records(good, self.settings.metadata, self.settings.text_bytes)
        if cut and not self._told:
            log.warning(
                "%s: texts are cut to %s bytes (pinecone.text_bytes)", self.name, f"{self.settings.text_bytes:,}"
            )
            self._told = True
        groups = batches(records, self.settings.batch_rows, self.settings.batch_bytes)
        return [*refused, *misfits, *(one for some in self._all(self._write, groups) for one in some)]

    def _write(self, records: list[dict[str, Any]]) -> list[Refused]:
        """A batch, resent as long as it may help; where a part of it is at fault, the part is found by halving."""
        reason, limit = "", self.settings.max_attempts
        for attempt in range(1, limit + 1):
            try:
                done = self.service.once(
                    lambda: self.service.index.upsert(vectors=records, namespace=self.namespace, show_progress=False)
                )
            except PassingError as error:
                reason = str(error)
                if attempt < limit:
                    self.service.wait(attempt, error)
                continue
            except RejectedError as error:
                if len(records) == 1:
                    return [Refused(records[0]["id"], f"Pinecone refused it: {error}", attempt)]
                return self._halves(records)
            if done.upserted_count == len(records):
                return []
            reason = f"Pinecone wrote {done.upserted_count} of {len(records)} records"
            if len(records) > 1:
                return self._halves(records)
        self._refuse_gone()
        return [Refused(record["id"], f"not written in {limit} tries: {reason}", limit) for record in records]

    def _refuse_gone(self) -> None:
        """Raise StoreError where the index is no more, which is no matter of the records that were sent."""
        try:
            there = self.service.find()
        except StoreError:
            return
        if there is None:
            self.service.describe()

    def _halves(self, records: list[dict[str, Any]]) -> list[Refused]:
        middle = len(records) // 2
        return [*self._write(records[:middle]), *self._write(records[middle:])]

    def update(self, rows: pa.Table) -> list[Refused]:
        """As upsert, with the vectors that are there: Pinecone's own update takes a request a record, and never removes
        a key of the metadata."""
        return self.upsert(with_vectors(rows, self.fetch(rows["id"].to_pylist())))

    def delete(self, ids: Sequence[str]) -> None:
        def remove(some: list[str]) -> None:
            gone = self._ask(
                "delete", lambda index: index.delete(ids=some, namespace=self.namespace), absent=StoreError
            )
            if gone is StoreError:  # the service answers 404 also where a namespace has come to nothing
                self.service.describe()

        there = [i for i in ids if not bad_id(i)]
        self._all(remove, (there[start : start + DELETED_IDS] for start in range(0, len(there), DELETED_IDS)))

    def query(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        vector, where = checked_query(vector, self.width, self.name), checked_where(where)
        if k > TOP_K:
            raise StoreError(f"found a query for {k:,} records; Pinecone gives {TOP_K:,} at most")

        def ask(index: Index) -> Any:
            return index.query(
                vector=vector.tolist(),
                top_k=k,
                namespace=self.namespace,
                filter=to_pinecone(where) or None,
                include_metadata=True,
            )

        found = self._ask("query", ask).matches
        return [{**to_row(match.id, match.metadata), "score": match.score} for match in found]

    def describe(self) -> dict[str, Any]:
        facts = {"kind": "pinecone", "rows": self.count(), "width": self.width, "metric": self.settings.metric}
        kept = f"the first {self.settings.text_bytes:,} bytes"
        return {**facts, "index": "Pinecone's own", "text": kept, "place": self.uri, "name": self.name}

    def finish(self) -> None:
        """Wait until counts have settled: the same three times, some seconds apart."""
        counts: list[int] = []
        while len(counts) < SETTLED or len(set(counts[-SETTLED:])) > 1:
            if counts:
                time.sleep(4 * self.backoff_s)
            counts.append(self.count())

    def _ask(self, what: str, request: Callable[[Index], T], **options: Any) -> T:
        """A request's answer. The connection is made first, for that takes a request of its own."""
        index = self.service.index
        return self.service.send(what, lambda: request(index), **options)

    def _all(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`work` of each item, several at once; the first error stops those that have not begun."""
        todo = list(items)
        if not todo:
            return []
        _ = self.service.index  # connected once, before there are threads
        with ThreadPoolExecutor(min(len(todo), self.settings.max_concurrency)) as pool:
            futures = [pool.submit(work, item) for item in todo]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
