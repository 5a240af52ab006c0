"""No regular expression of ours backtracks for long: none repeats a repetition, or two that match the same in a row."""

from __future__ import annotations

import ast
import re
import re._constants as op  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE = [chr(code) for code in (*range(128), 0xA0, 0xAD, 0xE9, 0x0939, 0x0E01, 0x200B, 0x202E, 0x4E00, 0xDC80, 0xFFFD)]
MANY = 2_000
"""A repetition up to this many times is bounded: it multiplies the time by a constant."""
AT_ONE_PLACE = {
    r"\s*\[": "read_json matches it at the start of a file",
    r"(?:#+|=+|\*+(?=\s))\s*": "titles.py matches it at the start of a line",
}
"""Patterns that begin with a repetition and are only matched at one place, so not searched for from each position."""


def patterns() -> Iterator[tuple[str, frozenset[str], str]]:
    """(file:line, methods, pattern) of each literal in a call of `re` or `regex`; in f-strings, `.` for a value.

    The methods of a compiled pattern are those that its file calls on its name; all, if there are none.
    """
    for path in sorted(ROOT.glob("pipeline/**/*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        called: dict[str, set[str]] = defaultdict(set)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called[node.value.id].add(node.attr)
        names = {id(node.value): node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id in ("re", "regex")):
                continue
            methods, name = {node.func.attr}, names.get(id(node))
            if node.func.attr == "compile":
                methods = called[name.id] if isinstance(name, ast.Name) else set()
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            known = [part.value if isinstance(part, ast.Constant) else "." for part in parts]
            if isinstance(text, ast.JoinedStr | ast.Constant):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", frozenset(methods or {"?"}), "".join(map(str, known))


def parsed(pattern: str) -> Any:
    """The parse tree. The classes that only `regex` knows become classes with the same members of the sample."""
    plain = pattern.removeprefix("(?V1)").replace("&&", "").replace("--", "")
    return parser.parse(re.sub(r"\\[pP]\{[^}]*\}|\[\[:\w+:\]\]|\\X", r"\\w", plain))


def is_long(node: tuple[Any, Any]) -> bool:
    return node[0] in (op.MAX_REPEAT, op.MIN_REPEAT) and node[1][1] > MANY


def children(node: tuple[Any, Any]) -> list[list[tuple[Any, Any]]]:
    """The sequences of nodes below a node: one, or each branch of an alternative."""
    kind, value = node
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
        return [list(value[2])]
    if kind is op.SUBPATTERN:
        return [list(value[3])]
    if kind is op.BRANCH:
        return [list(branch) for branch in value[1]]
    if kind in (op.ATOMIC_GROUP,):
        return [list(value)]
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return [list(value[1])]
    return []


def is_nullable(node: tuple[Any, Any]) -> bool:
    kind, value = node
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
        return value[0] == 0 or all(map(is_nullable, value[2]))
    if kind in (op.AT, op.ASSERT, op.ASSERT_NOT):
        return True
    below = children(node)
    return bool(below) and any(all(map(is_nullable, sequence)) for sequence in below)


def members(nodes: list[tuple[Any, Any]], *, first: bool = False) -> set[str]:
    """The characters of the sample that a match of these nodes may hold, or begin with (`first`)."""
    found: set[str] = set()
    for kind, value in nodes:
        if kind is op.LITERAL:
            found.add(chr(value))
        elif kind is op.NOT_LITERAL:
            found |= {each for each in SAMPLE if each != chr(value)}
        elif kind is op.ANY:
            found |= {*SAMPLE}
        elif kind is op.IN:
            found |= {each for each in SAMPLE if in_class(value, each)}
        elif kind not in (op.ASSERT, op.ASSERT_NOT):
            for sequence in children((kind, value)):
                found |= members(sequence, first=first)
        if first and not is_nullable((kind, value)):
            break
    return found


def in_class(items: list[tuple[Any, Any]], character: str) -> bool:
    categories = {op.CATEGORY_DIGIT: r"\d", op.CATEGORY_NOT_DIGIT: r"\D", op.CATEGORY_SPACE: r"\s"}
    categories |= {op.CATEGORY_NOT_SPACE: r"\S", op.CATEGORY_WORD: r"\w", op.CATEGORY_NOT_WORD: r"\W"}
    negated, found = False, False
    for kind, value in items:
        if kind is op.NEGATE:
            negated = True
        elif kind is op.LITERAL:
            found |= ord(character) == value
        elif kind is op.RANGE:
            found |= value[0] <= ord(character) <= value[1]
        else:
            found |= bool(re.fullmatch(categories[value], character))
    return found != negated


def problem(pattern: str, methods: frozenset[str] = frozenset({"?"})) -> str | None:
    """What makes a pattern slow, or None. A repetition is slow only if what follows can fail."""
    tree = list(parsed(pattern))
    if methods - {"match", "fullmatch"} and pattern not in AT_ONE_PLACE and begins_slowly(tree):
        return "may fail after a repetition that runs over further beginnings, and tries again from each of them"
    return problem_below(tree, may_fail="fullmatch" in methods)


def can_fail(sequence: list[tuple[Any, Any]]) -> bool:
    return any(not is_nullable(node) or node[0] in (op.AT, op.ASSERT, op.ASSERT_NOT) for node in sequence)


def begins_slowly(sequence: list[tuple[Any, Any]]) -> bool:
    if not sequence:
        return False
    first, rest = sequence[0], sequence[1:]
    if first[0] in (op.SUBPATTERN, op.BRANCH):
        return any(begins_slowly([*below, *rest]) for below in children(first))
    if first == (op.AT, op.AT_BEGINNING):
        return False
    if is_long(first):
        return can_fail(rest)
    starts = members([first], first=True)
    return any(is_long(node) and members([node]) >= starts and can_fail(rest[i + 1 :]) for i, node in enumerate(rest))


def problem_below(sequence: list[tuple[Any, Any]], may_fail: bool) -> str | None:
    for i, node in enumerate(sequence):
        rest = sequence[i + 1 :]
        fails = may_fail or can_fail(rest)
        if is_long(node) and fails and any(repeats(below) for below in children(node)):
            return "repeats a repetition"
        if is_long(node) and fails:
            for later in rest:
                if is_long(later) and members([node]) & members([later], first=True):
                    return "has two repetitions in a row that match the same"
                if not is_nullable(later):
                    break
        for below in children(node):
            if found := problem_below(below, fails or is_long(node)):
                return found
    return None


def repeats(sequence: list[tuple[Any, Any]]) -> bool:
    """Whether a long repetition in the sequence has no end that it cannot match itself."""
    for i, node in enumerate(sequence):
        others = [other for j, other in enumerate(sequence) if j != i and not is_nullable(other)]
        if is_long(node) and not any(members([other]).isdisjoint(members([node])) for other in others):
            return True
        groups = (op.SUBPATTERN, op.BRANCH, op.MAX_REPEAT, op.MIN_REPEAT)
        if node[0] in groups and not others and any(repeats(below) for below in children(node)):
            return True
    return False


ALL = [*patterns()]


@pytest.mark.parametrize(("place", "methods", "pattern"), ALL, ids=[place for place, *_ in ALL])
def test_no_pattern_backtracks_for_long(place: str, methods: frozenset[str], pattern: str) -> None:
    found = problem(pattern, methods)
    assert found is None, f"{place}: {pattern} {found}"


@pytest.mark.parametrize(
    ("pattern", "slow"),
    [
        (r"(a+)+b", True),
        (r"(?:a|b+)*c", True),
        (r"(\w+\s*)*$", True),
        (r";\w+(\.\w+)+;", False),
        (r"x[a-z]+(,?[a-z]+)*", False),
        (r"\s*\n\s*x", True),
        (r"[ \t]*[ ]*x", True),
        (r"\s+$", True),
        (r"<[^>]*>", True),
        (r"x(a++)+b", False),
        (r"(?:[^\n]+\n)*", False),
        (r"x\s*$", False),
        (r"^\s+x", False),
        (r"\w+", False),
        (r"a{1,20}b", False),
        (r"<[^<>]*>", False),
    ],
)
def test_the_check_itself(pattern: str, slow: bool) -> None:
    assert (problem(pattern) is not None) == slow
