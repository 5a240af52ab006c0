"""Normalises a record's texts and decides whether to keep it.

>>> keep = Filter(source, config.data)
>>> keep(RawRecord("a.jsonl:0", {"text": "schÃ¶n\\r\\n  a text  of\\x00 two lines"}))
{'id': '6a1f…', 'source': 's', 'source_id': 's:a.jsonl:0', 'text': 'schön\\na text of two lines', 'metadata': '{}'}

Rules run in the order in which they can see what they look for: length and encoding on the raw text; unreadable
characters after mojibake is repaired; safety patterns after hidden characters are removed, but before terminal escapes
lose their first character; quality on the final text. Cost: normalising runs at 15 MB/s per core; ASCII text is faster,
and every step is linear in the text's length.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import ftfy
import regex
from ftfy.chardata import UTF8_DETECTOR_RE

from pipeline.config import ConfigError, Data, Sanitize, Source
from pipeline.core.escaping import printable
from pipeline.data.fields import EXCERPT_CHARS, RAW_EXCERPT_CHARS, RawRecord
from pipeline.data.partitions import content_id
from pipeline.data.quality import QualityRules, identify_language
from pipeline.data.safety import Rules, load_rules

_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff\u00ad]+")  # keeps ZWJ and ZWNJ, which emoji and Persian need
_BIDI_OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]+")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]+")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_BLANKS = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
_ASCII_CONTROLS = bytes(c for c in (*range(32), 127) if c not in b"\t\n")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
# Controls and code points without a character. Format characters are none: scripts, emoji and hyphenation need them.
_UNREADABLE = regex.compile(rf"(?V1)[\p{{C}}{_REPLACEMENT}--\p{{Cf}}]")
# Pieces that are repaired on their own, cut at blanks; one after a character beyond ASCII may belong to a sequence.
_PIECE = re.compile(r"(?s).{1,10000}(?:\Z|(?<=[\0-\x7f])(?=\s))|.{1,10000}")
NAMES, NAME_CHARS = 512, 200  # of metadata, which repeat: redacted once, so many and so long are kept
_MOST_MIXED = 25_000  # characters; ours: 0.3 s, because ftfy then repairs each sequence on its own


def _is_plain(text: str) -> bool:
    """Whether a text is ASCII without controls except tabs and newlines, as most are: ten times as fast as patterns."""
    return text.isascii() and len(text.encode().translate(None, _ASCII_CONTROLS)) == len(text)


class Sanitizer:
    """Normalises texts as `data.sanitize` says. `collapse`: whether to collapse blanks and empty lines."""

    def __init__(self, options: Sanitize, *, collapse: bool) -> None:
        self.options, self.collapse = options, collapse
        allowed = options.allowed_characters
        self._forbidden = None if allowed is None else regex.compile(f"[^{allowed}]+")

    def repair(self, text: str) -> str | None:
        """Repair mojibake; None if the text has more mojibake of several encodings than can be repaired in time."""
        if text.isascii() or not self.options.repair_mojibake:
            return text
        repaired, mixed = list[str](), 0
        for piece in _PIECE.findall(text):
            fixed, steps = ftfy.fix_encoding_and_explain(piece)
            if not steps or any(step.action == "apply" for step in steps):  # no encoding explains the whole piece
                mixed += sum(map(len, UTF8_DETECTOR_RE.findall(piece)))
            if mixed > _MOST_MIXED:
                return None
            repaired.append(fixed)
        return "".join(repaired)

    def unhide(self, text: str) -> str:
        """Remove what hides words from readers and patterns, but keep control characters."""
        if text.isascii():
            return text
        if self.options.remove_zero_width:
            text = _ZERO_WIDTH.sub("", text)
        if self.options.remove_bidi_overrides:
            text = _BIDI_OVERRIDES.sub("", text)
        return text

    def clean(self, text: str) -> str:
        """Unify line ends, and apply the remaining options.

        Without `collapse`, lines keep their relative indentation, which matters in code.
        """
        is_plain = _is_plain(text)
        if not is_plain:
            text = _LINE_ENDS.sub("\n", text)
            if self.options.remove_controls:
                text = _CONTROLS.sub("", text)
            if self.options.nfc:
                text = unicodedata.normalize("NFC", text)
        if self.options.lowercase:
            text = text.lower()
        if self._forbidden:
            text = self._forbidden.sub("", text)
        if self.collapse:
            lines = _BLANKS.sub(" ", text).split("\n")
            return _EMPTY_LINES.sub("\n\n", "\n".join(line.strip(" ") for line in lines)).strip("\n")
        if is_plain and text[:1] > " " and text[-1:] > " " and " \n" not in text and "\t\n" not in text:
            return text  # nothing to remove: most code
        return "\n".join(dedented([line.rstrip() for line in text.split("\n")])).strip("\n")


def dedented(lines: list[str]) -> list[str]:
    """The lines without the blanks that all begin with, as `textwrap.dedent` does; lines of blanks become empty.

    Cost: 100 ns per line, a quarter of textwrap's.
    """
    solid = [line for line in lines if line and line.strip(" \t")]
    first, last = min(solid, default=""), max(solid, default="")
    margin = 0
    while margin < len(first) and first[margin] == last[margin] and first[margin] in " \t":
        margin += 1
    return [line[margin:] if line.strip(" \t") else "" for line in lines]


def normaliser(data: Data) -> Callable[[str], str]:
    """A function that normalises other texts (queries, evaluation sets) in the same way as the sources' records."""
    sanitizer = Sanitizer(data.sanitize, collapse=all(_collapses(source, data) for source in data.sources))
    return lambda text: sanitizer.clean(sanitizer.unhide(sanitizer.repair(text) or text))


def record_normaliser(data: Data) -> Callable[[str], str]:
    """A function that normalises other texts like `normaliser`, and also redacts them as `data.safety` says."""
    normalise, safety = normaliser(data), _safety(data)
    return lambda text: normalise(safety.apply(normalise(text)).text)


def raw_text_problem(raw: str, max_chars: int) -> str | None:
    """Why a field's raw text is rejected before it is normalised (`too_long`, `invalid_utf8`), or None."""
    if len(raw) > max_chars:
        return "too_long"
    if not raw.isascii() and _SURROGATE.search(raw):
        return "invalid_utf8"  # a lone surrogate cannot be written as UTF-8
    return None


def nonprintable_share(text: str) -> float:
    """Share of unreadable characters: controls other than blanks, and the replacement character."""
    if _is_plain(text):
        return 0.0
    solid = "".join(text.split())  # blanks include newlines, which are control characters too
    if solid.isprintable() and _REPLACEMENT not in solid:
        return 0.0
    return len(_UNREADABLE.findall(solid)) / len(text)


class Filter:
    """Applies all rules to the records of one source. Raises ConfigError for invalid rules or thresholds."""

    def __init__(self, source: Source, data: Data) -> None:
        self.source, self.data = source.name, data
        self.sanitizer = Sanitizer(data.sanitize, collapse=_collapses(source, data))
        try:
            self.safety = _safety(data)
            self.quality = QualityRules(source.quality or data.quality.preset, data.quality.thresholds)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None
        self._redacted_name = lru_cache(NAMES)(self._redacted_text)

    def __call__(self, raw: RawRecord) -> dict[str, Any]:
        """A row of records.FILTERED_SCHEMA without its null columns. A rejected row has a `reason`."""
        reason = raw.reason
        fields: dict[str, str | list[str]] = {}
        for name, value in raw.fields.items():
            if isinstance(value, list):
                fields[name] = [text for text, problem in map(self._text, value) if problem is None]
            elif reason is None:
                fields[name], reason = self._text(value)
        reason = reason or self._low_quality(fields)
        origin = {"source": self.source, "source_id": printable(f"{self.source}:{raw.native_id}")}
        if reason is None:
            try:
                metadata = _writable(json.dumps(self._redacted(raw.metadata), ensure_ascii=False, allow_nan=False))
                return {"id": _id(fields), **origin, **fields, "metadata": metadata}
            except RecursionError:  # metadata nested deeper than Python's stack
                reason = "unreadable_value"
        texts = (text[:RAW_EXCERPT_CHARS] for text in raw.fields.values() if type(text) is str)
        excerpt = _writable(self._redacted(raw.excerpt or " | ".join(texts))[:EXCERPT_CHARS])
        return {"id": content_id([origin["source_id"], excerpt]), **origin, "reason": reason, "excerpt": excerpt}

    def _text(self, raw: str) -> tuple[str, str | None]:
        """The normalised text, and why it is rejected or None."""
        data = self.data
        if reason := raw_text_problem(raw, data.max_chars):
            return "", reason
        repaired = self.sanitizer.repair(raw)
        if repaired is None:
            return "", "mojibake"
        if nonprintable_share(repaired) > data.max_nonprintable:
            return "", "nonprintable"
        verdict = self.safety.apply(self.sanitizer.unhide(repaired))
        text = self.sanitizer.clean(verdict.text)
        if verdict.reason is None and text != verdict.text:  # a control character may have split a match
            verdict = self.safety.apply(text)
            text = self.sanitizer.clean(verdict.text)
        return text, verdict.reason or ("too_short" if len(text) < data.min_chars else None)

    def _redacted(self, value: Any) -> Any:
        """A value as JSON has them, with all its strings redacted, and without controls and direction overrides."""
        if value is None or isinstance(value, int | float):
            return value
        if isinstance(value, dict):
            return {self._redacted(key): self._redacted(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [*map(self._redacted, value)]
        text = str(value)
        return self._redacted_name(text) if len(text) <= NAME_CHARS else self._redacted_text(text)

    def _redacted_text(self, text: str) -> str:
        text = self.safety.redact(text)
        if not text.isprintable():
            text = _CONTROLS.sub("", _BIDI_OVERRIDES.sub("", _LINE_ENDS.sub("\n", text)))
            text = self.safety.redact(text)  # what was removed may have split a match
        if text.isascii():
            return text
        plain = self.sanitizer.clean(self.sanitizer.unhide(text))  # hidden characters may have split a match
        redacted = self.safety.redact(plain)
        return text if redacted == plain else redacted

    def _low_quality(self, fields: dict[str, Any]) -> str | None:
        """Why the document (`positive`, else `text`) is rejected, or None."""
        text, quality = fields["positive"] if "positive" in fields else fields["text"], self.data.quality
        if reason := self.quality.verdict(text):
            return reason
        if quality.languages:
            code, score = identify_language(text)
            if code not in quality.languages or score < quality.min_language_score:
                return f"language_{code}" if code not in quality.languages else "language_unsure"
        return None


def _safety(data: Data) -> Rules:
    return load_rules(Path(data.safety.rules) if data.safety.rules else None, data.safety.actions)


def _collapses(source: Source, data: Data) -> bool:
    """Whether blanks and empty lines are insignificant in a source's texts."""
    code = (source.quality or data.quality.preset) == "code" or source.type == "python_packages"
    return {"collapse": True, "keep": False, "auto": not code}[data.sanitize.whitespace]


def _id(fields: dict[str, Any]) -> str:
    """Hash of the text fields in a fixed order, negatives last."""
    texts = [fields[name] for name in ("anchor", "positive", "text") if name in fields]
    return content_id(texts + fields.get("negatives", []))


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
