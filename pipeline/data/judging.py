"""The verdict on a record: its normalised fields, or the reason for refusing it.

    judge = Judge(source, config.data)
    judge(RawRecord("a.jsonl:0", {"anchor": "…", "positive": "…"}))       # a row of JUDGED_SCHEMA

Every rule looks at a field in the state in which it can see what it looks for: length and bytes as they came, patterns
once nothing hides them but before terminal escapes lose their first character, quality on the text as it is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError, Data, Source
from pipeline.data import language, quality, safety
from pipeline.data.fields import RawRecord
from pipeline.data.identity import content_id
from pipeline.data.manifest import EXCERPT_CHARS, RECORD_SCHEMA
from pipeline.data.sanitize import Sanitizer, unreadable

JUDGED_SCHEMA = pa.schema([*RECORD_SCHEMA, ("reason", pa.string()), ("excerpt", pa.string())])


class Judge:
    """The rules of one source. Raises ConfigError for rules or thresholds that are none."""

    def __init__(self, source: Source, data: Data) -> None:
        preset = source.quality or data.quality.preset
        self.source, self.data = source.name, data
        self.sanitizer = _sanitizer(data, collapse=_collapses(source, data))
        try:
            self.safety = safety.load_rules(Path(data.safety.rules) if data.safety.rules else None, data.safety.actions)
            self.quality = quality.with_thresholds(preset, data.quality.thresholds)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None

    def __call__(self, raw: RawRecord) -> dict[str, Any]:
        """A row of JUDGED_SCHEMA, without the fields that are null."""
        reason = raw.reason
        fields: dict[str, str | list[str]] = {}
        for name, value in raw.fields.items():
            if isinstance(value, list):
                fields[name] = [text for text, problem in map(self._text, value) if problem is None]
            elif reason is None:
                fields[name], reason = self._text(value)
        reason = reason or self._worth(fields)
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
        """A field as it is kept, and what is wrong with it. Negatives with something wrong are left out."""
        data = self.data
        if reason := unreadable(raw, max_chars=data.max_chars, max_nonprintable=data.max_nonprintable):
            return "", reason
        found = self.safety.apply(self.sanitizer.reveal(raw))
        text = self.sanitizer.tidy(found.text)
        if found.reason is None and text != found.text:  # a control character may have split what a rule looks for
            found = self.safety.apply(text)
            text = self.sanitizer.tidy(found.text)
        return text, found.reason or ("too_short" if len(text) < data.min_chars else None)

    def _worth(self, fields: dict[str, Any]) -> str | None:
        """What is wrong with the text that is searched."""
        text, wanted = fields["positive"] if "positive" in fields else fields["text"], self.data.quality
        if reason := quality.quality_verdict(text, self.quality):
            return reason
        if wanted.languages:
            code, score = language.identify(text)
            if code not in wanted.languages or score < wanted.min_language_score:
                return f"language_{code}" if code not in wanted.languages else "language_unsure"
        return None


def normaliser(data: Data) -> Callable[[str], str]:
    """What makes texts from elsewhere, queries and evaluation sets, look as the records that a model was trained on."""
    sanitizer = _sanitizer(data, collapse=all(_collapses(source, data) for source in data.sources))
    return lambda text: sanitizer.tidy(sanitizer.reveal(text))


def _sanitizer(data: Data, *, collapse: bool) -> Sanitizer:
    return Sanitizer(**data.sanitize.model_dump(exclude={"whitespace"}), collapse=collapse)


def _collapses(source: Source, data: Data) -> bool:
    """Whether blanks and empty lines mean nothing in a source's texts."""
    code = (source.quality or data.quality.preset) == "code" or source.type == "python_packages"
    return {"collapse": True, "keep": False, "auto": not code}[data.sanitize.whitespace]


def _id(fields: dict[str, Any]) -> str:
    """Of the text fields in a fixed order, negatives last."""
    texts = [fields[name] for name in ("anchor", "positive", "text") if name in fields]
    return content_id(texts + fields.get("negatives", []))


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_json(value: Any) -> str:
    """JSON, which has no NaN and no infinities: they become null."""
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
