"""Reads tables: CSV with a header line, Parquet and Arrow files.

    for row in csv_rows(file, "a.csv"): ...                          # Row('a.csv:2', {'anchor': …})
    for row in parquet_rows(file, "a.parquet", ["anchor"]): ...      # Row('a.parquet:0', {'anchor': …})

CSV follows RFC 4180; cells may contain line ends. A quote that is not closed costs its own line only. Cost: CSV at
70 MB/s.

Parquet and Arrow readers load only the requested columns. Arrow's file format (Feather v2) is its stream format between
a magic word and a footer, so both are read as streams, and a truncated file is read up to the cut.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.object_store import cause
from pipeline.data.fields import RAW_EXCERPT_CHARS, UNREADABLE_FILE, Row, broken
from pipeline.data.input_files import BUFFER_BYTES, MAX_LINE_BYTES, is_too_long, lines, may_pass, without_compression

CSV_SUFFIXES = (".csv", ".tsv", ".tab")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".arrows", ".ipc", ".feather")
MAX_CELL_CHARS = 10_000_000  # ten times the default of data.max_chars
MIN_SWALLOWED_COMMAS = 20
MAX_LINES_AGAIN = 1_000_000  # beyond four times the lines read so far: seconds of work
BATCH_ROWS = 1024
_SURROGATE = re.compile("[\udc80-\udcff]")
_FILE_MAGIC = b"ARROW1"
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # starts each message, since Arrow 0.15


def csv_rows(file: io.BufferedReader, name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Rows as header name → cell. A position is the line number, from 1, where the row begins.

    When a row cannot be parsed, or a quoted cell holds whole rows, a quote was not closed: reading goes on at the next
    line. Between tabs, such a quote is an ordinary character; otherwise its line becomes a broken row.
    """
    csv.field_size_limit(MAX_CELL_CHARS)
    delimiter = delimiter or _delimiter(name)
    text, header = _CsvLines(file, name, delimiter), list[str]()
    while True:
        line = text.begin_row()
        cells, problem = text.next_row()
        if text.too_long:
            yield from text.too_long
            text.too_long.clear()
        if cells is None:
            return
        if problem is None and len(text.row) > 1 and text.is_several_rows(cells, len(header)):
            problem = "a quote that is not closed on its line"
        if problem:
            first_line, can_go_on = text.go_back()
            problem = f"{problem}: {first_line[:RAW_EXCERPT_CHARS]}"
            if can_go_on and delimiter == "\t":
                cells, problem = first_line.rstrip("\r\n").split("\t"), None
            elif can_go_on and header:
                yield broken(f"{name}:{line}", "broken_csv", problem)
                continue
        if not header and "\0" in "".join(cells):
            problem = "a header with NUL characters"
        if problem:
            yield broken(name, UNREADABLE_FILE, f"line {line}: {problem}")
            return
        if not header:
            header = cells
        elif cells:
            yield _csv_row(cells, header, f"{name}:{line}", text.has_surrogates)


def header_problem(names: Sequence[str]) -> str | None:
    """What makes a header ambiguous, or None. The first name may be empty, as pandas writes an index."""
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        return f"column {', '.join(repeated)} more than once"
    return "a column without a name" if "" in names[1:] else None


def _csv_row(cells: list[str], header: list[str], position: str, may_have_surrogates: bool) -> Row:
    if may_have_surrogates and _SURROGATE.search(",".join(cells)):
        return broken(position, "invalid_utf8", ",".join(cells).encode("utf-8", "surrogateescape"))
    if len(cells) != len(header):
        return broken(position, "wrong_cell_count", f"{len(cells)} cells for {len(header)} columns: {','.join(cells)}")
    return Row(position, dict(zip(header, cells, strict=True)), header)


def _delimiter(name: str) -> str:
    return "\t" if without_compression(name).lower().endswith((".tsv", ".tab")) else ","


class _CsvLines:
    """The lines of a CSV file, as csv.reader consumes them, with a way back to the second line of a row.

    Bytes that are not UTF-8 become lone surrogates; overlong lines are skipped.
    """

    def __init__(self, file: io.BufferedReader, name: str, delimiter: str) -> None:
        self._lines = lines(file)
        self._name, self._delimiter = name, delimiter
        self.row: list[tuple[int, str]] = []  # number and text of each line of the current row
        self._again: list[tuple[int, str]] = []  # lines to read again, the last one first
        self.too_long: list[Row] = []
        self._line = self._lines_again = 0
        self.has_surrogates = False
        self._new_reader()

    def _new_reader(self) -> None:
        self._reader = csv.reader(self._feed(), delimiter=self._delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        row, row_chars = self.row, 0
        while self._again:
            row.append(self._again.pop())
            yield row[-1][1]
        for _, line in self._lines:
            self._line += 1
            if is_too_long(line):
                self.too_long.append(broken(f"{self._name}:{self._line}", "line_too_long", line))
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("utf-8", "surrogateescape")
                self.has_surrogates = True
            row_chars = row_chars + len(text) if row else 0
            row.append((self._line, text))
            if row_chars > MAX_LINE_BYTES:
                raise csv.Error(f"a row longer than {MAX_LINE_BYTES} characters")
            yield text

    def begin_row(self) -> int:
        """Forget the lines of the previous row. Returns the number of the next line."""
        self.row.clear()
        return self._again[-1][0] if self._again else self._line + 1

    def next_row(self) -> tuple[list[str] | None, str | None]:
        """The next row's cells (None at the end of the file) and what is wrong with it."""
        try:
            return next(self._reader, None), None
        except csv.Error as error:
            return [], str(error)

    def is_several_rows(self, cells: list[str], columns: int) -> bool:
        """Whether the lines of the current row are rows of their own, because a quote was not closed.

        They are if they give the wrong number of cells together, or the right number each. The latter may be chance in
        text with commas, but not for many of them: at least 20 in the row (ours). Text rarely has tabs.
        """
        if columns and len(cells) != columns:
            return True
        found = [text.count(self._delimiter) for _, text in self.row]
        expected = columns - 1 if columns else found[0]
        if sum(found) < (1 if self._delimiter == "\t" else MIN_SWALLOWED_COMMAS):
            return False
        return found[0] == found[-1] == expected and found.count(expected) * 10 >= len(found) * 9

    def go_back(self) -> tuple[str, bool]:
        """Return to the current row's second line. Returns the first one, and whether to go on.

        One cannot go on if most of the file has been read several times, because its quotes match nowhere.
        """
        self._again.extend(reversed(self.row[1:]))
        self._lines_again += len(self.row) - 1
        self._new_reader()
        return self.row[0][1], self._lines_again <= 4 * self._line + MAX_LINES_AGAIN


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
