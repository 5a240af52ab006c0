"""Normalising text and judging it: plain functions, a string in, a string or the reason for refusing it out.

>>> normalise("a\\r\\nb\\u200b\\x00  ")
'a\\nb'
>>> verdict("\\x01\\x02", min_chars=1, max_chars=100, max_nonprintable=0.1)
'nonprintable'
"""

from __future__ import annotations

import re
import textwrap
import unicodedata

_ZERO_WIDTH = "\u200b\u2060\ufeff\u00ad"
_BIDI_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_CONTROLS = "".join(chr(c) for c in (*range(32), *range(0x7F, 0xA0)) if chr(c) not in "\n\t")
_REMOVED = re.compile("[" + re.escape(_ZERO_WIDTH + _BIDI_OVERRIDES + _CONTROLS) + "]+")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def normalise(text: str) -> str:
    """NFC, one kind of line end, no control, zero-width or direction-override characters, no trailing blanks.

    Lines keep their indentation against each other: it is meaning in code.
    """
    text = _REMOVED.sub("", _LINE_ENDS.sub("\n", text))
    lines = unicodedata.normalize("NFC", text).split("\n")
    return textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")


def verdict(raw: str, *, min_chars: int, max_chars: int, max_nonprintable: float) -> str | None:
    """Why a field's raw text is refused, or None: `too_long`, `invalid_utf8`, `nonprintable`, `too_short`.

    Raw, because normalising would hide what is wrong with it.
    """
    if len(raw) > max_chars:
        return "too_long"
    if _SURROGATE.search(raw):
        return "invalid_utf8"  # a lone surrogate cannot be written as UTF-8
    if nonprintable_share(raw) > max_nonprintable:
        return "nonprintable"
    if len(normalise(raw)) < min_chars:
        return "too_short"
    return None


def nonprintable_share(text: str) -> float:
    """Share of characters that no one could read: controls other than blanks, and the replacement character."""
    solid = "".join(text.split())  # controls that are blanks, newlines above all, are none of it
    if solid.isprintable() and _REPLACEMENT not in solid:
        return 0.0
    return sum(not c.isprintable() or c == _REPLACEMENT for c in solid) / len(text)
