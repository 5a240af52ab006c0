"""Rows of Parquet and Arrow files; columns that nobody asks for are not read.

Arrow's file format (Feather v2) is its stream format between a magic word and a footer, so both are read as streams,
from any place that bytes come from, and of a file that is cut in half what lies before the cut is read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.fields import Row, broken
from pipeline.data.input_files import BUFFER_BYTES, may_pass
from pipeline.storage.object_store import cause

PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".arrows", ".ipc", ".feather")
BATCH_ROWS = 1024
_FILE_MAGIC = b"ARROW1"
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # of a message, since Arrow 0.15


def parquet_rows(
    file: IO[bytes], name: str, columns: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[Row]:
    """Rows of the row groups `start` to `stop`, positions by row number; the rest of one that breaks off is broken."""
    # With pyarrow's defaults, no buffer size and pre_buffer, a whole row group is held.
    # Checksums are verified where a file has them.
    parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True, pre_buffer=False)
    names = parquet.schema_arrow.names
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    row = sum(groups[:start])
    for group in range(start, len(groups) if stop is None else stop):
        end = row + groups[group]
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[*columns], use_threads=False):
                yield from batch_rows(batch, name, row, names)
                row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            if may_pass(error):
                raise
            excerpt = f"row group {group}: {cause(error)}"
            yield from (broken(f"{name}:{lost}", "unreadable_row_group", excerpt) for lost in range(row, end))
        row = end


def row_group_bytes(file: IO[bytes]) -> list[int]:
    """Bytes of each row group in a file."""
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [sum(group.column(j).total_compressed_size for j in range(group.num_columns)) for group in groups]


def arrow_rows(file: io.BufferedReader, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of an Arrow file or stream, positions by row number."""
    beginning = file.peek()
    if not beginning:
        return
    is_file = beginning.startswith(_FILE_MAGIC)
    if is_file:
        file.read(8)  # the magic word and its padding
    if not file.peek().startswith(_STREAM_MAGIC):
        raise pa.ArrowInvalid("neither an Arrow file nor a stream")
    first = 0
    with pa.ipc.open_stream(file) as stream:
        names = stream.schema.names
        wanted = asked_for(columns, names)
        for batch in stream:
            for i in range(0, batch.num_rows, BATCH_ROWS):
                rows = batch.slice(i, BATCH_ROWS)
                yield from batch_rows(rows.select(wanted), name, first + i, names)
            first += batch.num_rows
        if is_file and not file.read().endswith(_FILE_MAGIC):
            raise pa.ArrowInvalid("the file ends before its footer")


def asked_for(columns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Indices of the columns that the paths begin with."""
    return [i for i, name in enumerate(names) if any(path == name or path.startswith(f"{name}.") for path in columns)]


def batch_rows(batch: pa.RecordBatch, name: str, first: int, names: Sequence[str]) -> Iterator[Row]:
    """A batch's rows. Where one has a value that cannot be read, that one is broken and the others are not."""
    positions = [f"{name}:{i}" for i in range(first, first + batch.num_rows)]
    try:
        batch.validate(full=True)  # or a damaged Arrow file would have its offsets followed to anywhere in memory
        values = batch.to_pylist()
    except _NO_VALUE:
        yield from (_one_row(batch.slice(i, 1), position, names) for i, position in enumerate(positions))
        return
    yield from (Row(position, row, names) for position, row in zip(positions, values, strict=True))


_NO_VALUE = (ValueError, OverflowError, pa.ArrowException)  # the first two of times that Python has no type for


def _one_row(row: pa.RecordBatch, position: str, names: Sequence[str]) -> Row:
    try:
        row.validate(full=True)
        return Row(position, row.to_pylist()[0], names)
    except _NO_VALUE as error:
        return broken(position, "invalid_utf8" if "UTF8" in str(error) else "unreadable_value", cause(error))
