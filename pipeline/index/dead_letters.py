"""Rows that have no vector, or that Pinecone did not take, set aside in a folder of Parquet files with the reason.

    letters = DeadLetters(folder)
    refused = letters.append(rows, store.upsert(rows))          # their ids
    letters.drop({"9f0c…"})                                     # once they were written after all

Several processes may append at once; one at a time drops. The vectors are in the table.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import matching, parquet_file, replacing
from pipeline.core.path import StoragePath
from pipeline.index.table import TEXTS

LETTERS = pa.schema([*((name, pa.string()) for name in ("id", *TEXTS, "reason")), ("attempts", pa.int32())])


class Refused(NamedTuple):
    """A row that was not written, why, and how often it was tried (0 where it could not be sent at all)."""

    id: str
    reason: str
    attempts: int


class DeadLetters:
    """A folder, which is missing while there are none."""

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder

    def append(self, rows: pa.Table, refused: Sequence[Refused]) -> set[str]:
        """Set aside those of the rows that were refused. Returns their ids."""
        why = {one.id: one for one in refused}
        if why:
            picked = rows.select(["id", *TEXTS]).to_pylist()
            self._write(
                pa.Table.from_pylist(
                    [{**row, **why[row["id"]]._asdict()} for row in picked if row["id"] in why], LETTERS
                )
            )
        return set(why)

    def _write(self, rows: pa.Table) -> None:
        with replacing(self.folder / f"{uuid.uuid4().hex}.parquet") as temporary:
            pq.write_table(rows, temporary, compression="zstd")

    def read(self) -> pa.Table:
        """All of them; of each id the one that was set aside last."""
        return self._read()[1]

    def _read(self) -> tuple[list[StoragePath], pa.Table]:
        files = sorted(matching(self.folder, "*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        rows = pa.concat_tables([LETTERS.empty_table(), *(parquet_file(file).read() for file in files)])
        last = {i: position for position, i in enumerate(rows["id"].to_pylist())}
        return files, rows.take(pa.array(list(last.values()), pa.int64()))

    def ids(self) -> set[str]:
        return set(self.read()["id"].to_pylist())

    def drop(self, ids: Collection[str]) -> None:
        """Forget rows that were written after all."""
        files, rows = self._read()
        keep = rows.filter(pa.array([i not in ids for i in rows["id"].to_pylist()], pa.bool_()))
        if len(keep) < len(rows):
            if len(keep):
                self._write(keep)
            for file in files:
                file.unlink(missing_ok=True)
