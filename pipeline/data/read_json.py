"""Rows of JSON: an object a line, or a file that holds one value, an array of objects or an object over several lines.

    for row in json_rows(file, "a.jsonl", start=0, stop=4096): ...     # Row('a.jsonl:0', {'anchor': …})

Cost: 140 MB/s of long lines, 50 MB/s of short ones. Of a file that holds one value, one row is held at a time; where it
is broken, the rest of the file cannot be read.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from pipeline.data.fields import EXCERPT_CHARS, Row, broken
from pipeline.data.input_files import BUFFER_BYTES, MAX_LINE_BYTES, is_too_long, lines, without_compression

LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*LINE_SUFFIXES, ".json")

_OPENING = re.compile(r"\s*\[")
_BETWEEN = re.compile(r"[\s,]*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_DECODER = json.JSONDecoder(parse_constant=lambda constant: None)  # NaN and infinity are not JSON, but occur in files


def json_rows(file: io.BufferedReader, name: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows of the lines that begin in bytes `start` to `stop`, or of the one value that the file holds."""
    kind = "lines" if start else json_shape(file, name)
    if kind == "lines":
        found = lines(file, start, stop)
        return (_row(line, f"{name}:{offset}") for offset, line in found if line and not line.isspace())
    return _values(file, name, kind == "array")


def json_shape(file: io.BufferedReader, name: str) -> str:
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


def _values(file: io.BufferedReader, name: str, is_array: bool) -> Iterator[Row]:
    """The values of an array, or those that follow each other in the file; positions count them."""
    buffer, index = _Buffer(file), 0
    buffer.grow()
    buffer.skip(_OPENING if is_array else _BETWEEN)
    while buffer.rest() or buffer.grow():
        buffer.skip(_BETWEEN)
        position = f"{name}:{index}"
        if is_array and buffer.text.startswith("]", buffer.at):
            if buffer.text[buffer.at + 1 :].strip():
                yield broken(position, "broken_json", "more follows the end of the array")
            return
        if not buffer.rest():
            continue
        try:
            values, end = _DECODER.raw_decode(buffer.text, buffer.at)
        except (ValueError, RecursionError) as error:
            if buffer.may_go_on(error) and buffer.rest() <= MAX_LINE_BYTES and buffer.grow():
                continue
            reason = "line_too_long" if buffer.rest() > MAX_LINE_BYTES and buffer.may_go_on(error) else "broken_json"
            yield broken(position, reason, buffer.excerpt())
            return
        yield (
            broken(position, "invalid_utf8", buffer.excerpt())
            if buffer.is_undecodable(end)
            else _object(values, position)
        )
        buffer.at, index = end, index + 1
    if is_array:
        yield broken(f"{name}:{index}", "broken_json", "the array has no end")


class _Buffer:
    """The part of a file that is in memory: `text` from `at` on. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._read1 = file.read1
        self._failure: Exception | None = None
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at = "", 0

    def rest(self) -> int:
        return len(self.text) - self.at

    def grow(self) -> bool:
        """Read until twice as much is held, so that a long value is not parsed too often. False at the file's end.

        An error of reading is raised only after all that was read before it is used.
        """
        if self._failure:
            raise self._failure
        wanted, data = max(BUFFER_BYTES, self.rest()), bytearray()
        try:
            while len(data) < wanted and (piece := self._read1(wanted)):
                data += piece
        except (OSError, EOFError, zlib.error) as error:
            self._failure = error
        self.text, self.at = self.text[self.at :] + self._decode(data, not data), 0
        return bool(data or self._failure)

    def skip(self, pattern: re.Pattern[str]) -> None:
        if found := pattern.match(self.text, self.at):
            self.at = found.end()

    def may_go_on(self, error: Exception) -> bool:
        """Whether the value may only be incomplete, with more of it still to be read."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - len("\\ud83d\\ude00")

    def is_undecodable(self, end: int) -> bool:
        return not self.text.isascii() and bool(_ESCAPED_BYTE.search(self.text, self.at, end))

    def excerpt(self) -> bytes:
        return self.text[self.at : self.at + EXCERPT_CHARS].encode("utf-8", "surrogateescape")
