"""What every vector store can do, whatever is behind it.

    store.create()
    for refused in store.upsert(rows):                  # rows: a table of SCHEMA(width)
        print(refused.id, refused.reason)
    store.query(vector, 10, {"source": "debian", "section": ["admin", "net"], "size": {"gte": 10}})

A store is sent to other processes by pickle and connects in each on first use. Upserts may come from several at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from pipeline.runtime.job import JobError

TEXTS = ("source", "source_id", "text", "metadata")


class StoreError(JobError):
    """A store that cannot be used as asked, in one sentence. What was written before it stays written."""


class Refused(NamedTuple):
    """A row that was not written, why, and how often it was tried (0 where it could not be sent at all)."""

    id: str
    reason: str
    attempts: int


def SCHEMA(width: int) -> pa.Schema:
    """Columns of a store's rows; `metadata` is a JSON object."""
    texts = [(name, pa.string()) for name in TEXTS]
    return pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), width)), *texts])


class Store(Protocol):
    """Rows by id. Methods raise StoreError where the store as a whole fails them."""

    @property
    def name(self) -> str:
        """Table, folder, or index and namespace."""

    @property
    def uri(self) -> str:
        """Where it is: a folder, a bucket or a host."""

    @property
    def width(self) -> int:
        """Numbers in a vector."""

    def exists(self) -> bool:
        """Whether `create` has nothing to do, or only to check."""

    def create(self) -> None:
        """Make the store where it is not there; check dimension and metric of one that is."""

    def count(self) -> int:
        """Rows in it."""

    def ids(self) -> Iterator[list[str]]:
        """Every id, page by page, in no order to rely on."""

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of every row, batch by batch, in no order to rely on."""

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        """The rows with these ids that there are, with SCHEMA's columns, in no order to rely on."""

    def upsert(self, rows: pa.Table) -> list[Refused]:
        """Write rows, each in place of the one of its id. Ids are distinct. Returns those that were not written."""

    def update(self, rows: pa.Table) -> list[Refused]:
        """Write everything but `vector` of rows whose ids are there; others are left out. `rows` needs no `vector`."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows; ids that are not there are no error."""

    def query(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The k rows nearest to a (width,) vector, best first: SCHEMA's columns but `vector`, and `score`, the cosine.

        `where` has a condition for each of `source`, `source_id` or a key of the metadata, all of which must hold: a
        value that it equals, a list of values of which it is one, or a mapping of `gt`, `gte`, `lt`, `lte` to bounds.
        """

    def describe(self) -> dict[str, Any]:
        """For people: kind, rows, width, metric, index, place."""

    def finish(self) -> None:
        """After a bulk load: compact, index, and wait until counts are settled."""


@runtime_checkable
class HybridStore(Store, Protocol):
    """A store that has an index of words too."""

    def hybrid(
        self, text: str, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The k best of two rankings, by vector and by words, fused by reciprocal rank."""
