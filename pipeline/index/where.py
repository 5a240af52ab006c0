"""Filter conditions for search.

    parse(["source=debian", "section=[admin, net]", "year=2021", "size>=10"])
    # {"source": ["debian"], "section": ["admin", "net"], "year": ["2021", 2021], "size": {"gte": 10}}

Each condition filters `source`, `source_id` or a metadata key by a value, a list of allowed values, or numeric bounds.
A list of texts in the metadata matches if one of them does; a missing key never matches. Pinecone's filters work the
same way, so all stores return the same results.

On the command line a value is the stored text as it is written, so `02143`, `NO`, `1.10` and `12:30` find those texts.
What is written like a number or a truth value also finds the stored number or truth value.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from pipeline.config import ConfigError
from pipeline.index.table import SQL_IDS as SQL_TEXTS
from pipeline.index.table import among, parse_metadata

COLUMNS = ("source", "source_id")
SIGNS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
BOUNDS = tuple(SIGNS.values())
ALLOWED = "allowed are a value, a list of values, and gt, gte, lt and lte with numbers"
SHOWN_VALUES = 5  # of a key, in a message
_CONDITION = re.compile(r"([^<>=]+?)(>=|<=|!=|=|<|>)(.*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)

Where = Mapping[str, Any]


def parse(conditions: Sequence[str]) -> dict[str, Any]:
    """Parse conditions from the command line: key=value, key=[value, value], key>=number. Raises ConfigError."""
    where: dict[str, Any] = {}
    for text in conditions:
        match = _CONDITION.fullmatch(text)
        if match is None or match[2] == "!=":
            raise ConfigError(
                f"--where {text!r}: allowed are key=value, key=[value, value], and key>=number with >=, >, <= or <"
            )
        key, sign, value = match[1].strip(), match[2], match[3]
        condition = _values(value) if sign == "=" else {SIGNS[sign]: _bound(value, text)}
        if key in where:
            if not isinstance(where[key], dict) or not isinstance(condition, dict):
                raise ConfigError(f"--where {text!r}: found two conditions on {key}; for either value, {key}=[a, b]")
            condition = {**where[key], **condition}
        where[key] = condition
    return checked_where(where)


def _values(written: str) -> list[str | int | float | bool]:
    """The stored values that a written value, or one of a written list, may mean.

    `==` means `=`, and blanks around a value are not part of it. A stored text may also begin with `=`, `[` or a blank.
    """
    texts = {written: None, written.removeprefix("=").strip(): None}
    texts |= dict.fromkeys(_items(written.strip()))
    values = list[str | int | float | bool](texts)
    values += [number for text in texts if (number := _number(text)) is not None]
    return values + [text.lower() == "true" for text in texts if text.lower() in ("true", "false")]


def _items(text: str) -> list[str]:
    """The texts of a list such as `[a, 'b, c']`; none if it is not a list."""
    try:
        items = yaml.load(text, yaml.BaseLoader) if text.startswith("[") else []
    except (yaml.YAMLError, RecursionError):
        return []
    return items if all(isinstance(item, str) for item in items) else []


def _number(text: str) -> int | float | None:
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _bound(written: str, text: str) -> int | float:
    number = _number(written.strip())
    if number is None:
        raise ConfigError(f"--where {text!r}: >=, >, <= and < compare numbers; found {written!r}; for text, key=value")
    return number


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
        if bounds and key in COLUMNS:
            raise ConfigError(f"where: found {key} {condition!r}; {key} is text, which only equality can filter")
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


def why_none(where: Where, places: Iterable[Mapping[str, Any]]) -> str:
    """Why no record meets the conditions. `places` have `source`, `source_id` and the keys of the metadata.

    Raises ConfigError for a key that no record has, and for bounds on a key that has no numbers.
    """
    samples = dict[str, dict[Any, None]]()
    """Key → some of its values, beginning with a number if it has one."""
    met = set[str]()
    for place in places:
        met |= {key for key in where.keys() - met if _meets(place.get(key), where[key])}
        for key, value in place.items():
            _sample(samples.setdefault(key, {}), value)
    for key, condition in where.items():
        if key not in samples:
            near = difflib.get_close_matches(key, samples, 1)
            meant = f"did you mean {near[0]}? The" if near else "the"
            keys = ", ".join([*COLUMNS, *sorted(samples.keys() - {*COLUMNS})])
            raise ConfigError(f"where: found no record with the key {key!r}; {meant} keys are {keys}")
        if isinstance(condition, Mapping) and not any(map(_is_number, samples[key])):
            first = next(iter(samples[key]), None)
            raise ConfigError(
                f"where: found bounds on {key}, which has no numbers, but values such as {first!r}; use {key}=VALUE, "
                "or give the source numbers"
            )
    for key in where:
        if key not in met:
            values = ", ".join(str(value)[:60] for value in samples[key]) or "null"
            return f"no record meets the condition on {key}, which has values such as {values}"
    return "each condition is met by some record, but no record meets all of them"


def _sample(seen: dict[Any, None], value: Any) -> None:
    """Add a value, or a list's values, to the few that are shown."""
    for each in value if isinstance(value, list) else [value]:
        if not _is_scalar(each):
            continue
        if len(seen) < SHOWN_VALUES:
            seen.setdefault(each)
        elif _is_number(each) and not any(map(_is_number, seen)):
            seen.pop(next(iter(seen)))
            seen[each] = None


def to_sql(where: Where) -> tuple[str, bool]:
    """SQL that selects all rows whose first place meets the conditions, and whether it selects no others."""
    parts, exact = [], True
    for key, condition in where.items():
        if key in COLUMNS:
            values = condition if isinstance(condition, list) else [condition]
            texts = [value for value in values if isinstance(value, str)]
            parts += list(among(key, texts)) if len(texts) <= SQL_TEXTS else []
            parts += [] if texts else ["false"]
            exact &= len(texts) <= SQL_TEXTS
            continue
        exact = False
        if re.fullmatch(r"[A-Za-z0-9_ -]+", key):  # JSON does not escape such a key
            parts.append(f"metadata LIKE '%\"{key}\"%'")
    return " AND ".join(parts) or "true", exact
