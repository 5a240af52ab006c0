"""The vector table: a Lance dataset that is the only truth about what is embedded.

    table = VectorTable(home, "quickstart-9f0c4e…", width=256)
    table.create()
    with table.writing() as writer:                         # one writer at a time
        fragments = table.write(rows)                       # on any node; nobody sees them yet
        writer.append(fragments)                            # one commit for many fragments
        writer.delete(row_ids)
    table.read(["id", "digest"], between=("40", "80"))      # a range of ids, by the zone map on id

A row is a distinct text, or one chunk of a long text:

    id          hash of the text; of a chunk, "<hash of the text>#00002"
    source      source, source_id and metadata (JSON) of the first record with this text
    places      these three of all its records
    digest      32 hex digits that hash `places`, then 16 that hash `text` and `vector`
    vector      of `width` numbers in float32 or float16; with vector_type binary, `bits` has their signs
    parent_id   with chunks: the hash of the text

Appends never conflict in Lance, so a commit whose reply was lost is looked for in the newest version before it is tried
again. A job begins to write with a `restore` of the newest version, which changes nothing and conflicts with every
commit of a writer that began before it: one that was paused and lost its lock cannot commit any more.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.embedding.columns import as_matrix
from pipeline.embedding.stores.store import StoreError
from pipeline.runtime.console import log
from pipeline.runtime.outcome import alone_in
from pipeline.storage.files import lance_location, remove_folder
from pipeline.storage.path import StoragePath, check_guards

# NOTE: Ray starts its processes by fork and exec, which Lance's threads outlive; it warns of forks that go on.
warnings.filterwarnings("ignore", "lance is not fork-safe")
# Lance's own 2 GB would read a whole table ahead of whoever scans it.
os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(1 << 27))
os.environ.setdefault("LANCE_LOG", "error")

PLACE = pa.struct([("source", pa.string()), ("source_id", pa.string()), ("metadata", pa.string())])
TEXTS = ("source", "source_id", "text", "metadata")
DIGEST_CHARS = 32  # of `places`; that of text and vector follows
ZONE_ROWS, ZONES = 1_024, 131_072  # of the zone map: a range of ids reads about a zone too many at either end
SCAN_ROWS = 8_192
SQL_IDS = 8_192  # ids in one condition; 10 µs each to parse
TAKEN_OVER = "another job has begun to write to {}; run the same command again to continue"
COMMIT_ATTEMPTS = 5
DELETED_AT_ONCE = 100_000
READ_FOR = timedelta(hours=1)  # how long a search or a scan may go on reading an old version
VERIFIED = "verified-"  # a tag: this and the key of the documents that a version holds
DTYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.float16(), "binary": pa.float16()}


@dataclass(frozen=True)
class VectorTable:
    """A table in a folder on disk or in a bucket. Pickled, it opens the table anew in each process."""

    home: StoragePath
    name: str
    width: int
    vector_type: str = "float32"
    chunks: bool = False

    @property
    def path(self) -> StoragePath:
        return self.home / f"{self.name}.lance"

    @property
    def schema(self) -> pa.Schema:
        fields = [
            pa.field("id", pa.string(), nullable=False),
            *((name, pa.string()) for name in ("source", "source_id")),
            ("places", pa.list_(PLACE)),
            *((name, pa.string()) for name in ("text", "metadata", "digest")),
            ("vector", pa.list_(DTYPES[self.vector_type], self.width)),
        ]
        fields += [("bits", pa.list_(pa.uint8(), -(-self.width // 8)))] if self.vector_type == "binary" else []
        fields += [("parent_id", pa.string())] if self.chunks else []
        return pa.schema(fields)

    def exists(self) -> bool:
        return next(iter((self.path / "_versions").glob("*.manifest")), None) is not None

    def empty(self) -> None:
        """Leave no rows and no indexes, whatever there is now. Readers go on with an old version for a while."""
        import lance

        uri, options = lance_location(self.path)
        try:
            self.open()
        except (ValueError, StoreError):  # what is there is no table any more
            remove_folder(self.path)
        lance.write_dataset(
            self.schema.empty_table(), uri, mode="overwrite", storage_options=options, enable_stable_row_ids=True
        )

    def create(self) -> None:
        """Make the table if it is not there. Raises StoreError for another program's table, or another model's."""
        import lance

        uri, options = lance_location(self.path)
        if not self.exists():
            empty = self.schema.empty_table()
            lance.write_dataset(empty, uri, mode="create", storage_options=options, enable_stable_row_ids=True)
        there = self.open().schema
        missing = [name for name in self.schema.names if name not in there.names]
        if missing:
            raise StoreError(
                f"table {self.path} has no column {missing[0]}: another program made it; choose another folder with "
                "embedding.uri=DIR"
            )
        found, wanted = there.field("vector").type, self.schema.field("vector").type
        if found != wanted:
            raise StoreError(
                f"table {self.path} holds vectors of type {found}, the model gives {wanted}; choose another folder "
                "with embedding.uri=DIR"
            )

    def open(self, version: int | None = None) -> Any:
        """The lance.LanceDataset, as it is now or at a version. Raises StoreError if there is none."""
        try:
            return open_dataset(self.path, version)
        except ValueError as error:
            if self.exists():
                raise
            raise StoreError(f"found no table {self.path}; python jobs/embed.py makes it") from error

    def is_verified(self, dataset: Any, documents: str = "") -> bool:
        """Whether a job has verified just this version, and, where they are given, for these documents."""
        tags = dataset.tags.list().items()
        return any(tag["version"] == dataset.version for name, tag in tags if name.startswith(VERIFIED + documents))

    def open_verified(self) -> Any:
        """The newest version that a job has verified; the newest of all if there is none."""
        dataset = self.open()
        tags = [tag["version"] for name, tag in dataset.tags.list().items() if name.startswith(VERIFIED)]
        return self.open(max(tags)) if tags and max(tags) != dataset.version else dataset

    def count(self) -> int:
        return int(self.open().count_rows())

    def version(self) -> int:
        return int(self.open().version)

    def scan(self, columns: Sequence[str], where: str | None = None, version: int | None = None) -> Iterator[Any]:
        """Record batches of these columns, in no order to rely on; `where` is SQL. `_rowid` may be a column."""
        plain = [name for name in columns if name != "_rowid"]
        yield from self.open(version).to_batches(
            plain, filter=where, batch_size=SCAN_ROWS, with_row_id="_rowid" in columns
        )

    def read(
        self, columns: Sequence[str], between: tuple[str, str | None] = ("", None), version: int | None = None
    ) -> pa.Table:
        """These columns of the rows whose ids are in a range; the second bound is not in it."""
        first, last = between
        limits = ([f"id >= {quoted(first)}"] if first else []) + ([f"id < {quoted(last)}"] if last is not None else [])
        batches = list(self.scan(columns, " AND ".join(limits) or None, version))
        schema = pa.schema(
            [pa.field("_rowid", pa.uint64()) if n == "_rowid" else self.schema.field(n) for n in columns]
        )
        return pa.Table.from_batches([batch.select(list(columns)) for batch in batches], schema=schema)

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        """The rows with these ids that are there, in no order to rely on."""
        dataset = self.open()
        parts = [dataset.to_table(self.schema.names, filter=some) for some in among("id", ids)]
        return pa.concat_tables([self.schema.empty_table(), *(part.cast(self.schema) for part in parts)])

    def take(self, row_ids: np.ndarray, columns: Sequence[str], version: int) -> pa.Table:
        """Rows of a version by `_rowid`, in no order to rely on."""
        dataset, schema = self.open(version), pa.schema([self.schema.field(name) for name in columns])
        parts = [dataset.to_table(list(columns), filter=some) for some in among("_rowid", row_ids.tolist())]
        return pa.concat_tables([schema.empty_table(), *(part.cast(schema) for part in parts)])

    def write(self, rows: pa.Table) -> list[tuple[str, str, int]]:
        """Write rows of `schema`, sorted by id, as fragments that no reader sees until they are committed.

        Returns the first id, the fragment as JSON, and the rows of each.
        """
        from lance.fragment import write_fragments

        uri, options = lance_location(self.path)
        found, row = [], 0
        if not len(rows):
            return []
        for fragment in write_fragments(rows, uri, mode="append", storage_options=options):
            found.append((str(rows["id"][row]), json.dumps(fragment.to_json()), int(fragment.physical_rows)))
            row += int(fragment.physical_rows)
        return found

    def typed(self, rows: pa.Table) -> pa.Table:
        """Rows of some of the columns, typed as the table has them; Parquet names the children of lists otherwise."""
        return rows.cast(pa.schema([self.schema.field(name) for name in rows.column_names]))

    def stored(self, rows: pa.Table) -> pa.Table:
        """Rows with a float32 `vector`, as `schema` has them; the digest gets that of text and vector."""
        vectors = as_matrix(rows["vector"]).astype(DTYPES[self.vector_type].to_pandas_dtype())
        columns: dict[str, Any] = {name: rows[name] for name in rows.column_names}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.width)
        if self.vector_type == "binary":
            bits = np.packbits(vectors > 0, axis=1)
            columns["bits"] = pa.FixedSizeListArray.from_arrays(pa.array(bits.ravel()), bits.shape[1])
        columns["digest"] = pc.binary_join_element_wise(rows["digest"], content_digests(rows["text"], vectors), "")
        return self.typed(pa.table({name: columns[name] for name in self.schema.names}))

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Hold the table as its only writer. Raises JobError if another job writes to it."""
        with alone_in(self.path):
            yield Writer(self)


@lru_cache(maxsize=1)
def _session() -> Any:
    """Lance's cache of this process: a task for each range reads the footers of files but once."""
    import lance

    return lance.Session()  # type: ignore[attr-defined]


def open_dataset(path: StoragePath, version: int | None = None) -> Any:
    """The lance.LanceDataset in a folder. Raises ValueError where there is none."""
    import lance

    uri, options = lance_location(path)
    return lance.dataset(uri, version=version, storage_options=options, session=_session())


class Writer:
    """Commits to a table, by the one process that holds it. Errors of Lance come as OSError and RuntimeError."""

    def __init__(self, table: VectorTable) -> None:
        self.table = table
        table.create()
        self.dataset = table.open()
        self.was_verified = table.is_verified(self.dataset)
        self._began = False

    def begin(self) -> None:
        """Make commits of writers that began earlier fail."""
        if not self._began:
            check_guards(self.table.path)
            self.table.open().restore()
            self.dataset = self.table.open()
            self._began = True

    def append(self, fragments: Sequence[str]) -> None:
        """Commit fragments that `VectorTable.write` gave, all of them or none, once."""
        import lance
        from lance.fragment import FragmentMetadata

        found = [FragmentMetadata.from_json(each) for each in fragments]
        uri, options = lance_location(self.table.path)
        files = {file.path for fragment in found for file in fragment.files}

        attempts = 0

        def commit(dataset: Any) -> None:
            nonlocal attempts
            attempts += 1
            held = [each.metadata.files for each in dataset.get_fragments()] if attempts > 1 else []
            if files <= {file.path for some in held for file in some}:
                return  # by an attempt whose reply was lost
            # Without retries of Lance's own: one would commit again what a lost reply has committed.
            lance.LanceDataset.commit(
                uri,
                lance.LanceOperation.Append(found),
                read_version=dataset.version,
                storage_options=options,
                max_retries=0,
            )

        if found:
            self._commit(commit)

    def delete(self, row_ids: np.ndarray) -> None:
        """Delete rows by `_rowid`."""
        for start in range(0, len(row_ids), DELETED_AT_ONCE):
            some = ", ".join(map(str, row_ids[start : start + DELETED_AT_ONCE].tolist()))
            self._commit(partial(_delete, f"_rowid IN ({some})"))

    def index_words(self, settings: dict[str, Any]) -> None:
        """Build the index of words; a version that was verified stays so."""
        self._commit(lambda dataset: dataset.create_scalar_index("text", "INVERTED", **settings))
        if self.was_verified:
            for name in self.dataset.tags.list():
                if name.startswith(VERIFIED):
                    self.dataset.tags.update(name, self.dataset.version)

    def clean_up(self) -> None:
        """Remove old versions that no tag names, and files of jobs that were killed."""
        self.refresh()
        check_guards(self.table.path)
        self.dataset.cleanup_old_versions(READ_FOR, delete_unverified=True, error_if_tagged_old_versions=False)

    def drop_index(self, name: str) -> None:
        self._commit(lambda dataset: dataset.drop_index(name))

    def mark_verified(self, documents: str) -> None:
        """Note that the newest version holds the documents of this key, and no others."""
        self.refresh()
        self.forget_verified()
        self.dataset.tags.create(VERIFIED + documents, self.dataset.version)

    def forget_verified(self) -> None:
        check_guards(self.table.path)
        for name in self.dataset.tags.list():
            if name.startswith(VERIFIED):
                self.dataset.tags.delete(name)

    def refresh(self) -> None:
        """Turn to the newest version. Raises StoreError if another writer has begun since the last one."""
        import lance

        newest = self.table.open()
        since = (
            newest.get_transactions(newest.version - self.dataset.version)
            if newest.version > self.dataset.version
            else []
        )
        if any(each and isinstance(each.operation, lance.LanceOperation.Restore) for each in since):
            raise StoreError(TAKEN_OVER.format(self.table.path))
        self.dataset = newest

    def tag(self, name: str, version: int) -> None:
        """Let a tag name a version."""
        check_guards(self.table.path)
        try:
            self.dataset.tags.update(name, version)
        except ValueError:  # there is none of that name
            self.dataset.tags.create(name, version)

    def untag(self, name: str) -> None:
        check_guards(self.table.path)
        self.dataset.tags.delete(name)

    def _commit(self, commit: Callable[[Any], Any]) -> None:
        """Commit on top of the newest version, and again where it is not known to have failed.

        Raises LockLost or StoreError if another writer has begun, or what Lance raised the last time.
        """
        from lance.commit import CommitConflictError

        self.begin()
        for attempt in range(1, COMMIT_ATTEMPTS + 1):
            check_guards(self.table.path)
            try:
                commit(self.dataset)
                break
            except (OSError, RuntimeError, CommitConflictError) as error:
                if "concurrent transaction Restore" in str(error):
                    raise StoreError(TAKEN_OVER.format(self.table.path)) from error
                if attempt == COMMIT_ATTEMPTS or is_disk_full(error):
                    raise
                log.debug("%s: a commit failed, which is tried again: %s", self.table.name, error)
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
                self.refresh()
        self.refresh()


def _delete(where: str, dataset: Any) -> None:
    dataset.delete(where)


def is_disk_full(error: BaseException) -> bool:
    return "No space left on device" in str(error) or "os error 28" in str(error)


def content_digests(texts: pa.ChunkedArray, vectors: np.ndarray) -> pa.Array:
    """Hashes of texts and of the rows of an (N, D) matrix as it is stored, 16 hex digits each."""
    rows = np.ascontiguousarray(vectors)
    seeds = map(xxhash.xxh3_64_intdigest, pc.fill_null(texts, "").cast(pa.binary()).to_pylist())
    return pa.array([xxhash.xxh3_64_hexdigest(row, seed) for row, seed in zip(rows, seeds, strict=True)], pa.string())


def among(column: str, values: Sequence[str] | Sequence[int]) -> Iterator[str]:
    """SQL that holds for rows with one of these values, so many values at a time."""
    for start in range(0, len(values), SQL_IDS):
        yield f"{column} IN ({', '.join(map(quoted, values[start : start + SQL_IDS]))})"


def quoted(value: str | int) -> str:
    """A text or a number as SQL writes it."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
