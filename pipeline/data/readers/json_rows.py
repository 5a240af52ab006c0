"""Rows of JSON: an object a line, or a file that holds one value, an array of objects or an object over several lines.

Lines parse at 100 MB/s and more. Of a file that holds one value a row is held at a time; where it is broken the rest
of it cannot be read.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

import ijson

from pipeline.data.fields import Row, broken
from pipeline.data.filesystem import without_compression
from pipeline.data.readers.lines import MAX_LINE_BYTES, is_too_long, lines

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*LINE_SUFFIXES, ".json")

_DECODER = json.JSONDecoder(parse_constant=lambda constant: None)  # NaN and infinity are no JSON, but are written


def rows(file: io.BufferedReader, name: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows of the lines that begin in bytes `start` to `stop`, or of the one value that the file holds."""
    kind = "lines" if start else shape(file, name)
    if kind == "lines":
        found = lines(file, start, stop)
        return (_row(line, f"{name}:{offset}") for offset, line in found if line and not line.isspace())
    return _values(file, name, "item" if kind == "array" else "")


def shape(file: io.BufferedReader, name: str) -> str:
    """`lines`, `array` or `object` (over several lines): by the name, else by how the file begins."""
    if without_compression(name).lower().endswith(LINE_SUFFIXES):
        return "lines"
    beginning = file.peek().removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.startswith(b"["):
        return "array"
    first_line, line_end, _ = beginning.partition(b"\n")
    goes_on = line_end and first_line.startswith(b"{") and first_line.rstrip().endswith((b"{", b"[", b","))
    return "object" if goes_on else "lines"


def _row(line: bytes, position: str) -> Row:
    if is_too_long(line):
        return broken(position, "line_too_long", line)
    try:
        values = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return broken(position, "invalid_utf8", line)
    except (ValueError, RecursionError):
        return broken(position, "broken_json", line)
    return _object(values, position)


def _object(values: Any, position: str) -> Row:
    if not isinstance(values, dict):
        return broken(position, "broken_json", f"found a {type(values).__name__}, not an object")
    return Row(position, values)


def _values(file: io.BufferedReader, name: str, prefix: str) -> Iterator[Row]:
    """The values of an array (`item`), or those that the file holds one after another; positions count them."""
    if file.peek().startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    bounded, index = _Bounded(file), 0
    try:
        for values in ijson.items(bounded, prefix, use_float=True, multiple_values=not prefix):
            yield _object(values, f"{name}:{index}")
            bounded.left = MAX_LINE_BYTES
            index += 1
    except (ijson.JSONError, UnicodeDecodeError) as error:
        yield broken(f"{name}:{index}", "broken_json", " ".join(str(error).split()))
    except _TooLongError:
        yield broken(f"{name}:{index}", "line_too_long", f"a value of more than {MAX_LINE_BYTES:,} bytes")


class _TooLongError(Exception):
    pass


class _Bounded:
    """A file of which no more than MAX_LINE_BYTES are read for one value."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.left = MAX_LINE_BYTES

    def read(self, size: int = -1) -> bytes:
        if self.left <= 0:
            raise _TooLongError
        data = self._file.read(size)
        self.left -= len(data)
        return data
