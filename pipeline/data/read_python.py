"""Rows of Python source: each documented function and class as docstring → code. 2 MB/s, all of it `ast`."""

from __future__ import annotations

import io
from collections.abc import Iterator

from pipeline.data import docstrings
from pipeline.data.fields import Row, broken
from pipeline.data.read_text import whole_text

SUFFIXES = (".py",)
NAMES = ("docstring", "code", "file", "line", "name")


def rows(file: io.BufferedReader, name: str) -> Iterator[Row]:
    text = whole_text(file, name)
    if isinstance(text, Row):
        yield text
        return
    try:
        found = list(docstrings.pairs(text.replace("\r\n", "\n").replace("\r", "\n")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield broken(name, "broken_python", str(error))
        return
    for pair in found:
        values = {"docstring": pair.docstring, "code": pair.code, "file": name, "line": pair.line, "name": pair.name}
        yield Row(f"{name}:{pair.line}:{pair.name}", values)
