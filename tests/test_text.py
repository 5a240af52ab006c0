"""Rules over text, record identity, and docstring pairs."""

from __future__ import annotations

import ast
import sysconfig
import unicodedata
from pathlib import Path

import pytest

from pipeline.text.docstrings import pairs
from pipeline.text.identity import content_id, is_validation, shard_of
from pipeline.text.rules import nonprintable_share, normalise, verdict

LIMITS = {"min_chars": 3, "max_chars": 20, "max_nonprintable": 0.25}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("abc", None),
        ("ab", "too_short"),
        ("  a \n ", "too_short"),
        ("", "too_short"),
        ("x" * 20, None),
        ("x" * 21, "too_long"),
        ("abc\ud800", "invalid_utf8"),
        ("abc\x00", None),  # one in four is the limit
        ("ab\x00", "nonprintable"),
        ("a\ufffd\ufffdb", "nonprintable"),
        ("def f():\n\treturn 1", None),  # newlines and tabs are no fault of code's
    ],
)
def test_verdict_at_its_thresholds(raw: str, expected: str | None) -> None:
    assert verdict(raw, **LIMITS) == expected  # type: ignore[arg-type]


def test_normalise() -> None:
    assert normalise("e\u0301") == "\u00e9"
    assert normalise("a\r\nb\rc") == "a\nb\nc"
    assert normalise("a\u200b\u202eb\x00\x07") == "ab"
    assert normalise("def f():  \n    return 1\t\n") == "def f():\n    return 1"
    assert normalise("\n    a = 1\n      b = 2\n") == "a = 1\n  b = 2"
    assert normalise("e\u200b\u0301") == "\u00e9"  # composed once what stood between is gone
    assert normalise("end.\x0cStart\x85more") == "end.\nStart\nmore"


def test_normalise_is_idempotent_on_real_text() -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    for text in [*(file.read_text("utf-8") for file in files), "e\u200b\u0301 \u200b\n \x0c \x85", "  a\n\n\tb "]:
        once = normalise(text)
        assert normalise(once) == once
        assert unicodedata.is_normalized("NFC", once)


def test_nonprintable_share_against_the_definition() -> None:
    for text in ("", "abc", "\x00", "a\x00\n", "ab\ufffd", "\n\n\t", "é\u0378"):
        bad = sum((not c.isprintable() and not c.isspace()) or c == "\ufffd" for c in text)
        assert nonprintable_share(text) == (bad / len(text) if text else 0)


def test_content_id_tells_fields_apart() -> None:
    assert content_id(["ab", "c"]) != content_id(["a", "bc"])
    assert content_id(["a"]) != content_id(["a", ""])
    assert content_id(["é"]) == content_id(["é"])
    assert len(content_id(["a"])) == 32


def test_shards_and_split_are_even_and_independent() -> None:
    ids = [content_id([str(i)]) for i in range(20_000)]
    shards = [shard_of(i, 7) for i in ids]
    assert min(shards) == 0
    assert max(shards) == 6
    held_out = [i for i in ids if is_validation(i, 0.1)]
    assert 0.09 < len(held_out) / len(ids) < 0.11
    for shard in range(7):
        in_shard = [i for i, s in zip(ids, shards, strict=True) if s == shard]
        assert abs(len(in_shard) / len(ids) - 1 / 7) < 0.01
        assert abs(sum(is_validation(i, 0.1) for i in in_shard) / len(in_shard) - 0.1) < 0.02


SOURCE = '''
@decorator
def outer(a):
    """First line
    goes on.

    Second paragraph.
    """
    def inner(): "Inner doc."; return 1
    return inner

class Thing:
    "Ümlaut doc"
    x = 1

    async def method(self):
        """Method doc."""
        return 2

def only_a_docstring():
    """Nothing beside it."""

def none():
    return 3
'''


def test_pairs_of_every_kind_of_definition() -> None:
    found = {pair.name: pair for pair in pairs(SOURCE)}
    assert list(found) == ["outer", "outer.inner", "Thing", "Thing.method"]
    assert found["outer"].docstring == "First line goes on."
    assert found["outer"].code.startswith("@decorator\ndef outer(a):\n    def inner()")
    assert "Second" not in found["outer"].code
    assert found["outer.inner"].code == "def inner(): return 1"
    assert "Ümlaut" not in found["Thing"].code
    assert found["Thing.method"].code == "async def method(self):\n    return 2"
    assert SOURCE.splitlines()[found["Thing.method"].line - 1].strip() == "async def method(self):"


def test_pairs_of_the_standard_library_parse_and_lack_their_docstring() -> None:
    count = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py")):
        for pair in pairs(file.read_text("utf-8")):
            node = ast.parse(pair.code).body[0]
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            assert " ".join((ast.get_docstring(node) or "").split()) != pair.docstring
            count += 1
    assert count > 500


@pytest.mark.parametrize("source", ["def f(:\n", "def f():\n  x\n y\n", "a = '\\x'", "\x00"])
def test_source_that_does_not_parse_says_so(source: str) -> None:
    with pytest.raises((SyntaxError, ValueError)):
        list(pairs(source))
