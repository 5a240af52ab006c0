"""Reads JSON: one object per line, an array of objects, or objects that span several lines.

    for row in json_rows(file, "a.jsonl", start=0, stop=4096): ...     # Row('a.jsonl:0', {'anchor': …})

Cost: 140 MB/s for long lines, 50 MB/s for short ones. Arrays and multi-line objects are streamed, one row in memory at
a time. After a syntax error, reading goes on at the next line that begins as the broken value's line did, with the same
indentation. If values do not begin on lines of their own, the rest of such a file cannot be read.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from pipeline.data.fields import RAW_EXCERPT_CHARS, UNREADABLE_FILE, Row, broken
from pipeline.data.input_files import BUFFER_BYTES, MAX_LINE_BYTES, is_too_long, lines, without_compression

LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*LINE_SUFFIXES, ".json")

_OPENING = re.compile(r"\s*\[")
_BETWEEN = re.compile(r"[\s,]*")
_ARRAY_END = re.compile(r"[}\n][ \t]*\]\s*\Z")  # after a broken value: what ends the array, rather than a list in it
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_DECODER = json.JSONDecoder(parse_constant=lambda constant: None)  # NaN and infinity are not JSON, but occur in files


def json_rows(file: io.BufferedReader, name: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows of the lines that begin in bytes `start` to `stop`, or of the whole file if it is not JSON Lines."""
    kind = "lines" if start else json_shape(file, name)
    if kind != "lines":
        yield from _values(file, name, kind == "array")
        return
    for offset, line in lines(file, start, stop):
        if line and not line.isspace():
            row = _row(line, f"{name}:{offset}")
            if row.reason == "broken_json" and (several := _objects(line)):
                yield from (Row(f"{name}:{offset}:{i}", values) for i, values in enumerate(several))
            else:
                yield row


def json_shape(file: io.BufferedReader, name: str) -> str:
    """`lines`, `array` or `object` (over several lines), from how the file begins and its suffix."""
    beginning = file.peek().removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.startswith(b"["):
        return "array"
    if without_compression(name).lower().endswith(LINE_SUFFIXES):
        return "lines"
    first_line, line_end, _ = beginning.partition(b"\n")
    is_multiline = line_end and first_line.startswith(b"{") and first_line.rstrip().endswith((b"{", b"[", b","))
    return "object" if is_multiline else "lines"


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


def _objects(line: bytes) -> list[dict[str, Any]]:
    """The objects of a line that holds several, with blanks or commas between them; [] if it holds anything else."""
    text, found = line.decode("utf-8", "surrogateescape").rstrip(", \t\r\n"), []
    if _ESCAPED_BYTE.search(text):
        return []
    end = 0
    try:
        while end < len(text):
            begin = _BETWEEN.match(text, end)
            values, end = _DECODER.raw_decode(text, begin.end() if begin else end)
            found.append(values)
    except (ValueError, RecursionError):
        return []
    return found if all(isinstance(values, dict) for values in found) else []


def _object(values: Any, position: str) -> Row:
    if not isinstance(values, dict):
        return broken(position, "broken_json", f"found a {type(values).__name__}, not an object")
    return Row(position, values)


def _values(file: io.BufferedReader, name: str, is_array: bool) -> Iterator[Row]:
    """The values of one or more arrays, or the consecutive values of a file; a position is the value's index."""
    buffer, index = _Buffer(file), 0
    buffer.grow()
    buffer.skip(_OPENING if is_array else _BETWEEN)
    is_open, before = is_array, "" if is_array else "\n"  # what stands between the value and the previous one
    while buffer.rest() or buffer.grow():
        before += buffer.skip(_BETWEEN)
        if not buffer.rest():
            continue
        if is_array and not is_open:
            if buffer.text[buffer.at] != "[":
                yield broken(name, UNREADABLE_FILE, f"text after the end of the array, which has {index} values")
                return
            is_open, before, buffer.at = True, "", buffer.at + 1
            continue
        if is_array and buffer.text[buffer.at] == "]":
            is_open, buffer.at = False, buffer.at + 1
            continue
        position = f"{name}:{index}"
        try:
            values, end = _DECODER.raw_decode(buffer.text, buffer.at)
        except (ValueError, RecursionError) as error:
            if buffer.may_be_incomplete(error) and buffer.rest() <= MAX_LINE_BYTES and buffer.grow():
                continue
            is_too_large = buffer.rest() > MAX_LINE_BYTES and buffer.may_be_incomplete(error)
            yield broken(position, "line_too_long" if is_too_large else "broken_json", buffer.excerpt())
            _, line_end, indentation = before.rpartition("\n")
            if not line_end:
                yield broken(name, UNREADABLE_FILE, f"value {index} is not JSON, and the next one is on the same line")
                return
            before, index = "", index + 1
            if not buffer.skip_to(f"\n{indentation}{{"):
                is_open = is_array and not _ARRAY_END.search(buffer.text)
                break
            continue
        yield (
            broken(position, "invalid_utf8", buffer.excerpt())
            if buffer.is_undecodable(end)
            else _object(values, position)
        )
        buffer.at, index, before = end, index + 1, ""
    if is_open:
        yield broken(name, UNREADABLE_FILE, f"the array is not closed: the file ends after value {index}")


class _Buffer:
    """The part of a file in memory: `text` from index `at`. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._read1 = file.read1
        self._failure: Exception | None = None
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at = "", 0

    def rest(self) -> int:
        return len(self.text) - self.at

    def grow(self) -> bool:
        """Double the buffered text up to MAX_LINE_BYTES, so that a long value is not parsed too often.

        False at the end of the file.

        Raises a read error only after everything read before it has been used.
        """
        if self._failure:
            raise self._failure
        read_bytes, data = max(BUFFER_BYTES, min(self.rest(), MAX_LINE_BYTES - self.rest())), bytearray()
        try:
            while len(data) < read_bytes and (piece := self._read1(read_bytes)):
                data += piece
        except (OSError, EOFError, zlib.error) as error:
            self._failure = error
        self.text, self.at = self.text[self.at :] + self._decode(data, not data), 0
        return bool(data or self._failure)

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Skip a match of the pattern. Returns its text."""
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found[0] if found else ""

    def skip_to(self, mark: str) -> bool:
        """Skip to the next `mark` after the current character. False if there is none; the file's end is kept."""
        self.at += 1
        while (found := self.text.find(mark, self.at)) < 0:
            self.at = max(self.at, len(self.text) - len(mark) - RAW_EXCERPT_CHARS)
            if not self.grow():
                return False
        self.at = found
        return True

    def may_be_incomplete(self, error: Exception) -> bool:
        """Whether the error may only mean that the rest of the value has not been read yet."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - len("\\ud83d\\ude00")

    def is_undecodable(self, end: int) -> bool:
        return not self.text.isascii() and bool(_ESCAPED_BYTE.search(self.text, self.at, end))

    def excerpt(self) -> bytes:
        return self.text[self.at : self.at + RAW_EXCERPT_CHARS].encode("utf-8", "surrogateescape")
