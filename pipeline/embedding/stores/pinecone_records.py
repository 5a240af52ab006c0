"""Rows as Pinecone's records and back.

    {"id": "9f0c…", "values": […], "metadata": {"source": "debian", "source_id": "…", "text": "…", "section": "net"}}

The record's own metadata lies flat beside ours, so that it can be filtered by. What Pinecone does not take as it is
(nulls, objects, lists of other things than texts, names that are taken) goes into `metadata_json`, and comes back.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pipeline.embedding.columns import as_matrix
from pipeline.embedding.stores.rows import grouped
from pipeline.embedding.stores.store import TEXTS, Refused

OWN = ("source", "source_id", "text", "metadata_json")
ID_BYTES = 512
METADATA_BYTES = 40_960
EXACT = 2**53  # beyond it a number would not come back as it was


def bad_id(i: str) -> str | None:
    """Why Pinecone takes no such id."""
    if not i or not i.isascii() or "\0" in i:
        return "its id is empty or not ASCII, which Pinecone does not take"
    return f"its id has {len(i):,} bytes; Pinecone takes {ID_BYTES}" if len(i) > ID_BYTES else None


def to_records(
    rows: pa.Table, keys: Sequence[str] | None, text_bytes: int
) -> tuple[list[dict[str, Any]], list[Refused], int]:
    """Records of rows that have a vector each, the rows that cannot be one, and how many texts were cut."""
    # Through JSON each number gets the few digits that a float32 has, not the many of a float64: half the bytes.
    values = orjson.loads(orjson.dumps(as_matrix(rows["vector"]), option=orjson.OPT_SERIALIZE_NUMPY))
    records, refused, cut = [], [], 0
    for row, vector in zip(rows.select(["id", *TEXTS]).to_pylist(), values, strict=True):
        try:
            if reason := bad_id(row["id"]):
                raise ValueError(reason)
            metadata = _metadata(row, keys, text_bytes)
        except ValueError as error:
            refused.append(Refused(row["id"], str(error), 0))
            continue
        cut += metadata.get("text") != row["text"]
        records.append({"id": row["id"], "values": vector, "metadata": metadata})
    return records, refused, cut


def _metadata(row: Mapping[str, Any], keys: Sequence[str] | None, text_bytes: int) -> dict[str, Any]:
    """Raises ValueError with the reason where it cannot be had."""
    try:
        theirs = orjson.loads(row["metadata"] or "{}")
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise ValueError("its metadata is no JSON object")
    theirs = {key: value for key, value in theirs.items() if keys is None or key in keys}
    flat = {key: value for key, value in theirs.items() if _fits(key, value)}
    ours = {key: row[key] for key in ("source", "source_id") if row[key] is not None}
    if len(flat) < len(theirs):
        ours["metadata_json"] = json.dumps({key: value for key, value in theirs.items() if key not in flat})
    if row["text"] is not None:
        others = _bytes({**flat, **ours, "text": ""})
        ours["text"] = _fitting(_cut(row["text"], text_bytes), METADATA_BYTES - others)
    size = _bytes({**flat, **ours})
    if size > METADATA_BYTES:
        raise ValueError(f"its metadata takes {size:,} bytes without the text; Pinecone takes {METADATA_BYTES:,}")
    return {**flat, **ours}


def _fits(key: str, value: Any) -> bool:
    if key in OWN or key.startswith("$"):
        return False
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= EXACT)


def _cut(text: str, size: int) -> str:
    """The text's first `size` bytes, whole characters."""
    return text.encode()[:size].decode(errors="ignore")


def _fitting(text: str, room: int) -> str:
    """As much of the text as takes `room` bytes of JSON, where some characters take more than in the text."""
    if _bytes(text) - 2 <= room:
        return text
    return text[: max(0, bisect_right(range(len(text)), room, key=lambda end: _bytes(text[:end]) - 2) - 1)]


def _bytes(value: Any) -> int:
    return len(orjson.dumps(value))


def batches(records: Sequence[dict[str, Any]], rows: int, size: int) -> Iterator[list[dict[str, Any]]]:
    """Records in groups of at most so many, in requests of at most `size` bytes; one that has more is alone."""
    return grouped(records, lambda record: _bytes(record) + 1, rows, size - 1_000)


def to_row(record_id: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record's row, without vector. Pinecone's numbers are all float64: whole ones become integers again."""
    metadata = dict(metadata or {})
    ours = {key: metadata.pop(key, None) for key in OWN}
    theirs = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in metadata.items()}
    theirs |= json.loads(ours.pop("metadata_json") or "{}")
    return {"id": record_id, **ours, "metadata": json.dumps(theirs, ensure_ascii=False)}


def to_table(found: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """What a fetch found, {id: vector}, as rows."""
    rows = [{**to_row(i, one.metadata), "vector": np.asarray(one.values, np.float32)} for i, one in found.items()]
    return pa.Table.from_pylist(rows, schema)
