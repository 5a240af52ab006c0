"""Splits long texts into chunks: windows of tokens, each with its own row and vector.

    documents = split_into_chunks(documents, prompts, tokenizer)     # adds `tokens`, a list of windows, and `spans`
    rows = expand_chunks(documents)                                  # one row per window, once `vectors` is set

The chunks of a text have the ids `<id>#00000`, `<id>#00001`, …, and `parent_id`, `part` and `parts` in their metadata.
A text that fits in one window stays unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.core.tokenizer_files import bounded, encoding
from pipeline.index.table import parse_metadata

CHUNK_KEYS = ("parent_id", "part", "parts")
SPAN = pa.list_(pa.int32(), 2)


def split_into_chunks(documents: pa.Table, prompts: Sequence[str], tokenizer: Tokenizer) -> pa.Table:
    """Add `tokens`, a list of windows per document, and `spans`, the begin and end of each window in the text."""
    texts = [prompt + text for prompt, text in zip(prompts, documents["text"].to_pylist(), strict=True)]
    tokens: list[list[list[int]]] = []
    spans: list[list[tuple[int, int]]] = []
    with encoding(tokenizer):
        encodings = tokenizer.encode_batch(bounded(tokenizer, texts))
    for prompt, encoded in zip(prompts, encodings, strict=True):
        windows = [encoded, *encoded.overflowing]
        tokens.append([window.ids for window in windows])
        spans.append([_span(window.offsets, len(prompt)) for window in windows])
    return documents.append_column("tokens", pa.array(tokens, pa.list_(pa.list_(pa.int32())))).append_column(
        "spans", pa.array(spans, pa.list_(SPAN))
    )


def _span(offsets: list[tuple[int, int]], prompt_chars: int) -> tuple[int, int]:
    """Where a window begins and ends in its text, without the prompt and special tokens."""
    tokens = [
        (max(begin, prompt_chars) - prompt_chars, end - prompt_chars)
        for begin, end in offsets
        if end > max(begin, prompt_chars)
    ]
    return (min(begin for begin, _ in tokens), max(end for _, end in tokens)) if tokens else (0, 0)


def expand_chunks(documents: pa.Table) -> pa.Table:
    """One row per entry of `vectors`: the window's part of the text, and `parent_id`."""
    vectors, spans = documents["vectors"].combine_chunks(), documents["spans"].to_pylist()
    counts = pc.list_value_length(vectors).to_numpy()
    rows = documents.drop_columns(["vectors", "spans", "text"])
    rows = rows.take(pa.array(np.repeat(np.arange(len(documents)), counts)))
    ids, metadata = (rows[name].to_pylist() for name in ("id", "metadata"))
    columns: dict[str, Any] = {name: rows[name] for name in rows.column_names} | {"parent_id": rows["id"]}
    texts: list[str] = []
    for text, windows in zip(documents["text"].to_pylist(), spans, strict=True):
        for part, (begin, end) in enumerate(windows):
            row = len(texts)
            texts.append(text[begin:end] if len(windows) > 1 else text)
            if len(windows) > 1:
                metadata[row] = _with_part(metadata[row], {"parent_id": ids[row], "part": part, "parts": len(windows)})
                ids[row] = f"{ids[row]}#{part:05d}"
    columns |= {"id": pa.array(ids), "text": pa.array(texts), "metadata": pa.array(metadata)}
    return pa.table({**columns, "vector": pc.list_flatten(vectors)})


def _with_part(metadata: str | None, part: dict[str, Any]) -> str:
    return json.dumps({**json.loads(metadata or "{}"), **part}, ensure_ascii=False)


def chunk_metadata(metadata: pa.ChunkedArray, chunks: pa.ChunkedArray) -> pa.Array:
    """New metadata of the documents, with the CHUNK_KEYS of the chunks' old metadata."""
    parts = ({name: old[name] for name in CHUNK_KEYS if name in old} for old in map(parse_metadata, chunks.to_pylist()))
    return pa.array(
        [
            _with_part(new, part) if "parts" in part else new
            for new, part in zip(metadata.to_pylist(), parts, strict=True)
        ],
        pa.string(),
    )


def chunk_count(row_id: str, metadata: str | None) -> int:
    """Number of rows of the row's document."""
    return int(parse_metadata(metadata).get("parts", 1)) if "#" in row_id else 1
