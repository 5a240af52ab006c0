"""A folder of Parquet files, which anything reads: no server, no index, exact.

    <uri>/<name>/000000000001.parquet            rows that were written together, with SCHEMA's columns
    <uri>/<name>/000000000002.parquet            a column `id` alone: rows that were removed
    <uri>/<name>/000000000002.base/part-00000.parquet    what was left of all up to 2 when `finish` was called

Files are numbered in the order in which they came to be, and of an id the last one counts. A file is written under
another name and then linked to the next free number, so that several processes write at once and none overwrites
another's. No number after the base is left out: a listing that was made while files came may miss one, and is seen to.
What a base took the place of is removed by the `finish` after, so that whoever reads it is not disturbed.
A query reads all vectors, block by block; a reader holds the ids that came after the base.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.embedding.nearest import nearest_rows
from pipeline.embedding.stores.rows import checked, checked_query, kept, with_vectors
from pipeline.embedding.stores.store import SCHEMA, Refused, StoreError
from pipeline.embedding.stores.where import checked_where
from pipeline.storage.files import SUFFIX

SCAN_ROWS = 8192
LISTINGS = 5  # of a folder in which files come and go, until one is whole
PART_BATCHES = 100  # of a base's files: 819,200 rows


class _Segment(NamedTuple):
    """Files that came to be at once."""

    number: int
    is_base: bool
    path: Path

    @property
    def files(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.is_base else [self.path]

    @property
    def removes(self) -> bool:
        return not self.is_base and pq.read_schema(self.path).names == ["id"]

    def batches(self, columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
        for file in self.files:
            yield from pq.ParquetFile(file).iter_batches(SCAN_ROWS, columns=list(columns))

    def ids(self) -> Iterator[str]:
        for batch in self.batches(["id"]):
            yield from batch["id"].to_pylist()


class ParquetStore:
    """One folder, which `create` makes where it is not there."""

    def __init__(self, uri: str, name: str, width: int) -> None:
        self.uri, self.name, self.width = uri, name, width

    @property
    def folder(self) -> Path:
        return Path(self.uri) / self.name

    def exists(self) -> bool:
        return self.folder.is_dir()

    def create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = next((file for segment in self._segments() if not segment.removes for file in segment.files), None)
        found = pq.read_schema(file).field("vector").type.list_size if file else self.width
        if found != self.width:
            raise StoreError(f"{self.folder} holds vectors of {found} numbers; the model gives {self.width}")

    def _all(self) -> list[_Segment]:
        if not self.exists():
            raise StoreError(f"found no folder {self.folder}; python jobs/embed.py makes it")
        matches = [re.fullmatch(r"(\d{12})\.(base|parquet)", path.name) for path in self.folder.iterdir()]
        return [_Segment(int(m[1]), m[2] == "base", self.folder / m[0]) for m in matches if m]

    def _file(self, number: int) -> _Segment:
        return _Segment(number, False, self.folder / f"{number:012d}.parquet")

    def _segments(self) -> list[_Segment]:
        """What counts, the newest first; at the end the base, where there is one."""
        for _ in range(LISTINGS):
            found = self._all()
            bases = sorted(segment for segment in found if segment.is_base)[-1:]
            last = max((segment.number for segment in found), default=0)
            files = [self._file(number) for number in range(last, bases[0].number if bases else 0, -1)]
            missing = [file.path for file in set(files).difference(found) if not file.path.exists()]
            if not missing:
                return files + bases
        raise StoreError(f"found no {min(missing)}, but files that came after it; put it back, or embed anew")

    def _append(self, rows: pa.Table) -> None:
        """A new file of the next free number."""
        temporary = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        try:
            pq.write_table(rows, temporary, compression="zstd", use_dictionary=["source"])
            number = max((segment.number for segment in self._segments()), default=0)
            while not self._linked(temporary, number := number + 1):
                pass
        finally:
            temporary.unlink(missing_ok=True)

    def _linked(self, temporary: Path, number: int) -> bool:
        file = self._file(number)
        try:
            os.link(temporary, file.path)
        except FileExistsError:
            return False
        if file not in self._segments():
            file.path.unlink(missing_ok=True)  # the number was free only because a base had taken its file's place
            return False
        return True

    def count(self) -> int:
        segments = self._segments()
        if all(segment.is_base for segment in segments):
            return sum(pq.read_metadata(file).num_rows for segment in segments for file in segment.files)
        return sum(len(batch) for batch in self.scan(["id"]))

    def ids(self) -> Iterator[list[str]]:
        for batch in self.scan(["id"]):
            yield batch["id"].to_pylist()

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of every row, batch by batch, in no order to rely on."""
        return _live(self._segments(), columns)

    def fetch(self, ids: Sequence[str]) -> pa.Table:
        schema, missing = SCHEMA(self.width), set(ids)
        found = [schema.empty_table()]
        for segment in self._segments() if missing else []:
            there = missing.intersection(segment.ids())
            if there and not segment.removes:
                wanted = pc.field("id").isin(pa.array(sorted(there), pa.string()))
                found += [pq.read_table(file, filters=wanted, partitioning=None) for file in segment.files]
            missing -= there
        return pa.concat_tables([table.select(schema.names).cast(schema) for table in found])

    def upsert(self, rows: pa.Table) -> list[Refused]:
        good, refused = checked(rows, self.width, self.name)
        if len(good):
            self._append(good)
        return refused

    def update(self, rows: pa.Table) -> list[Refused]:
        return self.upsert(with_vectors(rows, self.fetch(rows["id"].to_pylist())))

    def delete(self, ids: Sequence[str]) -> None:
        if ids:
            self._append(pa.table({"id": pa.array(list(ids), pa.string())}))

    def query(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        vector, where = checked_query(vector, self.width, self.name), checked_where(where)
        rows = self.scan(SCHEMA(self.width).names)
        return nearest_rows(rows, vector, k, partial(kept, where) if where else None)

    def describe(self) -> dict[str, Any]:
        facts = {"kind": "parquet", "rows": self.count(), "width": self.width, "metric": "cosine"}
        return {**facts, "index": "none, each query looks at all rows", "place": self.uri, "name": self.name}

    def finish(self) -> None:
        """A base in place of what was written so far; what comes meanwhile stays beside it."""
        segments = self._segments()
        past = [segment for segment in self._all() if any(segment < base for base in segments if base.is_base)]
        if any(not segment.is_base for segment in segments):
            temporary = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            temporary.mkdir()
            try:
                _write_parts(_live(segments, SCHEMA(self.width).names), temporary, SCHEMA(self.width))
                temporary.rename(self.folder / f"{segments[0].number:012d}.base")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process has just done the same
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        for segment in past:
            shutil.rmtree(segment.path, ignore_errors=True) if segment.is_base else segment.path.unlink(missing_ok=True)


def _live(segments: Sequence[_Segment], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Each id's last row, of segments of which the newest comes first."""
    newer: set[str] = set()
    for position, segment in enumerate(segments):
        for batch in segment.batches(dict.fromkeys(["id", *columns])) if not segment.removes else ():
            if newer:
                batch = batch.filter(pa.array([i not in newer for i in batch["id"].to_pylist()], pa.bool_()))
            if len(batch):
                yield batch.select(list(columns))
        if position < len(segments) - 1:
            newer.update(segment.ids())


def _write_parts(batches: Iterator[pa.RecordBatch], folder: Path, schema: pa.Schema) -> None:
    """Files of so many batches; none where there are no rows."""
    for part in count():
        some = list(islice(batches, 1))
        if not some:
            return
        with pq.ParquetWriter(folder / f"part-{part:05d}.parquet", schema, compression="zstd") as writer:
            for batch in chain(some, islice(batches, PART_BATCHES - 1)):
                writer.write_batch(batch.cast(schema))
