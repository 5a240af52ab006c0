"""Converts rows of the vector table to Pinecone records and back.

    {"id": "9f0c…", "values": […], "metadata": {"source": "debian", "source_id": "…", "text": "…", "section": "net", …}}

The metadata of a row's places is flattened into the record's metadata, so that you can filter by it. With several
places, `source`, `source_id` and keys with differing texts become lists of texts, and a filter needs to match one. Keys
that differ otherwise are listed in `mixed_keys`, and a filter on such a key keeps the record as a candidate. Values
that Pinecone does not accept (nulls, objects, other lists, reserved names) go into `metadata_json`, and several places
into `places_json`. `digest` is the row's digest, which identifies its version.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import orjson
import pyarrow as pa

from pipeline.index.dead_letters import Refused
from pipeline.index.vectors import as_matrix
from pipeline.index.where import COLUMNS

T = TypeVar("T")
OWN = ("source", "source_id", "text", "digest", "parent_id", "metadata_json", "places_json", "mixed_keys")
ID_BYTES = 512
METADATA_BYTES = 40_960
PLACES_BYTES = 10_000  # of a record's places, which use up to three times as many bytes of the metadata
EXACT = 2**53  # larger integers do not survive a conversion to float64


def bad_id(i: str) -> str | None:
    """Why Pinecone does not accept an id, or None."""
    if not i or not i.isascii() or "\0" in i:
        return "its id is empty or not ASCII, which Pinecone does not accept"
    return f"its id has {len(i):,} bytes; Pinecone accepts {ID_BYTES}" if len(i) > ID_BYTES else None


def to_records(
    rows: pa.Table, keys: Sequence[str] | None, text_bytes: int
) -> tuple[list[dict[str, Any]], list[Refused], int]:
    """Convert rows to records. Returns the records, the rows refused, and how many texts or places were truncated."""
    vectors = as_matrix(rows["vector"]).astype(np.float32)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    # The detour through JSON gives float32's few digits instead of float64's many: half the bytes.
    values = orjson.loads(orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY))
    columns = [name for name in ("id", "text", "digest", "parent_id", "places") if name in rows.column_names]
    records, refused, cut = [], [], 0
    for row, vector, length in zip(rows.select(columns).to_pylist(), values, lengths, strict=True):
        try:
            if reason := bad_id(row["id"]) or _bad_vector(length):
                raise ValueError(reason)
            metadata, is_complete = _metadata(row, keys, text_bytes)
        except ValueError as error:
            refused.append(Refused(row["id"], str(error), 0))
            continue
        cut += not is_complete
        records.append({"id": row["id"], "values": vector, "metadata": metadata})
    return records, refused, cut


def _bad_vector(length: float) -> str | None:
    if not np.isfinite(length):
        return "its vector holds NaN or infinity"
    return None if length else "its vector is zero, so it has no cosine"


def _metadata(row: Mapping[str, Any], keys: Sequence[str] | None, text_bytes: int) -> tuple[dict[str, Any], bool]:
    """A record's metadata, and whether text and places are complete. Raises ValueError if it exceeds the limit."""
    every = [{**place, "metadata": _parsed(place["metadata"], keys)} for place in row["places"]]
    sizes = accumulate(len(json.dumps(place)) for place in every)
    places = every[: max(1, bisect_right([*sizes], PLACES_BYTES))]
    flat, mixed = _flat([place["metadata"] for place in places])
    ours: dict[str, Any] = {name: row[name] for name in ("digest", "parent_id") if row.get(name) is not None}
    for name in COLUMNS:
        texts = [*dict.fromkeys(place[name] for place in places if place[name] is not None)]
        ours |= {name: texts if len(texts) > 1 else texts[0]} if texts else {}
    if len(places) > 1:
        ours["places_json"] = json.dumps([[*map(place.get, COLUMNS), place["metadata"]] for place in places])
        ours |= {"mixed_keys": mixed} if mixed else {}
    elif left := {key: value for key, value in places[0]["metadata"].items() if key not in flat}:
        ours["metadata_json"] = json.dumps(left)
    if row["text"] is not None:
        others = _bytes({**flat, **ours, "text": ""})
        ours["text"] = _fitting(_cut(row["text"], text_bytes), METADATA_BYTES - others)
    size = _bytes({**flat, **ours})
    if size > METADATA_BYTES:
        raise ValueError(f"its metadata has {size:,} bytes without the text; Pinecone accepts {METADATA_BYTES:,}")
    return {**flat, **ours}, ours.get("text") == row["text"] and len(places) == len(every)


def _parsed(text: str | None, keys: Sequence[str] | None) -> dict[str, Any]:
    """Metadata as an object, with null for NaN and infinity."""
    try:
        metadata = json.loads(text or "{}", parse_constant=lambda _: None, parse_float=_finite)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a JSON object")
    return {key: value for key, value in metadata.items() if keys is None or key in keys}


def _finite(digits: str) -> float | None:
    return number if math.isfinite(number := float(digits)) else None


def _flat(places: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The filterable metadata of all places, and the keys with differing values that are not all texts."""
    flat: dict[str, Any] = {}
    mixed = []
    for key in dict.fromkeys(key for metadata in places for key in metadata):
        values = [metadata[key] for metadata in places if key in metadata and _fits(key, metadata[key])]
        texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
        if values and all(type(value) is type(values[0]) and value == values[0] for value in values):
            flat[key] = values[0]
        elif values and all(isinstance(text, str) for text in texts):
            flat[key] = [*dict.fromkeys(texts)]
        elif values:
            mixed.append(key)
    return flat, mixed


def _fits(key: str, value: Any) -> bool:
    if key in OWN or key.startswith("$"):
        return False
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= EXACT)


def _cut(text: str, size: int) -> str:
    """The text's first `size` bytes, without splitting a character."""
    return text.encode()[:size].decode(errors="ignore")


def _fitting(text: str, room: int) -> str:
    """The longest prefix of the text that fits in `room` bytes of JSON, with escapes."""
    if _bytes(text) - 2 <= room:
        return text
    return text[: max(0, bisect_right(range(len(text)), room, key=lambda end: _bytes(text[:end]) - 2) - 1)]


def _bytes(value: Any) -> int:
    return len(orjson.dumps(value))


def batched(
    items: Iterable[T], most: int, size_of: Callable[[T], int] = lambda item: 0, most_bytes: int = 0
) -> Iterator[list[T]]:
    """Yield groups of at most `most` items and `most_bytes` bytes; a larger item is alone in its group."""
    group, total = list[T](), 0
    for item in items:
        size = size_of(item)
        if group and (len(group) == most or total + size > most_bytes):
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def batches(records: Sequence[dict[str, Any]], rows: int, size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield groups of at most `rows` records, for requests of at most `size` bytes; a larger record is alone."""
    return batched(records, rows, lambda record: _bytes(record) + 1, size - 1_000)


def to_row(record_id: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Convert a record to a table row without vector. Pinecone stores float64, so whole numbers become int again."""
    metadata = dict(metadata or {})
    ours = {key: metadata.pop(key, None) for key in OWN}
    if ours["places_json"]:
        places = [dict(zip((*COLUMNS, "metadata"), place, strict=True)) for place in json.loads(ours["places_json"])]
    else:
        original = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in metadata.items()}
        original |= json.loads(ours["metadata_json"] or "{}")
        places = [{**{name: ours[name] for name in COLUMNS}, "metadata": original}]
    for place in places:
        place["metadata"] = json.dumps(place["metadata"], ensure_ascii=False)
    texts = {name: ours[name] for name in ("text", "digest", "parent_id") if name != "parent_id" or ours[name]}
    return {"id": record_id, **places[0], "places": places, **texts}


def to_filter(where: Mapping[str, Any]) -> dict[str, Any]:
    """Convert conditions to a Pinecone filter. It may match too many records: check the results with `keeps`.

    With several places, different places may meet different conditions.
    """
    parts = []
    for key, value in where.items():
        bounds = isinstance(value, Mapping)
        values = list(value.values()) if bounds else value if isinstance(value, list) else [value]
        if key not in COLUMNS and not all(_fits(key, each) for each in values):
            continue  # such values are in metadata_json
        if bounds:
            conditions = [{key: {f"${bound}": limit for bound, limit in value.items()}}]
        else:
            conditions = [{key: {"$eq": each}} for each in values if isinstance(each, bool)]
            for kind in (str, int | float):  # a list of Pinecone's holds one type
                if alike := [each for each in values if isinstance(each, kind) and not isinstance(each, bool)]:
                    conditions.append({key: {"$in": alike}})
        parts.append({"$or": conditions if key in COLUMNS else [*conditions, {"mixed_keys": {"$eq": key}}]})
    return {"$and": parts} if parts else {}
