"""Reads tables: CSV with a header line, and Parquet files.

    for row in csv_rows(file, "a.csv"): ...                          # Row('a.csv:2', {'anchor': …})
    for row in parquet_rows(file, "a.parquet", ["anchor"]): ...      # Row('a.parquet:0', {'anchor': …})

CSV follows RFC 4180; cells may contain line ends. A quote that is not closed costs its own line only. Cost: CSV at
70 MB/s.

Parquet readers load only the requested columns, in batches that are sized by their bytes once decoded.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.object_store import cause
from pipeline.data.batches import BATCH_ROWS, column_indices, rows_of_batch
from pipeline.data.fields import EXCERPT_CHARS, RAW_EXCERPT_CHARS, UNREADABLE_FILE, Row, broken
from pipeline.data.input_files import (
    BUFFER_BYTES,
    MAX_LINE_BYTES,
    check_ratio,
    is_too_long,
    lines,
    may_pass,
    without_compression,
)
from pipeline.data.parquet_pages import ClosedError, Pages, first_page

CSV_SUFFIXES = (".csv", ".tsv", ".tab")
PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_CELL_CHARS = 10_000_000  # ten times the default of data.max_chars
MIN_SWALLOWED_COMMAS = 20
MAX_LINES_AGAIN = 1_000_000  # beyond four times the lines read so far: seconds of work
DECODED_BYTES = 64 << 20  # of a column in a batch; ours: 1,024 rows of 64 kB
FEW_ROWS = 64  # of a row group whose column exceeds DECODED_BYTES, because a few of its rows may be most of it
SHARED_BYTES = 2 << 20  # beyond this a dictionary is kept as one, which takes a copy of it a batch; writers stay below
MAX_LOST_ROWS = 1_000_000  # of a damaged row group that are counted, or as many as the file has bytes; ours
MAX_COLUMNS = 10_000  # of a CSV file; ours
ROW_BYTES = 2 * MAX_LINE_BYTES  # of the lines of a CSV row
LINE_BYTES = 128  # that Python takes for a line beside its characters
_DICTIONARY_PAGE = b"\x15\x04\x15"  # type 2; then the unpacked size follows
_SURROGATE = re.compile("[\udc80-\udcff]")


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
        if problem and text.row_too_long and header and not text.are_rows(len(header)):
            yield broken(f"{name}:{line}", "line_too_long", problem)
            if text.skip_row():
                continue
            yield broken(name, UNREADABLE_FILE, f"line {line}: a quote that is not closed")
            return
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
            if len(header) > MAX_COLUMNS:
                yield broken(name, UNREADABLE_FILE, f"a header of {len(header):,} columns; up to {MAX_COLUMNS:,} work")
                return
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
        return broken(position, "wrong_cell_count", f"{len(cells)} cells for {len(header)} columns: {_excerpt(cells)}")
    return Row(position, dict(zip(header, cells, strict=True)), header)


def _excerpt(cells: list[str]) -> str:
    return ",".join(cell[:RAW_EXCERPT_CHARS] for cell in cells[:EXCERPT_CHARS])


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
        self.has_surrogates = self.row_too_long = False
        self._new_reader()

    def _new_reader(self) -> None:
        self._reader = csv.reader(self._feed(), delimiter=self._delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        row, row_bytes = self.row, 0
        while self._again:
            row.append(self._again.pop())
            row_bytes = row_bytes * (len(row) > 1) + len(row[-1][1]) + LINE_BYTES
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
            row.append((self._line, text))
            row_bytes = row_bytes * (len(row) > 1) + len(text) + LINE_BYTES
            self.row_too_long = row_bytes > ROW_BYTES
            if self.row_too_long:
                raise csv.Error(f"a row that takes over {ROW_BYTES:,} bytes")
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
        return bool(columns and len(cells) != columns) or self.are_rows(columns)

    def are_rows(self, columns: int) -> bool:
        """Whether the lines of the current row have the delimiters of rows."""
        found = [text.count(self._delimiter) for _, text in self.row]
        expected = columns - 1 if columns else found[0]
        if sum(found) < (1 if self._delimiter == "\t" else MIN_SWALLOWED_COMMAS):
            return False
        return found[0] == found[-1] == expected and found.count(expected) * 10 >= len(found) * 9

    def skip_row(self) -> bool:
        """Skip the rest of the current row, without keeping it. False if the file ends before its last quote."""
        is_open = sum(text.count('"') for _, text in self.row) % 2
        while is_open and self._again:
            is_open ^= self._again.pop()[1].count('"') % 2
        while is_open and (found := next(self._lines, None)):
            self._line += 1
            is_open ^= found[1].count(b'"') % 2
        self._new_reader()
        return not is_open

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
    pages = Pages(file)
    parquet = _open_parquet(pages)
    names = parquet.schema_arrow.names
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != parquet.metadata.num_rows:
        raise pa.ArrowInvalid(f"row groups of {sum(groups):,} rows, and a footer of {parquet.metadata.num_rows:,}")
    row = sum(groups[:start])
    for group in range(start, len(groups) if stop is None else stop):
        end = row + groups[group]
        try:
            chunks = _column_chunks(pages, parquet, group, columns)
            batch_rows, shared = parquet_batching(file, parquet.metadata.row_group(group), chunks)
            reader = _open_parquet(pages, shared, parquet.metadata) if shared else parquet
            pages.expect(chunks)
            for batch in reader.iter_batches(batch_rows, row_groups=[group], columns=[*columns], use_threads=False):
                yield from rows_of_batch(batch, name, row, names)
                row += batch.num_rows
            if row < end:
                raise pa.ArrowInvalid(f"fewer rows than the {groups[group]:,} of the footer")
        except (OSError, pa.ArrowException) as error:
            if may_pass(error):
                raise
            if end - row > max(MAX_LOST_ROWS, file.seek(0, io.SEEK_END)):
                raise pa.ArrowInvalid(f"row group {group} of {groups[group]:,} rows: {cause(error)}") from None
            excerpt = f"row group {group}: {cause(error)}"
            yield from (broken(f"{name}:{lost}", "unreadable_row_group", excerpt) for lost in range(row, end))
        row = end


def _column_chunks(pages: Pages, parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> list[Any]:
    """What the footer says of each column of a row group that is read. Raises OSError if that is damaged.

    pyarrow ends the process when it is asked about a damaged column, but raises when it is about to read one.
    """
    pages.closed_to_reads = True
    try:
        next(parquet.iter_batches(1, row_groups=[group], columns=[*columns], use_threads=False), None)
    except ClosedError:
        pass
    finally:
        pages.closed_to_reads = False
    schema, metadata = parquet.schema, parquet.metadata.row_group(group)
    paths = [schema.column(i).path.partition(".")[0] for i in range(len(schema))]
    return [metadata.column(i) for i in column_indices(columns, paths)]


def _open_parquet(file: Pages, shared: Iterable[str] = (), metadata: Any = None) -> pq.ParquetFile:
    """Columns in `shared` are read as dictionaries. pyarrow's defaults would hold a whole row group in memory."""
    return pq.ParquetFile(
        file,
        metadata=metadata,
        read_dictionary=[*shared],
        buffer_size=BUFFER_BYTES,
        page_checksum_verification=True,
        pre_buffer=False,
    )


def parquet_batching(file: IO[bytes], group: Any, chunks: Iterable[Any]) -> tuple[int, dict[str, int]]:
    """How many rows of a row group may be decoded at once; the columns to read as dictionaries, and the bytes of each.

    A batch takes about DECODED_BYTES. Raises UnpackingError for a group that no text gives.
    """
    batch_rows, shared = BATCH_ROWS, dict[str, int]()
    for column in chunks:
        size, values = column.total_uncompressed_size, max(column.num_values, group.num_rows)
        check_ratio(max(size, values), column.total_compressed_size)
        # Lists may be longer in some rows than in others, and a null in a list takes no bytes.
        average = max(size, 8 * values) / max(group.num_rows, 1)
        if size > DECODED_BYTES:
            batch_rows = min(batch_rows, FEW_ROWS, int(DECODED_BYTES / average))
        elif values > group.num_rows:
            batch_rows = min(batch_rows, int(DECODED_BYTES / average))
        if BATCH_ROWS * size <= DECODED_BYTES:
            continue
        if "DELTA_BYTE_ARRAY" in column.encodings:  # a value may repeat most of the one before
            batch_rows = min(batch_rows, DECODED_BYTES // size)
        elif largest := _dictionary_bytes(file, column):
            only_indices = size - largest <= 8 * values and column.physical_type == "BYTE_ARRAY"
            if only_indices and largest > SHARED_BYTES:
                shared[column.path_in_schema] = largest
            else:
                batch_rows = min(batch_rows, DECODED_BYTES // largest)
    return max(batch_rows, 1), shared


def _dictionary_bytes(file: IO[bytes], column: Any) -> int:
    """Size of a column's dictionary, from its page header: no value is larger. 0 if there is none.

    The header is a Thrift struct in the compact protocol, which begins with the page's type and its unpacked size.
    """
    file.seek(first_page(column))
    header = file.read(len(_DICTIONARY_PAGE) + 5)
    if not header.startswith(_DICTIONARY_PAGE):
        return 0
    size = 0
    for i, byte in enumerate(header[len(_DICTIONARY_PAGE) :]):
        size |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            break
    return size // 2  # zigzag: twice a positive number


def row_group_bytes(file: IO[bytes]) -> list[int]:
    """Compressed size of each row group: its share of the file, by what it unpacks to."""
    metadata = pq.ParquetFile(file).metadata
    unpacked = [max(metadata.row_group(i).total_byte_size, 0) for i in range(metadata.num_row_groups)]
    return [file.seek(0, io.SEEK_END) * size // max(sum(unpacked), 1) for size in unpacked]
