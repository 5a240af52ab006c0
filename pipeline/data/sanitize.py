"""Normalising text and judging it: a string in, a string or the reason for refusing it out.

>>> sanitizer = Sanitizer()
>>> sanitizer.tidy(sanitizer.reveal("schÃ¶n\\r\\n  a \\u200bb\\x00  "))
'schön\\na b'
>>> unreadable("\\x01\\x02", max_chars=100, max_nonprintable=0.1)
'nonprintable'

Cost: 15 MB/s a core, most of it on text beyond ASCII.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from dataclasses import dataclass
from functools import cached_property

import ftfy
import regex

_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff\u00ad]+")  # ZWJ and ZWNJ stay: emoji and Persian are written with them
_BIDI_OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]+")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]+")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_BLANKS = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Sanitizer:
    """The switches of the config's `data.sanitize`; `collapse` is what `whitespace` came to for a source."""

    nfc: bool = True
    repair_mojibake: bool = True
    remove_controls: bool = True
    remove_zero_width: bool = True
    remove_bidi_overrides: bool = True
    collapse: bool = True
    lowercase: bool = False
    allowed_characters: str | None = None

    def reveal(self, text: str) -> str:
        """Undo what hides words from a reader and from patterns, but leave control characters where they are."""
        if text.isascii():
            return text
        if self.repair_mojibake:
            text = ftfy.fix_encoding(text)
        if self.remove_zero_width:
            text = _ZERO_WIDTH.sub("", text)
        if self.remove_bidi_overrides:
            text = _BIDI_OVERRIDES.sub("", text)
        return text

    def tidy(self, text: str) -> str:
        """The text as it is kept: one kind of line end, and whatever else is switched on.

        Without `collapse`, lines keep their indentation against each other: it is meaning in code.
        """
        text = _LINE_ENDS.sub("\n", text)
        if self.remove_controls:
            text = _CONTROLS.sub("", text)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.lowercase:
            text = text.lower()
        if self._forbidden:
            text = self._forbidden.sub("", text)
        if self.collapse:
            lines = _BLANKS.sub(" ", text).split("\n")
            return _EMPTY_LINES.sub("\n\n", "\n".join(line.strip(" ") for line in lines)).strip("\n")
        return textwrap.dedent("\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")

    @cached_property
    def _forbidden(self) -> regex.Pattern[str] | None:
        return regex.compile(f"[^{self.allowed_characters}]+") if self.allowed_characters is not None else None


def unreadable(raw: str, *, max_chars: int, max_nonprintable: float) -> str | None:
    """Why a field's raw text is refused, or None: `too_long`, `invalid_utf8`, `nonprintable`.

    Raw, because normalising would hide what is wrong with it.
    """
    if len(raw) > max_chars:
        return "too_long"
    if _SURROGATE.search(raw):
        return "invalid_utf8"  # a lone surrogate cannot be written as UTF-8
    if nonprintable_share(raw) > max_nonprintable:
        return "nonprintable"
    return None


def nonprintable_share(text: str) -> float:
    """Share of characters that no one could read: controls other than blanks, and the replacement character."""
    solid = "".join(text.split())  # controls that are blanks, newlines above all, are none of it
    if solid.isprintable() and _REPLACEMENT not in solid:
        return 0.0
    return sum(not c.isprintable() or c == _REPLACEMENT for c in solid) / len(text)
