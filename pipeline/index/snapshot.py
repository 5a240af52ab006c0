"""A version of the vector table as a folder of Parquet files, which anything reads.

    folder = write_snapshot(table, config.root / "parquet", progress)       # <home>/<table>-<hash>/
    pyarrow.parquet.read_table(folder / "rows")                          # id, source, source_id, places, …, vector

Files hold ranges of ids, sorted. The folder is complete once `manifest.json` is there; then other snapshots of the same
table are removed. Costs a pass over the table, and nothing where no row was written, deleted or moved since.
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
from pipeline.index.table import VectorTable


def write_snapshot(table: VectorTable, home: StoragePath, progress: Callable[[], Progress]) -> StoragePath:
    """The folder below `home` of the table's newest version, which one process at a time writes."""
    version = table.version()
    place = hashlib.sha256(str(table.path).encode()).hexdigest()[:8]  # tables of one name in several folders
    name = f"{table.name}-{place}"
    artifact = Artifact(home, name, sorted(table.files(version)))
    parts, rows = table.ranges(version), table.count()

    def work(index: int, output: Output) -> int:
        found = table.read([each for each in table.schema.names if each != "bits"], parts[index], version)
        output.write_table(f"rows/{index:05d}.parquet", _plain(found.sort_by("id")))
        return len(found)

    def fill() -> dict[str, Any]:
        row_bytes = -(-rows // len(parts)) * (4 * table.width + 1_000)
        counts = artifact.tasks(progress(), "parquet: write", [row_bytes] * len(parts), work)
        return {"table": str(table.path), "version": version, "rows": sum(counts)}

    artifact.make(fill)
    for folder in home.glob(f"{name}-*"):
        if folder != artifact.folder:
            remove_folder(folder)
    return artifact.folder


def _plain(rows: pa.Table) -> pa.Table:
    """With vectors as lists of float32, which every reader knows."""
    vectors = rows["vector"].combine_chunks()
    flat = pa.array(vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(len(rows) + 1, dtype=np.int32) * vectors.type.list_size), flat)
    return rows.set_column(rows.column_names.index("vector"), "vector", lists)
