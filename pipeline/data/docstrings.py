"""Pairs of docstring and code out of Python source text, parsed with `ast`: nothing is imported or run.

>>> list(pairs('def add(a, b):\\n    "Add two numbers."\\n    return a + b\\n'))
[DocumentedCode(name='add', line=1, docstring='Add two numbers.', code='def add(a, b):\\n    return a + b')]
"""

from __future__ import annotations

import ast
import gc
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class DocumentedCode:
    """A function or class: qualified name, line (from 1), its docstring's first paragraph, its code without it."""

    name: str
    line: int
    docstring: str
    code: str


def pairs(source: str) -> Iterator[DocumentedCode]:
    """Each function and class with a docstring and code beside it. Raises SyntaxError or ValueError on bad source."""
    tree = _parse(source)
    lines = source.split("\n")
    for name, node in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring and len(node.body) > 1:
            paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
            if paragraph:
                yield DocumentedCode(name, node.lineno, paragraph, _without_docstring(lines, node))


def _parse(source: str) -> ast.Module:
    """A tree has no cycles, and looking for some while it grows takes a third of the time: collection pauses."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(source)
    finally:
        if collecting:
            gc.enable()


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            name = f"{prefix}{node.name}"
            yield name, node
            yield from _definitions(node, f"{name}.")
        elif not isinstance(node, ast.expr):
            yield from _definitions(node, prefix)


def _without_docstring(lines: list[str], node: Definition) -> str:
    """The definition's own lines without its docstring, dedented. ast's columns count UTF-8 bytes."""
    docstring, first = node.body[0], min([node.lineno, *(d.lineno for d in node.decorator_list)])
    assert docstring.end_lineno
    assert docstring.end_col_offset is not None
    assert node.end_lineno
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].decode().lstrip("; ")
    same_line = [before + after] if (before + after).strip() else []
    kept = lines[first - 1 : docstring.lineno - 1] + same_line + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip("\n")
