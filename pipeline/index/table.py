"""The vector table: a Lance dataset, the single source of truth about what is embedded.

    table = VectorTable(home, "quickstart-9f0c4e…", width=256)
    table.create()
    with table.writing() as writer:                         # one writer at a time: writer.py
        writer.append(table.write(rows))                    # any node writes fragments, the writer commits them
    table.read(["id", "digest"], between=("40", "80"))      # a range of ids, found by the zone map on id

A row is a distinct text, or one chunk of a long text:

    id          hash of the text; for a chunk "<hash of the text>#00002"
    source      source, source_id and metadata (JSON) of the first record with this text
    places      the same three columns for all records with this text
    digest      32 hex digits that hash `places`, then 16 that hash `text` and `vector`
    vector      `width` numbers in float32 or float16; with vector_type binary, `bits` has their signs
    parent_id   with chunks: the hash of the text
    words       the text's words between blanks, for the full-text index
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.core.files import disk_bytes, lance_location, remove_folder
from pipeline.core.lock import LockLost, Occupied, locked
from pipeline.core.outcome import JobError, command, job_lock
from pipeline.core.path import StoragePath
from pipeline.data.partitions import id_bounds
from pipeline.index.vectors import as_matrix
from pipeline.index.words import search_words

if TYPE_CHECKING:
    from pipeline.index.writer import Writer

# NOTE: the warning is for forks without exec; Ray forks and then executes a new program.
warnings.filterwarnings("ignore", "lance is not fork-safe")
# Lance's default of 2 GB would read a whole table ahead of a scan.
os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(1 << 27))
os.environ.setdefault("LANCE_LOG", "error")

PLACE = pa.struct([("source", pa.string()), ("source_id", pa.string()), ("metadata", pa.string())])
TEXTS = ("source", "source_id", "text", "metadata")
DERIVED = ("bits", "words")  # columns that follow from others
DIGEST_CHARS = 32  # hash of `places`; the hash of text and vector follows
ZONE_ROWS, ZONES = 1_024, 131_072  # minimum rows per zone, maximum zones; a range of ids reads two zones too many
RANGE_ROWS = 100_000  # ids per task of a push or a snapshot
SCAN_ROWS = 8_192
SQL_IDS = 8_192  # ids per condition; each takes 10 µs to parse
READ_FOR = timedelta(hours=1)  # how long searches and scans can read an old version
VERIFIED = "verified-"  # prefix of a tag; the key of the version's documents follows
DTYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.float16(), "binary": pa.float16()}

IdRange: TypeAlias = tuple[str, str | None]
"""The first id of a range, and the first id after it; None if the range is open-ended."""


class StoreError(JobError):
    """A vector table or Pinecone index cannot be used. Rows that were already written stay."""


class Fragment(NamedTuple):
    """Written rows that are invisible to readers until a `Writer` commits them."""

    first_id: str
    rows: int
    metadata: str
    """Lance's metadata, as JSON."""


@dataclass(frozen=True)
class VectorTable:
    """A table in a folder on disk or in a bucket. It can be pickled."""

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
        fields += [("words", pa.string())]
        return pa.schema(fields)

    def exists(self) -> bool:
        return next(iter((self.path / "_versions").glob("*.manifest")), None) is not None

    def empty(self) -> None:
        """Delete all rows and indexes; also repairs a broken table. Readers can still use the old version."""
        try:
            self.open()
        except (ValueError, StoreError):  # missing or broken
            remove_folder(self.path)
        self._write_empty("overwrite")

    def _write_empty(self, mode: str) -> None:
        import lance

        uri, options = lance_location(self.path)
        rows = self.schema.empty_table()
        lance.write_dataset(rows, uri, mode=mode, storage_options=options, enable_stable_row_ids=True)

    def create(self) -> None:
        """Create the table unless it exists. Raises StoreError if it belongs to another program or model."""
        if not self.exists():
            self._write_empty("create")
        existing = self.open().schema
        missing = [name for name in self.schema.names if name not in existing.names]
        if missing:
            raise StoreError(
                f"table {self.path} has no column {missing[0]}: another program or an older version made it; choose "
                "another folder with embedding.uri=DIR"
            )
        found, expected = existing.field("vector").type, self.schema.field("vector").type
        if found != expected:
            raise StoreError(
                f"table {self.path} holds vectors of type {found}, the model gives {expected}; choose another folder "
                "with embedding.uri=DIR"
            )

    def open(self, version: int | None = None) -> Any:
        """The lance.LanceDataset at a version, or the newest. Raises StoreError if the table does not exist."""
        try:
            return open_dataset(self.path, version)
        except ValueError as error:
            if self.exists():
                raise
            raise StoreError(f"found no table {self.path}; run {command('embed')} first") from error

    def is_verified(self, dataset: Any, documents: str = "") -> bool:
        """Whether a job verified exactly this version; with a key of `documents`, for these documents."""
        return dataset.version in tags_of(dataset, VERIFIED + documents).values()

    def open_verified(self) -> Any:
        """The newest verified version, or the newest version if none is verified."""
        dataset = self.open()
        versions = tags_of(dataset, VERIFIED).values()
        return self.open(max(versions)) if versions else dataset

    def count(self) -> int:
        return int(self.open().count_rows())

    def version(self) -> int:
        return int(self.open().version)

    def ranges(self, version: int) -> list[IdRange]:
        """Split all ids of a version into ranges of about RANGE_ROWS rows."""
        count = max(1, -(-int(self.open(version).count_rows()) // RANGE_ROWS))
        return [id_range(index, count) for index in range(count)]

    def files(self, version: int) -> set[str]:
        """The fragments of a version. Versions with equal fragments hold the same rows."""
        fragments = self.open(version).get_fragments()
        return {json.dumps(fragment.metadata.to_json(), sort_keys=True) for fragment in fragments}

    def pinned_bytes(self) -> int:
        """The size of files that only old tagged versions use; a push keeps them until the next push."""
        newest = self.open()
        pinned = dict[str, int]()
        for version in set(tags_of(newest, "").values()):
            pinned |= _file_bytes(self.open(version))
        return sum(pinned[path] for path in pinned.keys() - _file_bytes(newest))

    def scan(self, columns: Sequence[str], where: str | None = None, version: int | None = None) -> Iterator[Any]:
        """Yield record batches of these columns, in any order; `where` is SQL. `_rowid` may be a column."""
        plain = [name for name in columns if name != "_rowid"]
        yield from self.open(version).to_batches(
            plain, filter=where, batch_size=SCAN_ROWS, with_row_id="_rowid" in columns
        )

    def read(self, columns: Sequence[str], between: IdRange = ("", None), version: int | None = None) -> pa.Table:
        """These columns of the rows with an id in a range, which excludes its end."""
        first, last = between
        limits = ([f"id >= {quoted(first)}"] if first else []) + ([f"id < {quoted(last)}"] if last is not None else [])
        batches = list(self.scan(columns, " AND ".join(limits) or None, version))
        schema = pa.schema(
            [pa.field("_rowid", pa.uint64()) if n == "_rowid" else self.schema.field(n) for n in columns]
        )
        return pa.Table.from_batches([batch.select(list(columns)) for batch in batches], schema=schema)

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        """The existing rows with these ids, in any order."""
        return self._rows(self.open(), self.schema.names, among("id", ids))

    def take(self, row_ids: np.ndarray, columns: Sequence[str], version: int) -> pa.Table:
        """Rows of a version by `_rowid`, in any order."""
        return self._rows(self.open(version), columns, among("_rowid", row_ids.tolist()))

    def _rows(self, dataset: Any, columns: Sequence[str], conditions: Iterable[str]) -> pa.Table:
        schema = pa.schema([self.schema.field(name) for name in columns])
        parts = [dataset.to_table(list(columns), filter=condition).cast(schema) for condition in conditions]
        return pa.concat_tables([schema.empty_table(), *parts])

    def write(self, rows: pa.Table) -> list[Fragment]:
        """Write rows of `schema`, sorted by id, as fragments."""
        from lance.fragment import write_fragments

        uri, options = lance_location(self.path)
        fragments, row = list[Fragment](), 0
        written = write_fragments(rows, uri, mode="append", storage_options=options) if len(rows) else ()
        for fragment in written:
            count = int(fragment.physical_rows)
            fragments.append(Fragment(str(rows["id"][row]), count, json.dumps(fragment.to_json())))
            row += count
        return fragments

    def typed(self, rows: pa.Table) -> pa.Table:
        """Cast columns to the table's types; Parquet names the children of lists differently."""
        return rows.cast(pa.schema([self.schema.field(name) for name in rows.column_names]))

    def stored(self, rows: pa.Table) -> pa.Table:
        """Convert rows with a float32 `vector` to `schema`: append the hash of text and vector to the digest."""
        vectors = as_matrix(rows["vector"]).astype(DTYPES[self.vector_type].to_pandas_dtype())
        columns: dict[str, Any] = {name: rows[name] for name in rows.column_names}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.width)
        if self.vector_type == "binary":
            bits = np.packbits(vectors > 0, axis=1)
            columns["bits"] = pa.FixedSizeListArray.from_arrays(pa.array(bits.ravel()), bits.shape[1])
        columns["words"] = pa.array([text and search_words(text) for text in rows["text"].to_pylist()], pa.string())
        columns["digest"] = pc.binary_join_element_wise(rows["digest"], content_digests(rows["text"], vectors), "")
        return self.typed(pa.table({name: columns[name] for name in self.schema.names}))

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Lock the table and return its writer. Raises JobError if another job is writing to it."""
        from pipeline.index.writer import Writer

        with job_lock(self.path):
            yield Writer(self)


@lru_cache(maxsize=1)
def _session() -> Any:
    """Lance's cache, shared by all tasks of this process, so that each file footer is read once."""
    import lance

    return lance.Session()  # type: ignore[attr-defined]


def open_dataset(path: StoragePath, version: int | None = None) -> Any:
    """The lance.LanceDataset in a folder. Raises ValueError if there is none."""
    import lance

    uri, options = lance_location(path)
    return lance.dataset(uri, version=version, storage_options=options, session=_session())


def forget_versions(folder: StoragePath, age: timedelta) -> float:
    """Remove a table's versions older than `age`, at least an hour. Returns the bytes freed."""
    before = disk_bytes(folder)
    # skips broken tables (errors of Lance), and tables that a job has locked
    with suppress(OSError, RuntimeError, ValueError, Occupied, LockLost), locked(folder):
        open_dataset(folder).cleanup_old_versions(max(age, READ_FOR), error_if_tagged_old_versions=False)
    return max(0.0, before - disk_bytes(folder))


def parse_metadata(text: str | None) -> dict[str, Any]:
    """The `metadata` of a row or a place; empty for text that is not a JSON object."""
    try:
        metadata = json.loads(text or "{}")
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def content_digests(texts: pa.ChunkedArray, vectors: np.ndarray) -> pa.Array:
    """Hash each text with its row of the stored (N, D) matrix, to 16 hex digits."""
    rows = np.ascontiguousarray(vectors)
    seeds = map(xxhash.xxh3_64_intdigest, pc.fill_null(texts, "").cast(pa.binary()).to_pylist())
    return pa.array([xxhash.xxh3_64_hexdigest(row, seed) for row, seed in zip(rows, seeds, strict=True)], pa.string())


def among(column: str, values: Sequence[str] | Sequence[int]) -> Iterator[str]:
    """Yield SQL conditions for rows with one of these values, SQL_IDS values per condition."""
    for start in range(0, len(values), SQL_IDS):
        yield f"{column} IN ({', '.join(map(quoted, values[start : start + SQL_IDS]))})"


def quoted(value: str | int) -> str:
    """A text or a number as an SQL literal."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _file_bytes(dataset: Any) -> dict[str, int]:
    fragments = dataset.get_fragments()
    return {file.path: file.file_size_bytes or 0 for each in fragments for file in each.metadata.files}


def tags_of(dataset: Any, prefix: str) -> dict[str, int]:
    """Tag → version, for tags that begin with `prefix`."""
    return {name: tag["version"] for name, tag in dataset.tags.list().items() if name.startswith(prefix)}


def id_range(index: int, count: int) -> IdRange:
    """One of `count` ranges of about equal size that together cover every possible id."""
    first, last = id_bounds(index, count)
    return first if index else "", last if index + 1 < count else None
