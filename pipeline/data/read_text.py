"""Reads text files, one row per file, paragraph or line, and Python source, one row per documented definition.

    # Kites              file:       title 'Kites', body '\\nA kite is a bird.', text all of it; line 1
                         paragraph:  text '# Kites', text 'A kite is a bird.'; lines 1 and 3
    A kite is a bird.    line:       the same two

>>> docstring_pairs('def add(a, b):\\n    "Add two numbers."\\n    return a + b\\n')
[DocumentedCode(name='add', line=1, docstring='Add two numbers.', code='def add(a, b):\\n    return a + b')]

With `pairs`, a file's sections or paragraphs are paired, each the positive of one row:

    # Kites              heading:     'Kites' → 'A kite is a bird.', 'Kites > Food' → 'It eats voles.'; lines 1 and 5
                         neighbours:  'It eats voles.' → 'A kite is a bird.', and the other way round; lines 3 and 7
    A kite is a bird.
                         (if these were paragraphs of MIN_PARAGRAPH_CHARS)
    ## Food

    It eats voles.

Parses Python source with `ast`; imports and runs nothing. Cost: text runs at the speed of `lines`, Python at 2 MB/s.
"""

from __future__ import annotations

import ast
import gc
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.fields import Row, broken
from pipeline.data.filtering import dedented
from pipeline.data.input_files import MAX_LINE_BYTES, is_too_long, lines
from pipeline.data.sections import sections
from pipeline.data.titles import read_note

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org")
PYTHON_SUFFIXES = (".py",)
TEXT_FIELDS = {  # by kind of record
    "file": ("title", "body", "text", "file", "line"),
    "paragraph": ("text", "file", "line"),
    "line": ("text", "file"),
}
PAIR_FIELDS = ("anchor", "positive", "file", "line")  # with `pairs`
MIN_PARAGRAPH_CHARS = 50  # of neighbours: shorter ones are headings and captions. Ours
MAX_PYTHON_BYTES = 1 << 20  # of source; its tree takes up to 250 times as much. Ours, measured
_TESTS = re.compile(r"(^|/)(_?(tests?|testing)|testing_utils|conftest|test_[^/]*|[^/]*_test)(/|\.py$)")
PYTHON_FIELDS = ("docstring", "code", "file", "line", "name")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_KINDS: tuple[type[ast.AST], ...] = (ast.Module, ast.ExceptHandler, ast.match_case, *ast.stmt.__subclasses__())
_BLOCKS = {
    kind: blocks
    for kind in _KINDS
    if (blocks := [name for name in kind._fields if name in ("body", "handlers", "orelse", "finalbody", "cases")])
}
"""Fields of a node that hold statements, in their order; other nodes hold none."""


def text_rows(
    file: io.BufferedReader, name: str, record: str, start: int = 0, stop: int | None = None
) -> Iterator[Row]:
    """One row per `record`: file, paragraph or line. Lines are those that begin in bytes `start` to `stop`."""
    match record:
        case "file":
            return _whole(file, name)
        case "paragraph":
            return _paragraphs(file, name)
        case _:
            found = lines(file, start, stop)
            return (_line(line, name, offset) for offset, line in found if line and not line.isspace())


def whole_text(file: io.BufferedReader, name: str, max_bytes: int) -> str | Row:
    """A file's text, or a broken row if it cannot be read."""
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        return broken(name, "file_too_long", data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return broken(name, "invalid_utf8", data)


def _whole(file: io.BufferedReader, name: str) -> Iterator[Row]:
    text = whole_text(file, name, MAX_LINE_BYTES)
    if isinstance(text, Row):
        yield text
    elif not text or text.isspace():
        yield broken(name, "empty", text)
    else:
        yield Row(name, {**vars(read_note(text, name)), "file": name})


def _paragraphs(file: io.BufferedReader, name: str) -> Iterator[Row]:
    """Paragraphs, separated by blank lines; a position is the paragraph's first byte."""
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


def heading_rows(file: io.BufferedReader, name: str) -> Iterator[Row]:
    """One row per section; its position is the heading's line.

    Text before the first heading is broken as `no_heading`, a heading without text of its own as `empty_section`.
    """
    text = whole_text(file, name, MAX_LINE_BYTES)
    if isinstance(text, Row):
        yield text
        return
    for section in sections(text, name):
        position = f"{name}:{section.line}"
        if not section.heading:
            yield broken(position, "no_heading", section.body)
        elif not section.body:
            yield broken(position, "empty_section", section.heading)
        else:
            values = {"anchor": section.heading, "positive": section.body, "file": name, "line": section.line}
            yield Row(position, values)


def neighbour_rows(file: io.BufferedReader, name: str) -> Iterator[Row]:
    """One row per paragraph, with the one before it as anchor; the first has the one after it.

    So each paragraph is the positive of one row. Paragraphs that are too short for this are `short_paragraph`, and the
    only one of a file has `no_neighbour`.
    """
    first: Row | None = None
    before: Row | None = None
    for row in _paragraphs(file, name):
        if row.reason is not None:
            yield row
        elif len(row.values["text"]) < MIN_PARAGRAPH_CHARS:
            yield broken(row.position, "short_paragraph", row.values["text"])
        elif first is None:
            first = before = row
        else:
            assert before is not None
            if before is first:
                yield _neighbours(row, first)
            yield _neighbours(before, row)
            before = row
    if first is not None and before is first:
        yield broken(first.position, "no_neighbour", first.values["text"])


def _neighbours(anchor: Row, positive: Row) -> Row:
    values = {"anchor": anchor.values["text"], "positive": positive.values["text"], "file": positive.values["file"]}
    return Row(positive.position, {**values, "line": positive.values["line"]})


def _line(data: bytes, name: str, offset: int) -> Row:
    position = f"{name}:{offset}"
    if is_too_long(data):
        return broken(position, "line_too_long", data)
    try:
        return Row(position, {"text": data.decode("utf-8").rstrip("\r\n"), "file": name})
    except UnicodeDecodeError:
        return broken(position, "invalid_utf8", data)


def is_test(name: str) -> bool:
    """Whether a Python file is a test, or code for tests: by pytest's names, and those that packages use.

    Tests are a sixth of the code in installed packages, and their docstrings describe cases, not what code does.
    """
    return _TESTS.search(name) is not None


def python_rows(file: io.BufferedReader, name: str) -> Iterator[Row]:
    """One row per documented function or class."""
    text = whole_text(file, name, MAX_PYTHON_BYTES)
    if isinstance(text, Row):
        yield text
        return
    try:
        found = docstring_pairs(text.replace("\r\n", "\n").replace("\r", "\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield broken(name, "broken_python", str(error))
        return
    for pair in found:
        yield Row(f"{name}:{pair.line}:{pair.name}", {**vars(pair), "file": name})


@dataclass(frozen=True)
class DocumentedCode:
    """A function or class: qualified name, line (from 1), first paragraph of its docstring, code without docstring."""

    name: str
    line: int
    docstring: str
    code: str


def docstring_pairs(source: str) -> list[DocumentedCode]:
    """Each function and class with a docstring and a body. Raises SyntaxError or ValueError for bad source.

    Garbage collection is paused meanwhile: a tree has no cycles, and searching it for some takes half of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _documented(source)
    finally:
        if collecting:
            gc.enable()


def _documented(source: str) -> list[DocumentedCode]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    found, lines = [], source.split("\n")
    for name, node in _definitions(tree):
        docstring = ast.get_docstring(node) if len(node.body) > 1 else None
        if docstring:
            paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
            if paragraph:
                found.append(DocumentedCode(name, node.lineno, paragraph, _without_docstring(lines, node)))
    return found


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Functions and classes with their qualified names, in the order of their lines. Visits statements only."""
    left: list[tuple[str, ast.AST]] = [("", tree)]
    while left:
        prefix, node = left.pop()
        if isinstance(node, Definition):
            yield f"{prefix}{node.name}", node
            prefix = f"{prefix}{node.name}."
        blocks = (getattr(node, name) for name in _BLOCKS[type(node)])
        inside = [(prefix, child) for block in blocks for child in block if type(child) in _BLOCKS]
        left += reversed(inside)


def _without_docstring(lines: list[str], node: Definition) -> str:
    """The definition's lines without its docstring, dedented. ast counts columns in UTF-8 bytes."""
    docstring, first = node.body[0], min([node.lineno, *(d.lineno for d in node.decorator_list)])
    assert docstring.end_lineno
    assert docstring.end_col_offset is not None
    assert node.end_lineno
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].decode().lstrip("; ")
    same_line = [before + after] if (before + after).strip() else []
    kept = lines[first - 1 : docstring.lineno - 1] + same_line + lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(dedented(kept)).strip("\n")
