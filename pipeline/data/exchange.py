"""A shuffle through files: tasks write their rows cut by partition, and a later one reads a partition out of them all.

    write_parts(table, [1, 0, 1], 2, Path("exchange/00007-0.arrow"))      # rows 1 | 0 and 2
    read_part([Path("exchange/00007-0.arrow"), …], 1)                     # rows 0 and 2, and those of the other files

A file appears whole or not at all, so a job that was killed goes on with the tasks whose files are not there yet.
Cost: a file and a partition meet in one record batch, about 1 KB of overhead each, and in a bucket a few requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.runtime.files import for_each, replacing
from pipeline.storage.bucket import AnyPath

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write_parts(table: pa.Table, partition: Sequence[int] | npt.NDArray[np.int64], parts: int, path: AnyPath) -> None:
    """Write `table` with one record batch a partition; `partition` says which each row belongs to."""
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(np.asarray(partition)[order], np.arange(parts + 1))
    table = table.take(order).combine_chunks()
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), table.schema, options=_OPTIONS) as writer:
        for start, stop in itertools.pairwise(bounds):
            rows = table.slice(start, stop - start)
            writer.write_batch(rows.to_batches()[0] if len(rows) else pa.RecordBatch.from_pylist([], table.schema))


def read_part(files: Sequence[AnyPath], partition: int) -> pa.Table:
    """The rows of one partition, in the order of the files, of which there is one or more."""

    def batch(path: AnyPath) -> pa.RecordBatch:
        with pa.memory_map(str(path)) if isinstance(path, Path) else path.open() as file:
            return pa.ipc.open_file(file).get_batch(partition)

    return pa.Table.from_batches(for_each(files[0], batch, files))
