"""Writes a version of the vector table as a folder of plain Parquet files.

    folder = write_snapshot(table, config.root / "parquet", progress)       # <home>/<table>-<hash>/
    pyarrow.parquet.read_table(folder / "rows")                          # id, source, source_id, places, …, vector

Each file holds a range of ids, sorted. The folder is complete once it has `manifest.json`; then older snapshots of the
table are removed. Costs a pass over the table, and nothing if the table has not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.artifact import Artifact, Output
from pipeline.core.files import remove_folder
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.index.table import DERIVED, VectorTable


def write_snapshot(table: VectorTable, home: StoragePath, progress: Callable[[], Progress]) -> StoragePath:
    """Write the table's newest version to a folder in `home`, and return it. Only one process may write at a time."""
    version = table.version()
    place = hashlib.sha256(str(table.path).encode()).hexdigest()[:8]  # separates tables with the same name
    name = f"{table.name}-{place}"
    artifact = Artifact(home, name, sorted(table.files(version)))
    parts, count = table.ranges(version), table.count()

    def work(index: int, output: Output) -> int:
        rows = table.read([each for each in table.schema.names if each not in DERIVED], parts[index], version)
        output.write_table(f"rows/{index:05d}.parquet", _plain(rows.sort_by("id")))
        return len(rows)

    def fill() -> dict[str, Any]:
        part_bytes = -(-count // len(parts)) * (4 * table.width + 1_000)
        counts = artifact.tasks(progress(), "parquet: write", [part_bytes] * len(parts), work)
        return {"table": str(table.path), "version": version, "rows": sum(counts)}

    artifact.make(fill)
    for folder in home.glob(f"{name}-*"):
        if folder != artifact.folder:
            remove_folder(folder)
    return artifact.folder


def _plain(rows: pa.Table) -> pa.Table:
    """Convert vectors to lists of float32, which every Parquet reader supports."""
    vectors = rows["vector"].combine_chunks()
    flat = pa.array(vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(len(rows) + 1, dtype=np.int32) * vectors.type.list_size), flat)
    return rows.set_column(rows.column_names.index("vector"), "vector", lists)
