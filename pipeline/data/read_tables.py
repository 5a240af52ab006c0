"""Reads tables: CSV with a header line, Parquet and Arrow files.

    for row in csv_rows(file, "a.csv"): ...                          # Row('a.csv:2', {'anchor': …})
    for row in parquet_rows(file, "a.parquet", ["anchor"]): ...      # Row('a.parquet:0', {'anchor': …})

CSV follows RFC 4180; cells may contain line ends. An unclosed quote loses at most MAX_CELL_CHARS: they become one
broken row, and the next line starts a new one. Cost: CSV at 70 MB/s.

Parquet and Arrow readers load only the requested columns. Arrow's file format (Feather v2) is its stream format between
a magic word and a footer, so both are read as streams, and a truncated file is read up to the cut.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.object_store import cause
from pipeline.data.fields import RAW_EXCERPT_CHARS, Row, broken
from pipeline.data.input_files import BUFFER_BYTES, is_too_long, lines, may_pass, without_compression

CSV_SUFFIXES = (".csv", ".tsv", ".tab")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".arrows", ".ipc", ".feather")
MAX_CELL_CHARS = 10_000_000  # ten times the default of data.max_chars
BATCH_ROWS = 1024
_FILE_MAGIC = b"ARROW1"
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # starts each message, since Arrow 0.15


def csv_rows(file: io.BufferedReader, name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Rows as header name → cell. A position is the line number, from 1, where the row begins."""
    csv.field_size_limit(MAX_CELL_CHARS)
    text = _CsvLines(file, name)
    reader = csv.reader(text, delimiter=delimiter or _delimiter(name), strict=True)
    header: list[str] = []
    while True:
        position = f"{name}:{text.line + 1}"
        cells, problem = _next_row(reader)
        if cells and not header and "\0" in "".join(cells):
            problem = "a header with NUL characters"
        yield from text.pop_too_long()
        if problem:
            yield broken(position, "broken_csv", f"{problem}: {text.last[:RAW_EXCERPT_CHARS]}")
            if not header:
                return
        elif cells is None:
            return
        elif not header:
            header = cells
        elif cells:
            yield _csv_row(cells, header, position, text)


def header_problem(names: Sequence[str]) -> str | None:
    """What makes a header ambiguous, or None. The first name may be empty, as pandas writes an index."""
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        return f"column {', '.join(repeated)} more than once"
    return "a column without a name" if "" in names[1:] else None


def _next_row(reader: Iterator[list[str]]) -> tuple[list[str] | None, str | None]:
    """The next row's cells (None at the end of the file) and what is wrong with it."""
    try:
        return next(reader, None), None
    except csv.Error as error:
        return [], str(error)


def _csv_row(cells: list[str], header: list[str], position: str, text: _CsvLines) -> Row:
    if text.pop_has_surrogates(cells):
        return broken(position, "invalid_utf8", ",".join(cells).encode("utf-8", "surrogateescape"))
    if len(cells) != len(header):
        return broken(position, "wrong_cell_count", f"{len(cells)} cells for {len(header)} columns: {','.join(cells)}")
    return Row(position, dict(zip(header, cells, strict=True)), header)


def _delimiter(name: str) -> str:
    return "\t" if without_compression(name).lower().endswith((".tsv", ".tab")) else ","


class _CsvLines:
    """Feeds lines to csv.reader. Bytes that are not UTF-8 become lone surrogates; overlong lines are skipped."""

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        self._lines = lines(file)
        self._name = name
        self._too_long: list[Row] = []
        self._has_surrogates = False
        self.line = 0
        self.last = ""

    def __iter__(self) -> Iterator[str]:
        for _, line in self._lines:
            self.line += 1
            if is_too_long(line):
                self._too_long.append(broken(f"{self._name}:{self.line}", "line_too_long", line))
                continue
            try:
                self.last = line.decode("utf-8")
            except UnicodeDecodeError:
                self.last = line.decode("utf-8", "surrogateescape")
                self._has_surrogates = True
            yield self.last

    def pop_too_long(self) -> list[Row]:
        """Broken rows for the lines skipped since the last call."""
        rows, self._too_long = self._too_long, []
        return rows

    def pop_has_surrogates(self, cells: list[str]) -> bool:
        """Whether a row has bytes that are not UTF-8; resets the flag that its lines set."""
        if not self._has_surrogates:
            return False
        self._has_surrogates = False
        return any("\udc80" <= character <= "\udcff" for cell in cells for character in cell)


def parquet_rows(
    file: IO[bytes], name: str, columns: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[Row]:
    """Rows of the row groups `start` to `stop`; a position is a row number. Damage breaks the rest of its group."""
    # pyarrow's defaults (no buffer size, pre_buffer) would hold a whole row group in memory.
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
    """Compressed size of each row group."""
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [sum(group.column(j).total_compressed_size for j in range(group.num_columns)) for group in groups]


def arrow_rows(file: io.BufferedReader, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of an Arrow file or stream; a position is the row number."""
    beginning = file.peek()
    if not beginning:
        return
    is_file = beginning.startswith(_FILE_MAGIC)
    if is_file:
        file.read(8)  # the magic word and its padding
    if not file.peek().startswith(_STREAM_MAGIC):
        raise pa.ArrowInvalid("not an Arrow file or stream")
    first = 0
    with pa.ipc.open_stream(file) as stream:
        names = stream.schema.names
        indices = column_indices(columns, names)
        for batch in stream:
            for i in range(0, batch.num_rows, BATCH_ROWS):
                rows = batch.slice(i, BATCH_ROWS)
                yield from batch_rows(rows.select(indices), name, first + i, names)
            first += batch.num_rows
        if is_file and not file.read().endswith(_FILE_MAGIC):
            raise pa.ArrowInvalid("the file ends before its footer")


def column_indices(columns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Indices of the columns that hold these fields; the nested field `a.b` is in column `a`."""
    return [i for i, name in enumerate(names) if any(path == name or path.startswith(f"{name}.") for path in columns)]


def batch_rows(batch: pa.RecordBatch, name: str, first: int, names: Sequence[str]) -> Iterator[Row]:
    """A batch's rows. An unreadable value breaks only its own row."""
    positions = [f"{name}:{i}" for i in range(first, first + batch.num_rows)]
    try:
        batch.validate(full=True)  # damaged offsets in an Arrow file could point anywhere in memory
        values = batch.to_pylist()
    except _UNREADABLE:
        yield from (_single_row(batch.slice(i, 1), position, names) for i, position in enumerate(positions))
        return
    yield from (Row(position, row, names) for position, row in zip(positions, values, strict=True))


_UNREADABLE = (ValueError, OverflowError, pa.ArrowException)  # times that Python cannot represent raise the first two


def _single_row(row: pa.RecordBatch, position: str, names: Sequence[str]) -> Row:
    try:
        row.validate(full=True)
        return Row(position, row.to_pylist()[0], names)
    except _UNREADABLE as error:
        return broken(position, "invalid_utf8" if "UTF8" in str(error) else "unreadable_value", cause(error))
