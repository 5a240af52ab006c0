"""Filter conditions for search.

    parse(["source=debian", "section=[admin, net]", "size>=10"])
    # {"source": "debian", "section": ["admin", "net"], "size": {"gte": 10}}

Each condition filters `source`, `source_id` or a metadata key by a value, a list of allowed values, or numeric bounds.
A list of texts in the metadata matches if one of them does; a missing key never matches. Pinecone's filters work the
same way, so all stores return the same results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config import ConfigError
from pipeline.index.table import SQL_IDS as SQL_TEXTS
from pipeline.index.table import among, parse_metadata

COLUMNS = ("source", "source_id")
SIGNS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
BOUNDS = tuple(SIGNS.values())
ALLOWED = "allowed are a value, a list of values, and gt, gte, lt and lte with numbers"

Where = Mapping[str, Any]


def parse(conditions: Sequence[str]) -> dict[str, Any]:
    """Parse conditions from the command line; values are YAML. Raises ConfigError."""
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
        raise ConfigError(f"--where {text!r}: the value is not YAML; allowed is a value such as 3 or 'text'") from None


def checked_where(where: Where | None) -> dict[str, Any]:
    """Return the conditions. Raises ConfigError for an unsupported one."""
    for key, condition in (where or {}).items():
        bounds = isinstance(condition, Mapping)
        values = list(condition.values()) if bounds else condition if isinstance(condition, list) else [condition]
        is_allowed = _is_number if bounds else _is_scalar
        if not key or key.startswith("$"):
            raise ConfigError(f"where: found the key {key!r}; allowed are source, source_id and keys of the metadata")
        if not values or not all(map(is_allowed, values)) or (bounds and not set(condition) <= set(BOUNDS)):
            raise ConfigError(f"where: found {key} {condition!r}; {ALLOWED}")
    return dict(where or {})


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def keeps(where: Where, row: Mapping[str, Any]) -> bool:
    """Whether one of a row's `places`, or the row's own source, source_id and metadata (JSON), meets all conditions."""
    own = [row] if "metadata" in row else []
    return any(_meets_all(where, place) for place in (*own, *(row["places"] or ())))


def _meets_all(where: Where, place: Mapping[str, Any]) -> bool:
    metadata = None
    for key, condition in where.items():
        if key in COLUMNS:
            value = place[key]
        else:
            metadata = parse_metadata(place["metadata"]) if metadata is None else metadata
            value = metadata.get(key)
        if not _meets(value, condition):
            return False
    return True


def _meets(value: Any, condition: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value) and any(_meets(item, condition) for item in value)
    if isinstance(condition, Mapping):
        return _is_number(value) and all(_in_bound(value, bound, limit) for bound, limit in condition.items())
    return any(_equal(value, each) for each in (condition if isinstance(condition, list) else [condition]))


def _equal(value: Any, other: Any) -> bool:
    """Like ==, but True does not equal 1, and None equals nothing."""
    return isinstance(value, bool) == isinstance(other, bool) and value is not None and bool(value == other)


def _in_bound(value: float, bound: str, limit: float) -> bool:
    if bound in ("gt", "gte"):
        return value > limit or (bound == "gte" and value == limit)
    return value < limit or (bound == "lte" and value == limit)


def to_sql(where: Where) -> tuple[str, bool]:
    """SQL that selects all rows whose first place meets the conditions, and whether it selects no others."""
    parts, exact = [], True
    for key, condition in where.items():
        texts = condition if isinstance(condition, list) else [condition]
        if key in COLUMNS and all(isinstance(text, str) for text in texts):
            parts += list(among(key, texts)) if len(texts) <= SQL_TEXTS else []
            exact &= len(texts) <= SQL_TEXTS
            continue
        exact = False
        if re.fullmatch(r"[A-Za-z0-9_ -]+", key) and key not in COLUMNS:  # JSON does not escape such a key
            parts.append(f"metadata LIKE '%\"{key}\"%'")
    return " AND ".join(parts) or "true", exact
