"""Rows that Pinecone did not take, set aside in a folder of Parquet files with the reason.

    letters = DeadLetters(folder)
    refused = letters.append(rows, store.upsert(rows))          # their ids
    letters.drop({"9f0c…"})                                     # once they were written after all

Several processes may append at once; one at a time drops. The vectors are in the table.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.index.stores.store import Refused
from pipeline.index.table import TEXTS
from pipeline.storage.files import matching, parquet_file, replacing
from pipeline.storage.path import StoragePath

COLUMNS = ("id", *TEXTS, "reason")
LETTERS = pa.schema([*((name, pa.string()) for name in COLUMNS), ("attempts", pa.int32())])


class DeadLetters:
    """A folder that need not be there, and is empty then."""

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder

    def append(self, rows: pa.Table, refused: Sequence[Refused]) -> set[str]:
        """Set aside those of the rows that were refused. Returns their ids."""
        why = {one.id: one for one in refused}
        if why:
            picked = rows.filter(pa.array([i in why for i in rows["id"].to_pylist()], pa.bool_()))
            ids, columns = picked["id"].to_pylist(), {name: picked[name] for name in ("id", *TEXTS)}
            columns["reason"] = pa.array([why[i].reason for i in ids], pa.string())
            columns["attempts"] = pa.array([why[i].attempts for i in ids], pa.int32())
            self._write(pa.table(columns, schema=LETTERS))
        return set(why)

    def _write(self, rows: pa.Table) -> None:
        with replacing(self.folder / f"{uuid.uuid4().hex}.parquet") as temporary:
            pq.write_table(rows, temporary, compression="zstd")

    def _files(self) -> list[StoragePath]:
        """The oldest first."""
        return sorted(matching(self.folder, "*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def read(self) -> pa.Table:
        """All of them, of each id the one that was set aside last."""
        return self._latest(self._files())

    def _latest(self, files: Sequence[StoragePath]) -> pa.Table:
        rows = pa.concat_tables([LETTERS.empty_table(), *(parquet_file(file).read() for file in files)])
        last = {i: position for position, i in enumerate(rows["id"].to_pylist())}
        return rows.take(pa.array(list(last.values()), pa.int64()))

    def ids(self) -> set[str]:
        return set(self.read()["id"].to_pylist())

    def drop(self, ids: Collection[str]) -> None:
        """Forget rows that were written after all."""
        files = self._files()
        rows = self._latest(files)
        keep = rows.filter(pa.array([i not in ids for i in rows["id"].to_pylist()], pa.bool_()))
        if len(keep) < len(rows) and len(keep):
            self._write(keep)
        for file in files if len(keep) < len(rows) else ():
            file.unlink(missing_ok=True)
