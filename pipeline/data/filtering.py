"""Cleans a record's texts and decides whether it is kept: normalised fields, or the reason for rejecting it.

>>> keep = Filter(source, config.data)
>>> keep(RawRecord("a.jsonl:0", {"text": "schÃ¶n\\r\\n  a text  of\\x00 two lines"}))
{'id': '6a1f…', 'source': 's', 'source_id': 's:a.jsonl:0', 'text': 'schön\\na text of two lines', 'metadata': '{}'}

Each rule sees a field in the state in which it can find what it looks for: length and bytes as they came; patterns
after hidden characters are gone, but before terminal escapes lose their first character; quality on the final text.
Cost: 15 MB/s a core for normalising, most of it on text beyond ASCII.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import regex

from pipeline.config import ConfigError, Data, Sanitize, Source
from pipeline.data.fields import EXCERPT_CHARS, RawRecord
from pipeline.data.partitions import content_id
from pipeline.data.quality import QualityRules, identify
from pipeline.data.safety import load_rules

_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff\u00ad]+")  # ZWJ and ZWNJ stay: emoji and Persian are written with them
_BIDI_OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]+")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]+")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_BLANKS = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


class Sanitizer:
    """Normalises texts by the config's `data.sanitize`. `collapse` says what its `whitespace` means for a source."""

    def __init__(self, wanted: Sanitize, *, collapse: bool) -> None:
        self.wanted, self.collapse = wanted, collapse
        allowed = wanted.allowed_characters
        self._forbidden = None if allowed is None else regex.compile(f"[^{allowed}]+")

    def reveal(self, text: str) -> str:
        """Undo what hides words from a reader and from patterns, but leave control characters where they are."""
        if text.isascii():
            return text
        if self.wanted.repair_mojibake:
            text = ftfy.fix_encoding(text)
        if self.wanted.remove_zero_width:
            text = _ZERO_WIDTH.sub("", text)
        if self.wanted.remove_bidi_overrides:
            text = _BIDI_OVERRIDES.sub("", text)
        return text

    def tidy(self, text: str) -> str:
        """The text as it is kept: one kind of line end, and whatever else is switched on.

        Without `collapse`, lines keep their relative indentation, which has a meaning in code.
        """
        text = _LINE_ENDS.sub("\n", text)
        if self.wanted.remove_controls:
            text = _CONTROLS.sub("", text)
        if self.wanted.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.wanted.lowercase:
            text = text.lower()
        if self._forbidden:
            text = self._forbidden.sub("", text)
        if self.collapse:
            lines = _BLANKS.sub(" ", text).split("\n")
            return _EMPTY_LINES.sub("\n\n", "\n".join(line.strip(" ") for line in lines)).strip("\n")
        return textwrap.dedent("\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")


def normaliser(data: Data) -> Callable[[str], str]:
    """A function that normalises texts from elsewhere (queries, evaluation sets) like the records of the sources."""
    sanitizer = Sanitizer(data.sanitize, collapse=all(_collapses(source, data) for source in data.sources))
    return lambda text: sanitizer.tidy(sanitizer.reveal(text))


def unreadable(raw: str, *, max_chars: int, max_nonprintable: float) -> str | None:
    """Why a field's raw text is rejected, or None: `too_long`, `invalid_utf8`, `nonprintable`.

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
    """Share of characters that nobody can read: controls other than blanks, and the replacement character."""
    solid = "".join(text.split())  # without blanks, newlines above all, which are control characters too
    if solid.isprintable() and _REPLACEMENT not in solid:
        return 0.0
    return sum(not c.isprintable() or c == _REPLACEMENT for c in solid) / len(text)


class Filter:
    """The rules of one source. Raises ConfigError for wrong rules or thresholds."""

    def __init__(self, source: Source, data: Data) -> None:
        self.source, self.data = source.name, data
        self.sanitizer = Sanitizer(data.sanitize, collapse=_collapses(source, data))
        try:
            self.safety = load_rules(Path(data.safety.rules) if data.safety.rules else None, data.safety.actions)
            self.quality = QualityRules(source.quality or data.quality.preset, data.quality.thresholds)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None

    def __call__(self, raw: RawRecord) -> dict[str, Any]:
        """A row of records.FILTERED_SCHEMA, without the columns that are null. A rejected one has a `reason`."""
        reason = raw.reason
        fields: dict[str, str | list[str]] = {}
        for name, value in raw.fields.items():
            if isinstance(value, list):
                fields[name] = [text for text, problem in map(self._text, value) if problem is None]
            elif reason is None:
                fields[name], reason = self._text(value)
        reason = reason or self._low_quality(fields)
        origin = {"source": self.source, "source_id": _writable(f"{self.source}:{raw.native_id}")}
        if reason is None:
            try:
                metadata = _writable(_as_json(raw.metadata))
                return {"id": _id(fields), **origin, **fields, "metadata": metadata}
            except RecursionError:  # lists in lists in lists, deeper than Python's stack
                reason = "unreadable_value"
        excerpt = raw.excerpt or " | ".join(text[:EXCERPT_CHARS] for text in raw.fields.values() if type(text) is str)
        excerpt = _writable(excerpt[:EXCERPT_CHARS])
        return {"id": content_id([origin["source_id"], excerpt]), **origin, "reason": reason, "excerpt": excerpt}

    def _text(self, raw: str) -> tuple[str, str | None]:
        """A field as it is kept, and why it is rejected. Of negatives, only the rejected ones are left out."""
        data = self.data
        if reason := unreadable(raw, max_chars=data.max_chars, max_nonprintable=data.max_nonprintable):
            return "", reason
        found = self.safety.apply(self.sanitizer.reveal(raw))
        text = self.sanitizer.tidy(found.text)
        if found.reason is None and text != found.text:  # a control character may have split what a rule looks for
            found = self.safety.apply(text)
            text = self.sanitizer.tidy(found.text)
        return text, found.reason or ("too_short" if len(text) < data.min_chars else None)

    def _low_quality(self, fields: dict[str, Any]) -> str | None:
        """Why the searched text (`positive`, else `text`) is rejected, or None."""
        text, wanted = fields["positive"] if "positive" in fields else fields["text"], self.data.quality
        if reason := self.quality.verdict(text):
            return reason
        if wanted.languages:
            code, score = identify(text)
            if code not in wanted.languages or score < wanted.min_language_score:
                return f"language_{code}" if code not in wanted.languages else "language_unsure"
        return None


def _collapses(source: Source, data: Data) -> bool:
    """Whether blanks and empty lines mean nothing in a source's texts."""
    code = (source.quality or data.quality.preset) == "code" or source.type == "python_packages"
    return {"collapse": True, "keep": False, "auto": not code}[data.sanitize.whitespace]


def _id(fields: dict[str, Any]) -> str:
    """Hash of the text fields in a fixed order, negatives last."""
    texts = [fields[name] for name in ("anchor", "positive", "text") if name in fields]
    return content_id(texts + fields.get("negatives", []))


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_json(value: Any) -> str:
    """JSON, in which NaN and infinities become null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), ensure_ascii=False, default=str)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [*map(_without_nan, value)] if isinstance(value, list | tuple) else value
