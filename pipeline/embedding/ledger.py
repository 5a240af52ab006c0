"""Which document holds which vector: a durable list beside a store, so that nothing need be asked of the store itself.

    ledger = Ledger(home, "quickstart-9f0c4e…")
    ledger.begin()
    ledger.between("", None)                   # one entry an id, sorted by it, as things stood when the job began
    ledger.note(rows, SENDING)                 # before they are sent: what may be in the store stands in the ledger
    ledger.note(rows, THERE)                   # once they are there

A Lance table with one entry an id, to which a job only adds, so that writers do not meet: of an id's new entries the
one furthest on counts, before the old one. `compact` makes one of them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embedding.lance import Frozen, connect
from pipeline.embedding.stores.store import Store
from pipeline.storage.path import StoragePath
from pipeline.text.identity import content_id

SENDING, THERE, GONE = 0, 1, 2
ENTRY = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "source_id", "digest")),
        ("parts", pa.int32()),  # rows that its record has in the store: its windows
        ("state", pa.int8()),
        ("new", pa.bool_()),  # since the table was last compacted
    ]
)
PART_ENTRIES = 1 << 17  # entries held at once while all of them are gone through, 60 MB
INDEXED_ENTRIES = 100_000  # from here on an index by id is worth its while


class Ledger:
    """Entries of one store. Sent to other processes by pickle, it connects in each on first use."""

    def __init__(self, home: StoragePath, name: str) -> None:
        self.home, self.name = home, name
        self._table: Any = None
        self._past: Frozen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def begin(self) -> None:
        """Make the table where there is none, and tidy up after a job that was killed."""
        connect(self.home).create_table(self.name, schema=ENTRY, exist_ok=True)
        if self.table.count_rows("new"):
            self.compact()
        self._past = Frozen(self.home, self.name)

    def note(self, rows: pa.Table, state: int) -> None:
        """Add entries for rows of id, source, source_id, digest and parts."""
        if len(rows):
            columns = [rows[name] for name in ENTRY.names[:-2]]
            columns += [pa.array(np.full(len(rows), state, np.int8)), pa.array(np.ones(len(rows), bool))]
            self.table.add(pa.table(columns, schema=ENTRY))

    def between(self, first: str, last: str | None) -> pa.Table:
        """Entries, when the job began, of ids from `first` up to `last`, which is not among them.

        Ids begin with hex digits here.
        """
        assert self._past
        return _between(self._past.table, first, last)

    def holding(self, source_ids: Sequence[str]) -> set[tuple[str, str]]:
        """(source, source_id) of those documents of these ids that have entries."""
        quoted = ", ".join("'" + each.replace("'", "''") + "'" for each in source_ids)
        rows = self.table.search().where(f"source_id IN ({quoted})").select(["source", "source_id"]).to_arrow()
        return set(zip(rows["source"].to_pylist(), rows["source_id"].to_pylist(), strict=True))

    def was_empty(self) -> bool:
        """Whether it was when the job began."""
        assert self._past
        return bool(self._past.table.count_rows() == 0)

    def counts(self) -> tuple[int, int]:
        """Ids that are in the store, and ids that may be, as of the last `begin` or `compact`."""
        there, sending = (self.table.count_rows(f"NOT new AND state = {state}") for state in (THERE, SENDING))
        return there, sending

    def compact(self) -> None:
        """Leave the newest entry of each id. Nobody else may be writing."""
        self._index("id")  # the new entries too, or each range would look at all of them
        schema, parts = ENTRY, self._parts()
        entries = (batch for part in parts for batch in _as_old(part).to_batches())
        reader = pa.RecordBatchReader.from_batches(schema, entries)
        self._table = connect(self.home).create_table(self.name, data=reader, schema=schema, mode="overwrite")
        self._index("id", "source_id")
        self.table.optimize(cleanup_older_than=timedelta(days=2))

    def _index(self, *columns: str) -> None:
        if self.table.count_rows() >= INDEXED_ENTRIES:
            for column in columns:
                self.table.create_scalar_index(column, replace=True)

    def rebuild(self, store: Store) -> None:
        """Note what a store holds, and what it does not hold any more. Of a ledger that has begun."""
        for batch in store.scan(["id", "source", "source_id", "metadata"]) if store.exists() else ():
            rows = pa.Table.from_batches([batch])
            self.note(with_digest(rows).append_column("parts", _parts_of(rows)), THERE)
        for part in self._parts():
            self.note(part.filter(pc.invert(part["new"])), GONE)
        self.begin()

    @property
    def table(self) -> Any:
        if self._table is None:
            self._table = connect(self.home).open_table(self.name)
        return self._table

    def _parts(self) -> Iterator[pa.Table]:
        """All newest entries, one range of ids after the other."""
        ranges = min(1 << 16, 1 + self.table.count_rows() // PART_ENTRIES)
        edges = [f"{(i << 16) // ranges:04x}" for i in range(ranges)]
        for first, last in zip(["", *edges[1:]], [*edges[1:], None], strict=True):
            yield _between(self.table, first, last)


def with_digest(rows: pa.Table) -> pa.Table:
    """Rows with `digest`, a hash of all that is written beside vector and text."""
    columns = (rows[name].to_pylist() for name in ("source", "source_id", "metadata"))
    digests = [content_id([each or "" for each in fields]) for fields in zip(*columns, strict=True)]
    return rows.append_column("digest", pa.array(digests, pa.string()))


def record_of(row_id: str) -> str:
    """The id of the record that a row in the store is of: windows have a number after it."""
    return row_id.partition("#")[0]


def _between(table: Any, first: str, last: str | None) -> pa.Table:
    where = f"id >= '{first}'" + (f" AND id < '{last}'" if last is not None else "")
    return _newest(table.search().where(where).select(ENTRY.names).to_arrow())


def _newest(entries: pa.Table) -> pa.Table:
    """The entry of each id that counts, without those that are gone, sorted by id."""
    entries = entries.sort_by([("id", "ascending"), ("new", "ascending"), ("state", "ascending")]).combine_chunks()
    if not len(entries):
        return entries
    ids = entries["id"]
    is_last = pa.chunked_array([*pc.not_equal(ids.slice(0, len(ids) - 1), ids.slice(1)).chunks, pa.array([True])])
    return entries.filter(pc.and_(is_last, pc.not_equal(entries["state"], GONE)))


def _as_old(entries: pa.Table) -> pa.Table:
    return entries.set_column(ENTRY.get_field_index("new"), "new", pa.array(np.zeros(len(entries), bool)))


def _parts_of(rows: pa.Table) -> pa.Array:
    """How many rows of the record there are, as far as these show: a window that was lost is not seen here."""
    ids, metadata = rows["id"].to_pylist(), rows["metadata"].to_pylist()
    return pa.array(
        [int(json.loads(m).get("parts", 1)) if "#" in i else 1 for i, m in zip(ids, metadata, strict=True)], pa.int32()
    )
