"""Records as a store's rows, up to the model: cut into windows where they are long, known vectors filled in, tokenized.

rows = Reading(lead, prompts, "chunks", tokenizer).rows(records)
rows["tokens"]                 # null where nothing is to be encoded
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from pipeline.embedding.cache import VectorCache, cache_key
from pipeline.embedding.columns import TOKENS, as_column
from pipeline.embedding.recipe import tokenize

EMBED, UPDATE = "embed", "update"


@dataclass(frozen=True)
class Reading:
    """How texts are read: what leads them, and what becomes of long ones."""

    lead: str
    """The model's own prompt, for sources without one of their own."""
    prompts: dict[str, str]
    """By source."""
    chunks: bool
    """Each window of a long text is a row."""

    def lead_of(self, source: str) -> str:
        return self.prompts.get(source, self.lead)

    def rows(self, records: pa.Table, tokenizer: Tokenizer, cache: VectorCache | None) -> pa.Table:
        """Records, with action, as rows to write: parts, key, tokens and vector beside.

        `tokens` is null where `vector` is known, or not asked for.
        """
        leads = [self.lead_of(source) for source in records["source"].to_pylist()]
        texts = records["text"].to_pylist()
        if self.chunks:
            rows, found, keys = _as_chunks(records, tokenizer, leads)
        else:
            keys = [cache_key(lead + text) for lead, text in zip(leads, texts, strict=True)]
            rows = records.append_column("parts", pa.array(np.ones(len(records), np.int32)))
        embed = np.array([action == EMBED for action in rows["action"].to_pylist()], dtype=bool)
        vectors, known = _known(keys, embed, cache)
        wanted = embed & ~known
        if not self.chunks:
            found = tokenize(tokenizer, [leads[i] + texts[i] for i in np.flatnonzero(wanted)])
        place = np.arange(len(rows)) if self.chunks else wanted.cumsum() - 1
        tokens = found.take(pa.array(place, mask=~wanted))
        return (
            rows.append_column("key", pa.array(keys, pa.string()))
            .append_column("tokens", tokens)
            .append_column("vector", vectors)
        )


def _known(keys: list[str], embed: np.ndarray, cache: VectorCache | None) -> tuple[pa.Array, np.ndarray]:
    """Vectors that the cache has, null where it has not, and whether each is there."""
    if cache is None:
        return pa.nulls(len(keys)), np.zeros(len(keys), bool)
    asked = np.flatnonzero(embed)
    found, there = cache.get([keys[i] for i in asked])
    vectors, known = np.zeros((len(keys), cache.width), np.float32), np.zeros(len(keys), bool)
    vectors[asked], known[asked] = found, there
    return as_column(vectors, ~known), known


def _as_chunks(records: pa.Table, tokenizer: Tokenizer, leads: list[str]) -> tuple[pa.Table, pa.Array, list[str]]:
    """A row a window: the record's columns, the window's words as text, `parent_id` and place in the metadata.

    Returns the rows, and the tokens and the cache's key of each.
    """
    rows: list[dict[str, Any]] = []
    tokens: list[list[int]] = []
    keys: list[str] = []
    whole = records.to_pylist()
    texts = [lead + record["text"] for lead, record in zip(leads, whole, strict=True)]
    for record, lead, text, encoding in zip(whole, leads, texts, tokenizer.encode_batch(texts), strict=True):
        windows = [encoding, *encoding.overflowing]
        for number, window in enumerate(windows):
            tokens.append(window.ids)
            if len(windows) == 1:
                keys.append(cache_key(text))
                rows.append({**record, "parts": 1})
                continue
            keys.append(cache_key(text, number))
            begin, end = _span(window.offsets)
            place = {"parent_id": record["id"], "part": number, "parts": len(windows)}
            rows.append(
                {
                    **record,
                    "id": f"{record['id']}#{number:05d}",
                    "text": text[max(begin, len(lead)) : end],
                    "metadata": json.dumps({**json.loads(record["metadata"] or "{}"), **place}, ensure_ascii=False),
                    "parts": len(windows),
                }
            )
    schema = records.schema.append(pa.field("parts", pa.int32()))
    return pa.Table.from_pylist(rows, schema=schema), pa.array(tokens, TOKENS), keys


def _span(offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """Where the words of a window begin and end in its text; special tokens have no place."""
    real = [(begin, end) for begin, end in offsets if end > begin]
    return (min(begin for begin, _ in real), max(end for _, end in real)) if real else (0, 0)
