"""A store kept in step with the prepared records: what is new is embedded, what changed beside the text rewritten, what
is gone removed, and the rest left alone.

    for batch in job.due(records_file):                    # rows that the ledger does not have as they are now
        job.write(job.encoded(batch, encoder))
    job.remove(records_file)

Everything here runs in one process and knows no Ray, which only spreads it (embedding/embed.py). A record file holds a
range of ids, so it is compared with that range of the ledger, and nothing holds all ids. A row is noted in the ledger
before it is sent and again when it is there: after a kill the next run finds what may be there, and sends it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.embedding.cache import VectorCache
from pipeline.embedding.columns import as_column, as_matrix
from pipeline.embedding.ledger import GONE, SENDING, THERE, Ledger, record_of, with_digest
from pipeline.embedding.stores.store import SCHEMA, Refused, Store
from pipeline.embedding.texts import EMBED, UPDATE, Reading
from pipeline.runtime.artifact import open_parquet
from pipeline.storage.files import for_each
from pipeline.storage.path import StoragePath

if TYPE_CHECKING:
    from pipeline.embedding.encode import TextEncoder  # torch, which what only reads can do without

COUNTS = ("new", "changed", "metadata", "untouched", "deleted", "embedded", "written", "refused")
"""What is counted: documents by what became of them, vectors that were made, rows that were and were not written."""
ROWS = 1024  # records looked at, and encoded, together: seconds of work


@dataclass(frozen=True)
class Span:
    """A record file, and the ids that it would hold: from `first` up to `last`, which is not among them."""

    file: StoragePath
    first: str
    last: str | None


def spans(files: list[StoragePath]) -> list[Span]:
    """The files of a prepared set's records, each with its range; together they are all ids there can be."""
    least_ids = for_each(files[0], _least_id, files) if files else []
    filled = [(file, least) for file, least in zip(files, least_ids, strict=True) if least is not None]
    edges = ["", *(least for _, least in filled[1:]), None]
    return [Span(file, first or "", last) for (file, _), (first, last) in zip(filled, pairwise(edges), strict=True)]


def _least_id(file: StoragePath) -> str | None:
    """The first id of a record file, which is sorted by it; None where it has no rows."""
    with open_parquet(file) as parquet:
        batch = next(parquet.iter_batches(1, columns=["id"]), None)
    return str(batch["id"][0]) if batch is not None and len(batch) else None


@dataclass(frozen=True)
class Sync:
    """A job of embedding: where records come from, how they are read, and what is kept where."""

    field: str
    reading: Reading
    store: Store
    ledger: Ledger
    cache: VectorCache | None

    @property
    def columns(self) -> dict[str, str]:
        """A store's columns → those of the record files."""
        return {name: self.field if name == "text" else name for name in SCHEMA(1).names if name != "vector"}

    def due(self, span: Span, counts: Counter[str]) -> Iterator[pa.Table]:
        """Records that the store lacks, or has with other metadata: the columns of a store, `digest` and `action`."""
        there = _records(self.ledger.between(span.first, span.last))
        with open_parquet(span.file) as parquet:
            for batch in parquet.iter_batches(ROWS, columns=list(self.columns.values())):
                rows = with_digest(pa.Table.from_batches([batch]).rename_columns(list(self.columns)))
                actions = [
                    _action(there.get(record_id), digest)
                    for record_id, digest in zip(rows["id"].to_pylist(), rows["digest"].to_pylist(), strict=True)
                ]
                rows = rows.append_column("action", pa.array(actions, pa.string()))
                self._count(rows, counts, first_run=not there)
                rows = rows.filter(pa.array([action is not None for action in actions], pa.bool_()))
                if len(rows):
                    yield rows

    def _count(self, rows: pa.Table, counts: Counter[str], *, first_run: bool) -> None:
        """New documents, and those whose text changed: their id is new, and their source_id is not."""
        new = rows.filter(pc.equal(rows["action"], EMBED))
        changed = 0
        if len(new) and not first_run:
            held = self.ledger.holding(new["source_id"].to_pylist())
            changed = sum(
                key in held for key in zip(*(new[n].to_pylist() for n in ("source", "source_id")), strict=True)
            )
        updates = pc.sum(pc.equal(rows["action"], UPDATE)).as_py() or 0
        counts.update(
            new=len(new) - changed, changed=changed, metadata=updates, untouched=len(rows) - len(new) - updates
        )

    def ready(self, rows: pa.Table, tokenizer: Tokenizer) -> pa.Table:
        """Due records as the rows to write, tokenized where no vector is known."""
        return self.reading.rows(rows, tokenizer, self.cache)

    def encoded(self, rows: pa.Table, encoder: TextEncoder) -> pa.Table:
        """Rows with all vectors that are to be written, and `fresh` where they were not known."""
        fresh = np.asarray(rows["tokens"].combine_chunks().is_valid())
        vectors = np.zeros((len(rows), encoder.width), np.float32)
        known = rows["vector"].combine_chunks()
        null = np.asarray(known.is_null())
        if not null.all():
            vectors[~null] = as_matrix(known.drop_null())
        if fresh.any():
            vectors[fresh] = encoder.encode_tokens(rows["tokens"].filter(pa.array(fresh)))
        rows = rows.drop_columns(["tokens", "vector"])
        return rows.append_column("vector", as_column(vectors, null & ~fresh)).append_column("fresh", pa.array(fresh))

    def write(self, rows: pa.Table, counts: Counter[str]) -> list[Refused]:
        """Bring rows to the store, and note it. Returns what could not be written."""
        update = pc.equal(rows["action"], UPDATE)
        new = rows.filter(pc.invert(update))
        fresh = new.filter(new["fresh"])
        if self.cache is not None:
            self.cache.put(fresh["key"].to_pylist(), as_matrix(fresh["vector"]))
        refused = self._upsert(new) + self._update(rows.filter(update))
        counts.update(embedded=len(fresh), written=len(rows) - len(refused), refused=len(refused))
        return refused

    def _upsert(self, rows: pa.Table) -> list[Refused]:
        if not len(rows):
            return []
        self.ledger.note(rows, SENDING)
        refused = self.store.upsert(rows.select(SCHEMA(self.store.width).names))
        self.ledger.note(_without(rows, refused), THERE)
        return refused

    def _update(self, rows: pa.Table) -> list[Refused]:
        if not len(rows):
            return []
        refused = self.store.update(rows.select(list(self.columns)))
        self.ledger.note(_without(rows, refused), THERE)
        return refused

    def vanished(self, span: Span) -> pa.Table:
        """Ledger entries of records that are no longer in the file."""
        entries = self.ledger.between(span.first, span.last)
        ids = set(open_parquet(span.file).read(columns=["id"])["id"].to_pylist())
        gone = [record_of(row_id) not in ids for row_id in entries["id"].to_pylist()]
        return entries.filter(pa.array(gone, pa.bool_()))

    def remove(self, span: Span, counts: Counter[str]) -> None:
        """Delete what has vanished from the prepared records."""
        entries = self.vanished(span)
        for start in range(0, len(entries), ROWS):
            part = entries.slice(start, ROWS)
            self.store.delete(part["id"].to_pylist())
            self.ledger.note(part, GONE)
        counts.update(deleted=len(entries))

    def tidy(self, cache_bytes: float) -> dict[str, Any]:
        """Join what many writes left, and index what is large; once nobody writes. Returns what the store then is."""
        self.store.finish()
        self.ledger.compact()
        if self.cache is not None:
            self.cache.trim(cache_bytes)
        return self.store.describe()


def _action(there: tuple[str, bool] | None, digest: str) -> str | None:
    if there is None or not there[1]:
        return EMBED
    return None if there[0] == digest else UPDATE


def _records(entries: pa.Table) -> dict[str, tuple[str, bool]]:
    """Of each record: the digest, and whether all of its rows are there."""
    found: dict[str, tuple[str, int, int]] = {}
    columns = (entries[name].to_pylist() for name in ("id", "digest", "parts", "state"))
    for row_id, digest, parts, state in zip(*columns, strict=True):
        if state == THERE:
            record = record_of(row_id)
            found[record] = (digest, parts, found.get(record, ("", 0, 0))[2] + 1)
    return {record: (digest, count >= parts) for record, (digest, parts, count) in found.items()}


def _without(rows: pa.Table, refused: list[Refused]) -> pa.Table:
    bad = {each.id for each in refused}
    return rows.filter(pa.array([row_id not in bad for row_id in rows["id"].to_pylist()], pa.bool_())) if bad else rows


def sync_here(sync: Sync, files: list[Span], encoder: TextEncoder) -> tuple[Counter[str], list[Refused]]:
    """Bring the store up to date in this process. Returns the counts, and what the store refused."""
    counts: Counter[str] = Counter()
    refused: list[Refused] = []
    for span in files:
        for rows in sync.due(span, counts):
            refused += sync.write(sync.encoded(sync.ready(rows, encoder.tokenizer), encoder), counts)
    for span in files:
        sync.remove(span, counts)
    return counts, refused
