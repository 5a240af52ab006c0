"""Conditions on the records that a query may find.

    parse(["source=debian", "section=[admin, net]", "size>=10"])
    # {"source": "debian", "section": ["admin", "net"], "size": {"gte": 10}}

A condition is on `source`, `source_id`, or a key of the metadata: a value that it equals, a list of values of which it
is one, or bounds of numbers. Metadata that is a list of texts meets a condition where one of them does. What has no
such key meets none. This is what Pinecone's filters do, so that all stores find the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config import ConfigError
from pipeline.index.table import SQL_IDS as SQL_TEXTS
from pipeline.index.table import among

COLUMNS = ("source", "source_id")
SIGNS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
BOUNDS = tuple(SIGNS.values())
ALLOWED = "allowed are a value, a list of values, and gt, gte, lt and lte with numbers"

Where = Mapping[str, Any]


def parse(conditions: Sequence[str]) -> dict[str, Any]:
    """Conditions as they are written on a command line; values are YAML. Raises ConfigError."""
    where: dict[str, Any] = {}
    for text in conditions:
        match = re.fullmatch(r"([^<>=]+)(>=|<=|=|<|>)(.+)", text, re.DOTALL)
        if match is None:
            raise ConfigError(f"--where {text!r}: allowed are key=value, key=[value, value] and key>=number")
        key, sign, value = match[1].strip(), match[2], _yaml(match[3], text)
        if sign == "=":
            where[key] = value
        else:
            where[key] = {**(where[key] if isinstance(where.get(key), dict) else {}), SIGNS[sign]: value}
    return checked_where(where)


def _yaml(value: str, text: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--where {text!r}: the value is no YAML; allowed is one such as 3 or 'text'") from None


def checked_where(where: Where | None) -> dict[str, Any]:
    """The same conditions. Raises ConfigError for one that no store understands."""
    for key, wanted in (where or {}).items():
        bounds = isinstance(wanted, Mapping)
        values = list(wanted.values()) if bounds else wanted if isinstance(wanted, list) else [wanted]
        right = _is_number if bounds else _is_scalar
        if not key or key.startswith("$"):
            raise ConfigError(f"where: found the key {key!r}; allowed are source, source_id and keys of the metadata")
        if not values or not all(map(right, values)) or (bounds and not set(wanted) <= set(BOUNDS)):
            raise ConfigError(f"where: found {key} {wanted!r}; {ALLOWED}")
    return dict(where or {})


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def keeps(where: Where, row: Mapping[str, Any]) -> bool:
    """Whether one of a row's `places` meets all conditions, or the row's own source, source_id and metadata (JSON)."""
    own = [row] if "metadata" in row else []
    return any(_keeps(where, place) for place in (*own, *(row["places"] or ())))


def _keeps(where: Where, place: Mapping[str, Any]) -> bool:
    metadata = None
    for key, wanted in where.items():
        if key in COLUMNS:
            value = place[key]
        else:
            metadata = _metadata(place["metadata"]) if metadata is None else metadata
            value = metadata.get(key)
        if not _meets(value, wanted):
            return False
    return True


def _metadata(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value) and any(_meets(item, wanted) for item in value)
    if isinstance(wanted, Mapping):
        return _is_number(value) and all(_beyond(value, bound, limit) for bound, limit in wanted.items())
    return any(_same(value, one) for one in (wanted if isinstance(wanted, list) else [wanted]))


def _same(value: Any, wanted: Any) -> bool:
    """Equal, and of one kind: a truth value is no number."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value is not None and bool(value == wanted)


def _beyond(value: float, bound: str, limit: float) -> bool:
    if bound in ("gt", "gte"):
        return value > limit or (bound == "gte" and value == limit)
    return value < limit or (bound == "lte" and value == limit)


def to_sql(where: Where) -> tuple[str, bool]:
    """SQL that holds for all rows whose first place meets the conditions, and whether for no others."""
    parts, exact = [], True
    for key, wanted in where.items():
        texts = wanted if isinstance(wanted, list) else [wanted]
        if key in COLUMNS and all(isinstance(text, str) for text in texts):
            parts += list(among(key, texts)) if len(texts) <= SQL_TEXTS else []
            exact &= len(texts) <= SQL_TEXTS
            continue
        exact = False
        if re.fullmatch(r"[A-Za-z0-9_ -]+", key) and key not in COLUMNS:  # a key that JSON writes as it is
            parts.append(f"metadata LIKE '%\"{key}\"%'")
    return " AND ".join(parts) or "true", exact
