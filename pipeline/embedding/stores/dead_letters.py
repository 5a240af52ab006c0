"""Rows that a store did not take, set aside in a folder of Parquet files with the reason.

    letters = DeadLetters(folder, width=256)
    letters.append(rows, store.upsert(rows))
    again = letters.read()                            # SCHEMA's columns, `reason`, `attempts`
    left = letters.append(again, store.upsert(again))
    letters.drop(set(again["id"].to_pylist()) - left)

A row without a vector was an update. Several processes may append at once; one at a time drops.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embedding.stores.store import SCHEMA, TEXTS, Refused
from pipeline.storage.files import matching, parquet_file, replacing
from pipeline.storage.path import StoragePath


class DeadLetters:
    """A folder that need not be there, and is empty then."""

    def __init__(self, folder: StoragePath, width: int) -> None:
        self.folder = folder
        self.schema = SCHEMA(width).append(pa.field("reason", pa.string())).append(pa.field("attempts", pa.int32()))

    def append(self, rows: pa.Table, refused: Sequence[Refused]) -> set[str]:
        """Set aside those of the rows that were refused; several with one id as one. Returns their ids."""
        why = {one.id: one for one in refused}
        ids = [i or "" for i in rows["id"].to_pylist()]
        at = {i: position for position, i in enumerate(ids) if i in why}
        if not at:
            return set()
        picked = rows.take(pa.array(list(at.values()), pa.int64()))
        columns = {name: picked[name] for name in ("id", *TEXTS)}
        columns["vector"] = picked["vector"] if "vector" in rows.column_names else pa.nulls(len(at))
        columns["reason"] = pa.array([why[i].reason for i in at], pa.string())
        columns["attempts"] = pa.array([why[i].attempts for i in at], pa.int32())
        self._write(pa.table([columns[name] for name in self.schema.names], names=self.schema.names).cast(self.schema))
        return set(at)

    def _write(self, rows: pa.Table) -> StoragePath:
        path = self.folder / f"{uuid.uuid4().hex}.parquet"
        with replacing(path) as temporary:
            pq.write_table(rows, temporary, compression="zstd")
        return path

    def _files(self) -> list[StoragePath]:
        """The oldest first."""
        return sorted(matching(self.folder, "*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def read(self) -> pa.Table:
        """All of them, of each id the one that was set aside last."""
        rows = pa.concat_tables([self.schema.empty_table(), *(parquet_file(file).read() for file in self._files())])
        last = {i: position for position, i in enumerate(rows["id"].to_pylist())}
        return rows.take(pa.array(list(last.values()), pa.int64()))

    def count(self) -> int:
        return len(self.read())

    def drop(self, ids: Collection[str]) -> None:
        """Forget rows that were written after all."""
        files, rows = self._files(), self.read()
        keep = rows.filter(pa.array([i not in ids for i in rows["id"].to_pylist()], pa.bool_()))
        if len(keep):
            self._write(keep)
        for file in files:
            file.unlink(missing_ok=True)
