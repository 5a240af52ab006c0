"""Stores rejected rows with the reason, as Parquet files: texts without a vector, and rows that Pinecone refused.

    letters = DeadLetters(folder)
    refused = letters.append(rows, store.upsert(rows))          # ids of the rejected rows
    letters.drop({"9f0c…"})                                     # after a later write succeeded

Several processes may append at once; only one may drop. Vectors are not stored here, but in the table.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import parquet_file, replacing, sorted_glob
from pipeline.core.path import StoragePath
from pipeline.index.table import TEXTS

LETTERS = pa.schema([*((name, pa.string()) for name in ("id", *TEXTS, "reason")), ("attempts", pa.int32())])


class Refused(NamedTuple):
    """A rejected row, the reason, and the number of attempts (0 if it was never sent)."""

    id: str
    reason: str
    attempts: int


class DeadLetters:
    """A folder of rejected rows; it exists only if there are some."""

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder

    def append(self, rows: pa.Table, refused: Sequence[Refused]) -> set[str]:
        """Store the rows that were refused. Returns their ids."""
        by_id = {each.id: each for each in refused}
        if by_id:
            candidates = rows.select(["id", *TEXTS]).to_pylist()
            letters = [{**row, **by_id[row["id"]]._asdict()} for row in candidates if row["id"] in by_id]
            self._write(pa.Table.from_pylist(letters, LETTERS))
        return set(by_id)

    def _write(self, rows: pa.Table) -> None:
        with replacing(self.folder / f"{uuid.uuid4().hex}.parquet") as temporary:
            pq.write_table(rows, temporary, compression="zstd")

    def read(self) -> pa.Table:
        """All rejected rows; the latest of each id."""
        return self._read()[1]

    def _read(self) -> tuple[list[StoragePath], pa.Table]:
        files = sorted(sorted_glob(self.folder, "*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        rows = pa.concat_tables([LETTERS.empty_table(), *(parquet_file(file).read() for file in files)])
        last = {i: position for position, i in enumerate(rows["id"].to_pylist())}
        return files, rows.take(pa.array(list(last.values()), pa.int64()))

    def ids(self) -> set[str]:
        return set(self.read()["id"].to_pylist())

    def drop(self, ids: Collection[str]) -> None:
        """Remove rows that have been written since."""
        files, rows = self._read()
        keep = rows.filter(pa.array([i not in ids for i in rows["id"].to_pylist()], pa.bool_()))
        if len(keep) < len(rows):
            if len(keep):
                self._write(keep)
            for file in files:
                file.unlink(missing_ok=True)
