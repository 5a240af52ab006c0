"""Normalising and filtering records, their ids, and docstring pairs."""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import sysconfig
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Data, Sanitize, Source
from pipeline.data.fields import RawRecord
from pipeline.data.filtering import Filter, Sanitizer, dedented, nonprintable_share, raw_text_problem
from pipeline.data.partitions import content_id, is_validation, shard_of
from pipeline.data.read_text import docstring_pairs, is_test

CODE = Sanitizer(Sanitize(), collapse=False)
PROSE = Sanitizer(Sanitize(), collapse=True)


def test_unreadable_at_its_thresholds() -> None:
    for raw, expected in (
        ("abc", None),
        ("", None),
        ("x" * 20, None),
        ("x" * 21, "too_long"),
        ("abc\ud800", "invalid_utf8"),
    ):
        assert raw_text_problem(raw, max_chars=20) == expected, raw
    for raw, reason in (
        ("abc\x00", None),  # one in four is the limit
        ("ab\x00", "nonprintable"),
        ("a\ufffd\ufffdb", "nonprintable"),
        ("def f():\n\treturn 1", None),  # newlines and tabs are no fault of code's
        ("\x93quoted\x94 — \x93quoted\x94", None),  # Windows' quotation marks, once it is repaired
    ):
        assert filtered(raw, max_nonprintable=0.25, min_chars=1).get("reason") == reason, raw


def normalise(text: str, sanitizer: Sanitizer) -> str:
    return sanitizer.clean(sanitizer.unhide(sanitizer.repair(text) or ""))


NORMALISED: list[tuple[str, str | None, str | None]] = [  # raw, as code and as prose; None: as it was
    ("e\u0301", "\u00e9", "\u00e9"),
    ("a\r\nb\rc", "a\nb\nc", "a\nb\nc"),
    ("a\u200b\u202eb\x00\x07", "ab", "ab"),
    ("def f():  \n    return 1\t\n", "def f():\n    return 1", "def f():\nreturn 1"),
    ("\n    a =  1\n      b = 2\n\n\n\nc", "    a =  1\n      b = 2\n\n\n\nc", "a = 1\nb = 2\n\nc"),
    ("e\u200b\u0301", "\u00e9", "\u00e9"),  # composed once what stood between is gone
    ("end.\x0cStart\u2028more", "end.\nStart\nmore", "end.\nStart\nmore"),
    ("sch\u00c3\u00b6n", "schön", "schön"),
    ("na\u00efve caf\u00e9 \u2013 \u201cfine\u201d", None, None),
    ("\U0001f468\u200d\U0001f469\u200d\U0001f467", None, None),  # a family, joined
    ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None, None),  # Persian, with a non-joiner
    ("a\u00a0b", "a\u00a0b", "a b"),
    ("a  b", "a  b", "a b"),
]
SWITCHES = [  # name, raw, with it and without it
    ("nfc", "e\u0301", "\u00e9", "e\u0301"),
    ("repair_mojibake", "sch\u00c3\u00b6n", "schön", "sch\u00c3\u00b6n"),
    ("remove_controls", "a\x00\x1bb", "ab", "a\x00\x1bb"),
    ("remove_zero_width", "a\u200b\ufeffb", "ab", "a\u200b\ufeffb"),
    ("remove_bidi_overrides", "a\u202eb", "ab", "a\u202eb"),
    ("lowercase", "ÀB", "àb", "ÀB"),
]


def test_normalise() -> None:
    for raw, code, prose in NORMALISED:
        assert normalise(raw, CODE) == (raw if code is None else code)
        assert normalise(raw, PROSE) == (raw if prose is None else prose)
    for switch, raw, with_it, without in SWITCHES:
        assert normalise(raw, Sanitizer(Sanitize(**{switch: True}), collapse=True)) == with_it, switch
        assert normalise(raw, Sanitizer(Sanitize(**{switch: False}), collapse=True)) == without, switch
    letters = Sanitizer(Sanitize(allowed_characters=r"\p{L}\p{N}\s"), collapse=True)
    assert normalise("Größe: 5 €!", letters) == "Größe 5"


@pytest.mark.parametrize("sanitizer", [CODE, PROSE])
def test_normalise_is_idempotent_on_real_text(sanitizer: Sanitizer) -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    for text in [*(file.read_text("utf-8") for file in files), "e\u200b\u0301 \u200b\n \x0c \x85", "  a\n\n\tb "]:
        once = normalise(text, sanitizer)
        assert normalise(once, sanitizer) == once
        assert unicodedata.is_normalized("NFC", once)


def test_nonprintable_share_against_the_definition() -> None:
    for text in ("", "abc", "\x00", "a\x00\n", "ab\ufffd", "\n\n\t", "é\u0378"):
        bad = sum((unicodedata.category(c) in ("Cc", "Cn") and not c.isspace()) or c == "\ufffd" for c in text)
        assert nonprintable_share(text) == (bad / len(text) if text else 0)


FORMATTED = {
    "Khmer": "ត្រី\u200bបាយ\u200bព្រឹក\u200bភ្លៀង",
    "Persian": "می\u200cخورد نمی\u200cدانم",
    "Sinhala": "ශ්\u200dරී ලංකාව",
    "German": "Was\u00adser\u00adver\u00adsor\u00adgung",
    "Hebrew": "\u200fשלום\u200f, \u2068world\u2069",
    "word joiner": "12\u2060%\u2060of\u2060it",
    "family": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 3,
    "heart": "\u2764\ufe0f" * 9,
    "Scotland": "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
}


@pytest.mark.parametrize("text", FORMATTED.values(), ids=FORMATTED)
def test_format_characters_are_readable(text: str) -> None:
    assert nonprintable_share(text) == 0
    assert filtered(text, max_nonprintable=0, min_chars=1).get("reason") is None


def test_mojibake_is_repaired_in_pieces_as_in_one() -> None:
    long = " ".join(f"{number} schön “quoted” été à Łódź" for number in range(3000))
    broken = long.encode().decode("latin-1")
    assert len(broken) > 10 * 10_000
    assert PROSE.repair(broken) == long == ftfy.fix_encoding(broken)
    assert PROSE.repair(broken[:9_999]) == ftfy.fix_encoding(broken[:9_999])
    assert PROSE.repair("plain text 你好. " * 50_000 + "Ã© ") == "plain text 你好. " * 50_000 + "é "


def test_much_mixed_mojibake_is_set_aside() -> None:
    mixed = "Ã© 你 "  # no encoding has the Chinese letter
    assert PROSE.repair(mixed * 1000) == "é 你 " * 1000
    assert PROSE.repair(mixed * 12_500) == "é 你 " * 12_500
    assert PROSE.repair(mixed * 12_501) is None
    assert filtered(mixed * 12_501)["reason"] == "mojibake"
    assert filtered(mixed * 12_501, sanitize={"repair_mojibake": False}).get("reason") is None


def filtered(text: str, metadata: dict[str, Any] | None = None, native_id: str = "0", **data: Any) -> dict[str, Any]:
    keep = Filter(Source(name="s", type="json", path="none"), Data.model_validate(data))
    return keep(RawRecord(native_id, {"anchor": "Where to get help", "positive": text}, metadata or {}))


def test_the_first_rule_that_a_record_fails_is_its_reason() -> None:
    prose = "This sentence is written in plain English, and it says a few things about the weather in the north."
    for text, reason in (
        (prose, None),
        ("buy " * 18, "quality_word_run"),
        ("Dieser Satz ist auf Deutsch geschrieben und handelt vom Wetter im Norden.", "language_de"),
        ("See base.", "too_short"),
        (f"' OR 1=1 -- {prose}", None),
        ("' OR 1=1 --", "unsafe_sql_injection"),
    ):
        found = filtered(text, quality={"preset": "short", "languages": ["en"]})
        assert found.get("reason") == reason, text


def test_a_hidden_character_hides_nothing_from_a_redaction() -> None:
    for hidden in ("", "\x01", "\u200b", "\u202e"):
        text = f"For help with any of this, please do write to ann@exam{hidden}ple.org today."
        kept = filtered(text, safety={"actions": {"email": "redact"}})
        assert kept["positive"] == "For help with any of this, please do write to [EMAIL] today."


def test_ids_and_metadata_are_valid_utf8_and_json() -> None:
    found = filtered("Here, of course.", {"line": "\udfff"}, "\ud800")
    assert (found["source_id"], found["metadata"]) == ("s:\\ud800", '{"line": "?"}')


def test_ids_and_metadata_hold_nothing_that_acts_on_a_terminal() -> None:
    acting = "a\x1b]0;title\x07\x9b2J\u202eb\u2066c"
    found = filtered("Here, of course.", {"name": [acting, "two\r\nlines\tand tabs"], acting: 1}, acting)
    assert found["source_id"] == "s:a\\x1b]0;title\\x07\\x9b2J\\u202eb\\u2066c"
    assert json.loads(found["metadata"]) == {"name": ["abc", "two\nlines\tand tabs"], "abc": 1}


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
    found = {pair.name: pair for pair in docstring_pairs(SOURCE)}
    assert list(found) == ["outer", "outer.inner", "Thing", "Thing.method"]
    assert found["outer"].docstring == "First line goes on."
    assert found["outer"].code.startswith("@decorator\ndef outer(a):\n    def inner()")
    assert "Second" not in found["outer"].code
    assert found["outer.inner"].code == "def inner(): return 1"
    assert "Ümlaut" not in found["Thing"].code
    assert found["Thing.method"].code == "async def method(self):\n    return 2"
    assert SOURCE.splitlines()[found["Thing.method"].line - 1].strip() == "async def method(self):"


def test_a_chain_of_conditions_deeper_than_the_stack_is_read() -> None:
    chain = "".join(f"elif a == {i}:\n    pass\n" for i in range(400)).removeprefix("el")
    (pair,) = docstring_pairs(f'{chain}else:\n    def f():\n        "Last."\n        return 1\n')
    assert (pair.name, pair.docstring) == ("f", "Last.")


def test_garbage_is_collected_again_after_reading() -> None:
    for source in ("def f(): pass\n", "def f(:\n"):
        with contextlib.suppress(SyntaxError):
            docstring_pairs(source)
        assert gc.isenabled()


@given(st.text(st.sampled_from(" \t\n\x0b\x0c\r\x1fab\xa0\u2003"), max_size=30))
def test_lines_lose_the_blanks_that_textwrap_removes(text: str) -> None:
    assert "\n".join(dedented(text.split("\n"))) == textwrap.dedent(text)


@given(st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from("\x85\u2028\u202eé")), max_size=12))
def test_plain_text_is_cleaned_as_all_text_is(text: str) -> None:
    """The oracle has a letter beyond ASCII at its end, with which no step is left out."""
    assert PROSE.clean(text + "xé") == PROSE.clean(text + "x") + "é"
    assert CODE.clean(text + "xé") == CODE.clean(text + "x") + "é"
    assert nonprintable_share(text) * len(text) == pytest.approx(nonprintable_share(text + "é") * (len(text) + 1))


def test_tests_of_packages_are_left_out() -> None:
    tests = (
        "a/tests/x.py",
        "a/test/x.py",
        "a/testing/x.py",
        "a/_testing.py",
        "a/testing_utils.py",
        "test_x.py",
        "a/x_test.py",
        "conftest.py",
        "tests.py",
    )
    others = ("a/contest.py", "a/testbed.py", "latest/x.py", "a/attest.py", "pytest/x.py", "a/hypotests.py", "test.pyx")
    assert [name for name in (*tests, *others) if is_test(name)] == [*tests]


def test_pairs_of_the_standard_library_parse_and_lack_their_docstring() -> None:
    count = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py")):
        for pair in docstring_pairs(file.read_text("utf-8")):
            node = ast.parse(pair.code).body[0]
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            assert " ".join((ast.get_docstring(node) or "").split()) != pair.docstring
            count += 1
    assert count > 500


def test_source_that_does_not_parse_says_so() -> None:
    for source in ("def f(:\n", "def f():\n  x\n y\n", "a = '\\x'", "\x00"):
        with pytest.raises((SyntaxError, ValueError)):
            docstring_pairs(source)


SECRETS = ("ann@example.org", "ghp_" + "aB3dE6gH9j" * 4, "ann\u200b@example.org")
REDACTING = {"email": "redact", "secret": "reject"}


def redacting(**data: Any) -> Filter:
    source = Source(name="s", type="json", path="a.jsonl", fields={"text": "text"}, metadata=["m"])
    return Filter(source, Data(sources=[source], safety={"actions": REDACTING}, **data))


def test_metadata_are_redacted_like_texts() -> None:
    for secret in SECRETS:
        metadata = {"m": {"nested": [f"by {secret}"], f"key {secret}": 1.5}, "n": None, "plain": "e\u0301\x1b"}
        row = redacting(min_chars=1)(RawRecord("1", {"text": "a text"}, metadata))
        assert secret not in row["metadata"]
        assert "example.org" not in row["metadata"]
        kept = json.loads(row["metadata"])
        assert (kept["n"], kept["plain"]) == (None, "e\u0301")  # nothing else changes but controls
        assert kept["m"]["nested"][0].startswith("by [")


def test_excerpts_are_redacted_before_they_are_cut() -> None:
    for secret in SECRETS:
        for start in (0, 150, 195):  # whole, and cut by the excerpt's end
            text = "x" * start + " " + secret + " and more " * 50
            broken = RawRecord("1", reason="broken_json", excerpt=text)
            too_long = RawRecord("1", {"text": text})
            for raw, keep in ((broken, redacting()), (too_long, redacting(max_chars=100))):
                excerpt = keep(raw)["excerpt"]
                assert len(excerpt) <= 200
                assert secret[:4] not in excerpt, (secret, start, raw)
    with_secret = redacting(min_chars=1)(RawRecord("1", {"text": f"a token {SECRETS[1]}"}))
    assert (with_secret["reason"], SECRETS[1] in with_secret["excerpt"]) == ("unsafe_secret", False)
