"""Long texts as chunks: a window of tokens each, with a row and a vector of its own.

    documents = as_chunks(documents, leads, tokenizer)          # adds tokens, a list of windows, and spans
    rows = expanded(documents)                                  # a row a window, once `vectors` has theirs

The chunks of a text have the ids `<id>#00000`, `<id>#00001`, …, and `parent_id`, `part` and `parts` in their metadata.
A text of one window stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

OWN = ("parent_id", "part", "parts")
SPAN = pa.list_(pa.int32(), 2)


def as_chunks(documents: pa.Table, leads: Sequence[str], tokenizer: Tokenizer) -> pa.Table:
    """Documents with `tokens`, a list of windows each, and `spans`: where in the text each begins and ends."""
    texts = [lead + text for lead, text in zip(leads, documents["text"].to_pylist(), strict=True)]
    tokens: list[list[list[int]]] = []
    spans: list[list[tuple[int, int]]] = []
    for lead, encoding in zip(leads, tokenizer.encode_batch(texts), strict=True):
        windows = [encoding, *encoding.overflowing]
        tokens.append([window.ids for window in windows])
        spans.append([_span(window.offsets, len(lead)) for window in windows])
    return documents.append_column("tokens", pa.array(tokens, pa.list_(pa.list_(pa.int32())))).append_column(
        "spans", pa.array(spans, pa.list_(SPAN))
    )


def _span(offsets: list[tuple[int, int]], lead: int) -> tuple[int, int]:
    """Where the words of a window begin and end in its text; special tokens have no place."""
    real = [(max(begin, lead) - lead, end - lead) for begin, end in offsets if end > max(begin, lead)]
    return (min(begin for begin, _ in real), max(end for _, end in real)) if real else (0, 0)


def expanded(documents: pa.Table) -> pa.Table:
    """A row for each of a document's `vectors`: the words of its window as text, and `parent_id`."""
    vectors, spans = documents["vectors"].combine_chunks(), documents["spans"].to_pylist()
    counts = pc.list_value_length(vectors).to_numpy()
    rest = documents.drop_columns(["vectors", "spans", "text"])
    rows = rest.take(pa.array(np.repeat(np.arange(len(documents)), counts)))
    ids, metadata = (rows[name].to_pylist() for name in ("id", "metadata"))
    columns: dict[str, Any] = {name: rows[name] for name in rows.column_names} | {"parent_id": rows["id"]}
    texts: list[str] = []
    for text, of_text in zip(documents["text"].to_pylist(), spans, strict=True):
        for part, (begin, end) in enumerate(of_text):
            at = len(texts)
            texts.append(text[begin:end] if len(of_text) > 1 else text)
            if len(of_text) > 1:
                metadata[at] = _with_part(metadata[at], {"parent_id": ids[at], "part": part, "parts": len(of_text)})
                ids[at] = f"{ids[at]}#{part:05d}"
    columns |= {"id": pa.array(ids), "text": pa.array(texts), "metadata": pa.array(metadata)}
    flat = pc.list_flatten(vectors)
    return pa.table({**columns, "vector": flat})


def _with_part(metadata: str | None, part: dict[str, Any]) -> str:
    return json.dumps({**json.loads(metadata or "{}"), **part}, ensure_ascii=False)


def chunk_metadata(metadata: pa.ChunkedArray, chunks: pa.ChunkedArray) -> pa.Array:
    """The metadata of documents with which part of it each chunk is, as its row had it."""
    parts = ({name: found[name] for name in OWN if name in found} for found in map(_loaded, chunks.to_pylist()))
    return pa.array(
        [
            _with_part(new, part) if "parts" in part else new
            for new, part in zip(metadata.to_pylist(), parts, strict=True)
        ],
        pa.string(),
    )


def parts_of(row_id: str, metadata: str | None) -> int:
    """How many rows the document of a row has."""
    return int(_loaded(metadata).get("parts", 1)) if "#" in row_id else 1


def _loaded(metadata: str | None) -> dict[str, Any]:
    try:
        found = json.loads(metadata or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
