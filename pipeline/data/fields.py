"""From a row, as a source has it, to a record: `fields: {anchor: title, positive: body.text}`.

    to_record = FieldMap(source)
    to_record(Row("a.jsonl:0", {"title": "Kites", "body": {"text": "A kite is a bird."}}))
    # RawRecord(native_id='a.jsonl:0', fields={'anchor': 'Kites', 'positive': 'A kite is a bird.'}, metadata={}, …)

A row that lacks a field, or has something other than text there, becomes a record with a reason. 1.5 µs a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Source

EXCERPT_CHARS = 200
ORDER = ("text", "anchor", "positive", "negatives")
_MISSING = object()


@dataclass(slots=True)
class Row:
    """A row's values by the source's own names, and its position: file and byte, line or row. `reason`: why it is none.

    `names` are all the fields that there are, where a reader took only some.
    """

    position: str
    values: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()
    reason: str | None = None
    excerpt: str = ""


def broken(position: str, reason: str, excerpt: str | bytes) -> Row:
    """What stands in for a row that cannot be read."""
    text = excerpt[: EXCERPT_CHARS * 4].decode("utf-8", "replace") if isinstance(excerpt, bytes) else excerpt
    return Row(position, reason=reason, excerpt=text[:EXCERPT_CHARS])


@dataclass(slots=True)
class RawRecord:
    """A record as its source has it: raw texts, of negatives a list. `reason` is set where it could not be read."""

    native_id: str
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    excerpt: str = ""


def text_fields(source: Source) -> list[str]:
    """The record fields that a source gives: `["anchor", "positive"]`, with `"negatives"` or not, or `["text"]`."""
    mapped = _mapped(source)
    return [name for name in ORDER if name in mapped]


def own_fields(source: Source) -> list[str]:
    """The source's own fields that records are made of, dots for nested ones; `id` is read where there is one."""
    mapped = {**_mapped(source), "id": source.fields.get("id", "id")}
    return list(dict.fromkeys([*mapped.values(), *source.metadata]))


def required_fields(source: Source) -> list[str]:
    """The source's own fields that it must have: those that `fields` names, else those that records are made of."""
    return list(dict.fromkeys([*_mapped(source).values(), *source.fields.values()]))


def _mapped(source: Source) -> dict[str, str]:
    """Record field → own field, of texts."""
    mapped: dict[str, str] = {name: own for name, own in source.fields.items() if name != "id"}
    if mapped:
        return mapped
    if source.type == "python_packages":
        return {"anchor": "docstring", "positive": "code"}
    if source.type == "text":
        return {"anchor": "title", "positive": "body"} if source.record == "file" else {"text": "text"}
    return {"anchor": "anchor", "positive": "positive"}


class FieldMap:
    """Turns a source's rows into its records."""

    def __init__(self, source: Source) -> None:
        mapped = _mapped(source)
        self._texts = [(name, mapped[name]) for name in text_fields(source) if name != "negatives"]
        self._negatives = mapped.get("negatives")
        self._id = source.fields.get("id", "id")
        self._metadata = source.metadata
        self._given = _GIVEN_METADATA.get(source.type, ())

    def __call__(self, row: Row) -> RawRecord:
        if row.reason is not None:
            return RawRecord(row.position, reason=row.reason, excerpt=row.excerpt)
        record = RawRecord(self._native_id(row))
        try:
            for name, own in self._texts:
                record.fields[name] = _text(own, lookup(row.values, own))
            if self._negatives is not None:
                record.fields["negatives"] = _texts(self._negatives, lookup(row.values, self._negatives))
        except _NoTextError as problem:
            return RawRecord(record.native_id, reason=problem.reason, excerpt=problem.about(row))
        for name in self._given:
            if name in row.values:
                record.metadata[name] = row.values[name]
        for name in self._metadata:
            value = lookup(row.values, name)
            record.metadata[name] = None if value is _MISSING else value
        return record

    def _native_id(self, row: Row) -> str:
        own = lookup(row.values, self._id)
        return str(own) if isinstance(own, str | int) and not isinstance(own, bool) else row.position


_GIVEN_METADATA = {"text": ("file", "line"), "python_packages": ("file", "line", "name")}


def has(values: dict[str, Any], path: str) -> bool:
    return lookup(values, path) is not _MISSING


def lookup(values: Any, path: str) -> Any:
    """The value at a name, or at a path of names with dots between them: None under a null, `_MISSING` if absent."""
    if path in values:
        return values[path]
    if "." not in path:
        return _MISSING
    for part in path.split("."):
        if values is None:
            return None
        if not isinstance(values, dict) or part not in values:
            return _MISSING
        values = values[part]
    return values


class _NoTextError(Exception):
    def __init__(self, reason: str, own: str, value: Any = None) -> None:
        self.reason, self._own, self._value = reason, own, value

    def about(self, row: Row) -> str:
        if self.reason == "missing_field":
            names = ", ".join(map(str, row.names or row.values)) or "none"
            return f"no field {self._own!r}; it has {names}"[:EXCERPT_CHARS]
        return f"{self._own} is {self._value!r}"[:EXCERPT_CHARS]


def _text(own: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n\n".join([_one_text(own, part) for part in value])
    if value is _MISSING:
        raise _NoTextError("missing_field", own)
    return _one_text(own, value)


def _texts(own: str, value: Any) -> list[str]:
    if value is None or value is _MISSING:
        return []
    return [_one_text(own, part) for part in (value if isinstance(value, list) else [value])]


def _one_text(own: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise _NoTextError("null_field", own, value)
    if isinstance(value, bytes):  # Parquet files of old writers do not mark text as text
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise _NoTextError("invalid_utf8", own, value[:EXCERPT_CHARS]) from None
    raise _NoTextError("wrong_type", own, value)
