"""Turns a source's rows into records, using the source's `fields`, such as `{anchor: title, positive: body.text}`.

    to_record = FieldMap(source)
    to_record(Row("a.jsonl:0", {"title": "Kites", "body": {"text": "A kite is a bird."}}))
    # RawRecord(native_id='a.jsonl:0', fields={'anchor': 'Kites', 'positive': 'A kite is a bird.'}, metadata={}, …)

A row with a missing field, or with anything but text in it, becomes a record with a reason. Cost: 1.5 µs per row.

Ids and metadata of all formats are converted in the same way:

    in the source              in metadata, as JSON      as an id
    text                       the text                  the text
    integer, decimal, float    a number                  12 and 12.0: '12'; 12.50: '12.5'
    NaN, infinity, null        null                      the row's position
    boolean                    true or false             the row's position
    binary                     its UTF-8 text, else hexadecimal digits
    date, time, timestamp      ISO 8601: '2024-03-05', '12:30:00', '2024-03-05T12:30:00+00:00'
    duration                   seconds                   seconds
    list, struct, map          a list or an object       the row's position
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pipeline.config import Source

EXCERPT_CHARS = 200
RAW_EXCERPT_CHARS = 100 * EXCERPT_CHARS  # before redaction: a secret that is cut is no longer recognised
TEXT_FIELDS = ("anchor", "positive", "negatives", "text")
UNREADABLE_FILE = "unreadable_file"
UNPACKS_TOO_MUCH = "unpacks_too_much"
LOST_FILES = (UNREADABLE_FILE, UNPACKS_TOO_MUCH)
"""Reasons of the record that stands for all rows of a file that could not be read; nobody knows how many."""
_MISSING = object()
_PLAIN = (str, int, bool, type(None))
_GIVEN_METADATA = {"text": ("file", "line"), "python_packages": ("file", "line", "name")}


@dataclass(slots=True)
class Row:
    """A row's values under the source's field names. `position` is its file and byte, line or row number.

    `reason` is set if it could not be read. `names` lists all fields of the row if the reader loaded only some.
    """

    position: str
    values: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()
    reason: str | None = None
    excerpt: str = ""


def broken(position: str, reason: str, excerpt: str | bytes) -> Row:
    """A row that could not be read."""
    text = excerpt[: RAW_EXCERPT_CHARS * 4].decode("utf-8", "replace") if isinstance(excerpt, bytes) else excerpt
    return Row(position, reason=reason, excerpt=text[:RAW_EXCERPT_CHARS])


@dataclass(slots=True)
class RawRecord:
    """A record with unnormalised texts; negatives are a list. `reason` is set if it could not be read.

    The excerpt is not redacted yet, and at most RAW_EXCERPT_CHARS characters long.
    """

    native_id: str
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    excerpt: str = ""


def text_fields(source: Source) -> list[str]:
    """The text fields of a source's records: `["anchor", "positive"]`, optionally `"negatives"`, or `["text"]`."""
    mapped = _mapped(source)
    return [name for name in TEXT_FIELDS if name in mapped]


def own_fields(source: Source) -> list[str]:
    """The source's columns that a reader must load; nested ones are dotted. `id` is loaded if it exists."""
    mapped = {**_mapped(source), "id": source.fields.get("id", "id")}
    return list(dict.fromkeys([*mapped.values(), *source.metadata]))


def required_fields(source: Source) -> list[str]:
    """The source's columns that must exist: the mapped text fields, and `id` if it is mapped."""
    return list(dict.fromkeys([*_mapped(source).values(), *source.fields.values()]))


def _mapped(source: Source) -> dict[str, str]:
    """Text field of the record → the source's column."""
    mapped: dict[str, str] = {name: own for name, own in source.fields.items() if name != "id"}
    if mapped:
        return mapped
    if source.type == "python_packages":
        return {"anchor": "docstring", "positive": "code"}
    if source.type == "text" and not source.pairs:
        return {"anchor": "title", "positive": "body"} if source.record == "file" else {"text": "text"}
    return {"anchor": "anchor", "positive": "positive"}


class FieldMap:
    """Maps a source's rows to records."""

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
                record.fields[name] = _text(row, own)
            if self._negatives is not None:
                record.fields["negatives"] = _texts(self._negatives, lookup(row.values, self._negatives))
        except _NoTextError as error:
            return RawRecord(record.native_id, reason=error.reason, excerpt=error.excerpt)
        for name in self._given:
            if name in row.values:
                record.metadata[name] = row.values[name]
        try:
            for name in self._metadata:
                value = lookup(row.values, name)
                record.metadata[name] = value if type(value) in _PLAIN else json_value(value)
        except RecursionError:
            return RawRecord(record.native_id, reason="unreadable_value", excerpt=f"{name} is nested too deeply")
        return record

    def _native_id(self, row: Row) -> str:
        own = lookup(row.values, self._id)
        if type(own) not in _PLAIN:
            own = None if isinstance(own, Mapping | list | tuple) else json_value(own)
            if isinstance(own, float) and own.is_integer():
                own = int(own)
        return row.position if own is None or isinstance(own, bool) else str(own)


def has(values: dict[str, Any], path: str) -> bool:
    return lookup(values, path) is not _MISSING


def lookup(values: Any, path: str) -> Any:
    """The value at a field path (`a.b` is nested). None below a null, `_MISSING` if the field does not exist."""
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


def json_value(value: Any) -> Any:
    """A value of a row as JSON (RFC 8259) can hold it; the module's docstring lists the conversions."""
    match value:
        case str() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            if not value.is_finite():
                return None
            return int(value) if value == value.to_integral_value() else float(value)
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return value.hex()
        case datetime.date() | datetime.time():  # a datetime is a date too
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case Mapping():
            return {str(json_value(key)): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [*map(json_value, value)]
    return None if value is _MISSING else str(value)


class _NoTextError(Exception):
    def __init__(self, reason: str, excerpt: str) -> None:
        self.reason, self.excerpt = reason, excerpt[:RAW_EXCERPT_CHARS]


def _text(row: Row, own: str) -> str:
    value = lookup(row.values, own)
    if isinstance(value, str):
        return value
    if value is _MISSING:
        names = ", ".join(map(str, row.names or row.values)) or "none"
        raise _NoTextError("missing_field", f"no field {own!r}; the row has {names}")
    return "\n\n".join([_one_text(own, part) for part in value]) if isinstance(value, list) else _one_text(own, value)


def _texts(own: str, value: Any) -> list[str]:
    if value is None or value is _MISSING:
        return []
    return [_one_text(own, part) for part in (value if isinstance(value, list) else [value])]


def _one_text(own: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # old Parquet writers do not mark strings as text
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise _NoTextError("invalid_utf8", f"{own} is {value[:RAW_EXCERPT_CHARS]!r}") from None
    raise _NoTextError("null_field" if value is None else "wrong_type", f"{own} is {value!r}")
