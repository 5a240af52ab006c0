"""A shuffle through files: tasks write their rows cut by partition, and a later one reads a partition out of them all.

    write_parts(table, [1, 0, 1], 2, Path("exchange/00007-0.parts"))      # rows 1 | 0 and 2
    read_part([Path("exchange/00007-0.parts"), …], 1)                     # rows 0 and 2, and those of the other files

A file begins with where each partition lies in it, 8 bytes a partition, so that a reader fetches its own two numbers
and its own rows and no more: an Arrow file's footer, 24 bytes a partition, would be read whole by each of them. Cost:
where a file and a partition meet, a record batch with some 1.4 KB of overhead, none where it has no rows, and in a
bucket three requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage.files import for_each
from pipeline.storage.path import StoragePath

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
_PLACE = np.dtype("<u8")


def write_parts(table: pa.Table, partition: Sequence[int] | npt.NDArray[np.int64], parts: int, path: Path) -> None:
    """Write `table` cut by partition; `partition` says which each row belongs to."""
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(np.asarray(partition)[order], np.arange(parts + 1))
    table = table.take(order).combine_chunks()
    places = np.zeros(parts + 2, _PLACE)  # of the schema, of each partition, and the end
    with path.open("wb") as file:
        file.write(places.tobytes())
        places[0] = file.tell()
        with pa.ipc.new_stream(file, table.schema, options=_OPTIONS) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist([], table.schema))  # brings the schema before it
            for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
                places[part + 1] = file.tell()
                if stop > start:
                    writer.write_batch(table.slice(start, stop - start).to_batches()[0])
            places[-1] = file.tell()
        file.seek(0)
        file.write(places.tobytes())


def read_part(files: Sequence[StoragePath], partition: int) -> pa.Table:
    """The rows of one partition, in the order of the files, of which there is one or more."""
    schema = pa.ipc.read_schema(pa.py_buffer(_between(files[0], 0)))

    def batches(path: StoragePath) -> list[pa.RecordBatch]:
        found = _between(path, partition + 1)
        return [pa.ipc.read_record_batch(pa.py_buffer(found), schema)] if found else []

    return pa.Table.from_batches(itertools.chain.from_iterable(for_each(files[0], batches, files)), schema)


def _between(path: StoragePath, place: int) -> bytes:
    """What lies between the place of this number and the next."""
    with path.open("rb") as file:
        file.seek(place * _PLACE.itemsize)
        start, stop = np.frombuffer(file.read(2 * _PLACE.itemsize), _PLACE).tolist()
        file.seek(start)
        return bytes(file.read(stop - start))
