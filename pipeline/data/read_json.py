"""Rows of JSON: an object a line, or a file that holds one value, an array of objects or an object over several lines.

Reads 140 MB/s of long lines and 50 MB/s of short ones. Of a file that holds one value a row is held at a time, and
where it is broken the rest of it cannot be read.
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
from pipeline.data.input_files import BUFFER_BYTES, without_compression
from pipeline.data.lines import MAX_LINE_BYTES, is_too_long, lines

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*LINE_SUFFIXES, ".json")

_OPENING = re.compile(r"\s*\[")
_BETWEEN = re.compile(r"[\s,]*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_DECODER = json.JSONDecoder(parse_constant=lambda constant: None)  # NaN and infinity are no JSON, but are written


def rows(file: io.BufferedReader, name: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows of the lines that begin in bytes `start` to `stop`, or of the one value that the file holds."""
    kind = "lines" if start else shape(file, name)
    if kind == "lines":
        found = lines(file, start, stop)
        return (_row(line, f"{name}:{offset}") for offset, line in found if line and not line.isspace())
    return _values(file, name, kind == "array")


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


def _values(file: io.BufferedReader, name: str, is_array: bool) -> Iterator[Row]:
    """The values of an array, or those that the file holds one after another; positions count them."""
    held, index = _Held(file), 0
    held.grow()
    held.skip(_OPENING if is_array else _BETWEEN)
    while held.rest() or held.grow():
        held.skip(_BETWEEN)
        position = f"{name}:{index}"
        if is_array and held.text.startswith("]", held.at):
            if held.text[held.at + 1 :].strip():
                yield broken(position, "broken_json", "more follows the end of the array")
            return
        if not held.rest():
            continue
        try:
            values, end = _DECODER.raw_decode(held.text, held.at)
        except (ValueError, RecursionError) as error:
            if held.may_go_on(error) and held.rest() <= MAX_LINE_BYTES and held.grow():
                continue
            reason = "line_too_long" if held.rest() > MAX_LINE_BYTES and held.may_go_on(error) else "broken_json"
            yield broken(position, reason, held.excerpt())
            return
        yield (
            broken(position, "invalid_utf8", held.excerpt()) if held.is_undecodable(end) else _object(values, position)
        )
        held.at, index = end, index + 1
    if is_array:
        yield broken(f"{name}:{index}", "broken_json", "the array has no end")


class _Held:
    """The part of a file that is held: `text` from `at` on. Bytes that are not UTF-8 are lone surrogates in it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._read1 = file.read1
        self._failure: Exception | None = None
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at = "", 0

    def rest(self) -> int:
        return len(self.text) - self.at

    def grow(self) -> bool:
        """Hold twice as much, so that a long value is not parsed too often. False at the end of the file.

        Raises what reading raises, but only once all that was read before is used.
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
        """Whether what is broken may be a value of which more follows."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - len("\\ud83d\\ude00")

    def is_undecodable(self, end: int) -> bool:
        return not self.text.isascii() and bool(_ESCAPED_BYTE.search(self.text, self.at, end))

    def excerpt(self) -> bytes:
        return self.text[self.at : self.at + EXCERPT_CHARS].encode("utf-8", "surrogateescape")
