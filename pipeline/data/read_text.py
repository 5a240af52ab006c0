"""Rows of text files: a file, a paragraph or a line each.

# Kites                 file:       title 'Kites', body '\\nA kite is a bird.', text all of it; line 1
                        paragraph:  text '# Kites', text 'A kite is a bird.'; lines 1 and 3
A kite is a bird.       line:       the same two here
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from pipeline.data.fields import Row, broken
from pipeline.data.lines import MAX_LINE_BYTES, is_too_long, lines

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org")
NAMES = {
    "file": ("title", "body", "text", "file", "line"),
    "paragraph": ("text", "file", "line"),
    "line": ("text", "file"),
}

_MARKUP_LINE = re.compile(r"^\s*(\.\. .*|:\w+:.*|<!--.*|[^\w\s]*)\s*$")


def rows(file: io.BufferedReader, name: str, record: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows of the kind `record`; lines are those that begin in bytes `start` to `stop`."""
    match record:
        case "file":
            return _whole(file, name)
        case "paragraph":
            return _paragraphs(file, name)
        case _:
            found = lines(file, start, stop)
            return (_line(line, name, offset) for offset, line in found if line and not line.isspace())


def whole_text(file: io.BufferedReader, name: str) -> str | Row:
    """The text of a file, or the row that says why it is none."""
    data = file.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        return broken(name, "file_too_long", data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return broken(name, "invalid_utf8", data)


def _whole(file: io.BufferedReader, name: str) -> Iterator[Row]:
    text = whole_text(file, name)
    if isinstance(text, Row):
        yield text
    elif not text or text.isspace():
        yield broken(name, "empty", text)
    else:
        title, body, line = title_and_body(text)
        yield Row(name, {"title": title, "body": body, "text": text, "file": name, "line": line})


def title_and_body(text: str) -> tuple[str, str, int]:
    """Title, the lines after it, and its line from 1. Comments and underlines are no titles; without one, ""."""
    split = text.splitlines()
    first = next((i for i, line in enumerate(split) if not _MARKUP_LINE.match(line)), None)
    if first is None:
        return "", text, 1
    title = re.sub(r"^(#+|=+|\*+|title:)\s*", "", split[first].strip(), flags=re.IGNORECASE)
    return title, "\n".join(split[first + 1 :]), first + 1


def _paragraphs(file: io.BufferedReader, name: str) -> Iterator[Row]:
    """Runs of lines between blank ones; positions are the byte at which they begin."""
    held: list[bytes] = []
    size = begins = first = 0
    for number, (offset, line) in enumerate(lines(file), 1):
        if not line or line.isspace():
            if held:
                yield _paragraph(b"".join(held), size, name, begins, first)
            held, size = [], 0
            continue
        if not held:
            begins, first = offset, number
        size += len(line)
        if size <= MAX_LINE_BYTES or not held:
            held.append(line)
    if held:
        yield _paragraph(b"".join(held), size, name, begins, first)


def _paragraph(data: bytes, size: int, name: str, offset: int, line: int) -> Row:
    if size > MAX_LINE_BYTES:
        return broken(f"{name}:{offset}", "paragraph_too_long", data)
    row = _line(data, name, offset)
    row.values["line"] = line
    return row


def _line(data: bytes, name: str, offset: int) -> Row:
    position = f"{name}:{offset}"
    if is_too_long(data):
        return broken(position, "line_too_long", data)
    try:
        return Row(position, {"text": data.decode("utf-8").rstrip("\r\n"), "file": name})
    except UnicodeDecodeError:
        return broken(position, "invalid_utf8", data)
