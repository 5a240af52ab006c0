"""Compares a range of the vector table with the documents: what to embed, rewrite and delete.

    sync.difference(3)           # counts, and the row ids to delete
    for batch in sync.due(3):    # documents without a row, tokenized
    sync.rewritten(3)            # new versions of rows whose places or metadata changed

Each is an anti-join of documents and rows by id, for one range, without Ray; index/embed.py distributes the ranges.
Tasks read the table's version at the start of the job, so a repeated task gets the same result. Memory: the ids of a
range, and a batch of texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.index.chunks import chunk_count, chunk_metadata, expand_chunks, split_into_chunks
from pipeline.index.documents import COLUMNS, PLACE_COLUMNS, Documents, first_places, place_digests
from pipeline.index.encoder import EncoderRecipe, tokenize
from pipeline.index.table import DIGEST_CHARS, VectorTable, content_digests
from pipeline.index.vectors import as_column, as_matrix, one_array

if TYPE_CHECKING:
    from pipeline.index.encoder import TextEncoder

COUNTS = ("new", "changed", "metadata", "untouched", "deleted")
"""Counts of documents: `changed` have a new text under the same source_id; `metadata` have new places or metadata with
the same text."""


@dataclass(frozen=True)
class Difference:
    """Counts of documents; `_rowid` of rows to delete; hashes of (source, source_id) of new and vanished texts."""

    counts: Counter[str] = field(default_factory=Counter)
    obsolete: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    new: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    vanished: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def total(cls, found: Sequence[Difference]) -> Difference:
        """The sum over ranges."""
        found = [cls(), *found]
        counts = sum((each.counts for each in found), Counter[str]())
        obsolete, new, vanished = zip(*((each.obsolete, each.new, each.vanished) for each in found), strict=True)
        return cls(counts, np.concatenate(obsolete), np.concatenate(new), np.concatenate(vanished))

    @property
    def summary(self) -> Counter[str]:
        """The COUNTS, and `wrong`: the number of damaged rows."""
        changed = len(np.intersect1d(self.new, self.vanished))
        counts = Counter(self.counts)
        counts.update(new=-changed, changed=changed, deleted=len(self.vanished) - changed)
        return counts


@dataclass(frozen=True)
class Sync:
    """Documents, and the version of a table to compare them with."""

    documents: Documents
    table: VectorTable
    recipe: EncoderRecipe
    prompt: str
    """The model's prompt, for sources without their own."""
    version: int
    """0 if the table has no rows yet."""
    check: bool = False
    """Whether to hash texts, metadata and vectors again and compare them with the digests."""

    @property
    def is_new(self) -> bool:
        return self.version == 0

    def is_small(self, most: int) -> bool:
        return sum(self.documents.rows) <= most

    def difference(self, index: int) -> Difference:
        rows = self.documents.rows[index]
        if self.is_new:
            return Difference(Counter(new=rows))
        valid, wrong = self._valid_rows(index)
        documents = self.documents.table(index, ["id", "source", "source_id", "digest"])
        known, changed = _compare(documents, valid)
        vanished = valid.filter(pc.invert(pc.is_in(valid["key"], one_array(documents["id"]))))
        rewritten = valid.filter(pc.is_in(valid["key"], one_array(documents["id"].filter(pa.array(changed)))))
        distinct = vanished["_rowid"].filter(_is_first(vanished["key"])).to_numpy()
        counts = Counter(
            new=int((~known).sum()),
            metadata=int(changed.sum()),
            untouched=int((known & ~changed).sum()),
            wrong=len(wrong),
        )
        return Difference(
            counts,
            np.concatenate([wrong, vanished["_rowid"].to_numpy(), rewritten["_rowid"].to_numpy()]),
            _source_hashes(documents.filter(pa.array(~known))),
            _source_hashes(self.table.take(distinct, ["source", "source_id"], self.version)),
        )

    def due(self, index: int) -> Iterator[pa.Table]:
        """Yield the documents without a valid row, with `tokens`."""
        valid = None if self.is_new else self._valid_rows(index)[0]
        use_tokens = self.documents.use_tokens
        for batch in self.documents.read(index, [*COLUMNS, "tokens"] if use_tokens else COLUMNS):
            if valid is not None:
                batch = batch.filter(pa.array(~_compare(batch, valid)[0]))
            if len(batch):
                yield batch if use_tokens else self.tokenized(batch)

    def tokenized(self, documents: pa.Table) -> pa.Table:
        """Add the encoder's `tokens`, and the `spans` of chunks."""
        prompts = [self.documents.prompts.get(source, self.prompt) for source in documents["source"].to_pylist()]
        if self.table.chunks:
            return split_into_chunks(documents, prompts, self.recipe.tokenizer())
        texts = documents["text"].to_pylist()
        if any(prompts):
            texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        return documents.append_column("tokens", tokenize(self.recipe.tokenizer(), texts))

    def rewritten(self, index: int) -> pa.Table:
        """New versions of the rows whose document has new places or metadata, with the old vectors."""
        valid, _ = self._valid_rows(index)
        documents = self.documents.table(index, ["id", *PLACE_COLUMNS, "places", "digest"])
        documents = documents.filter(pa.array(_compare(documents, valid)[1]))
        old = valid["_rowid"].filter(pc.is_in(valid["key"], one_array(documents["id"]))).to_numpy()
        rows = self.table.take(old, self.table.schema.names, self.version)
        key = pc.coalesce(rows["parent_id"], rows["id"]) if self.table.chunks else rows["id"]
        parents = documents.take(pc.index_in(key, one_array(documents["id"])))
        new = {name: parents[name] for name in ("source", "source_id", "places")}
        metadata = parents["metadata"]
        new["metadata"] = chunk_metadata(metadata, rows["metadata"]) if self.table.chunks else metadata
        contents = pc.utf8_slice_codeunits(rows["digest"], DIGEST_CHARS)
        new["digest"] = pc.binary_join_element_wise(parents["digest"], contents, "")
        return self.table.typed(pa.table({name: new.get(name, rows[name]) for name in rows.column_names}))

    def _valid_rows(self, index: int) -> tuple[pa.Table, np.ndarray]:
        """Valid rows of a range, with `key`, the id of their document; and `_rowid` of the others."""
        columns = ["id", "digest", "_rowid"]
        columns += ["parent_id"] if self.table.chunks else []
        columns += [*PLACE_COLUMNS, "text", "places", "vector"] if self.check else []
        rows = self.table.read(columns, self.documents.bounds(index), self.version).combine_chunks()
        key = pc.coalesce(rows["parent_id"], rows["id"]) if self.table.chunks else rows["id"]
        rows = rows.append_column("key", key)
        valid = _is_first(rows["id"]).to_numpy(zero_copy_only=False).copy()
        if self.check and len(rows):
            valid &= self._matches_digest(rows)
            if self.table.chunks:  # one invalid or missing chunk makes all chunks of its text invalid
                keys = key.to_pylist()
                counts = Counter(each for each, is_valid in zip(keys, valid.tolist(), strict=True) if is_valid)
                expected = map(chunk_count, rows["id"].to_pylist(), rows["metadata"].to_pylist())
                valid &= np.array([counts[each] == count for each, count in zip(keys, expected, strict=True)], bool)
        return rows.filter(pa.array(valid)), rows["_rowid"].to_numpy()[~valid]

    def _matches_digest(self, rows: pa.Table) -> np.ndarray:
        """Whether each row matches its digest and its first place."""
        places = one_array(rows["places"])
        contents = content_digests(rows["text"], as_matrix(rows["vector"]))
        digests = pc.binary_join_element_wise(place_digests(places), contents, "")
        valid, first = pc.equal(pc.fill_null(one_array(rows["digest"]), ""), digests), first_places(places)
        valid = pc.and_(valid, first.is_valid())
        for name in ["source", "source_id"] if self.table.chunks else PLACE_COLUMNS:
            actual, expected = (pc.fill_null(each, "") for each in (rows[name], pc.struct_field(first, name)))
            valid = pc.and_(valid, pc.equal(one_array(actual), expected))
        return valid.to_numpy(zero_copy_only=False)


def _compare(documents: pa.Table, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Whether each document has a row, and whether that row has other places."""
    positions = pc.index_in(one_array(documents["id"]), one_array(rows["key"]))
    digests = pc.utf8_slice_codeunits(rows["digest"], 0, DIGEST_CHARS).take(positions)
    known = positions.is_valid().to_numpy(zero_copy_only=False)
    return known, known & pc.fill_null(pc.not_equal(digests, documents["digest"]), True).to_numpy()


def _is_first(values: pa.ChunkedArray) -> pa.Array:
    """Mask of the first occurrence of each value."""
    codes = one_array(values.dictionary_encode()).indices.to_numpy()
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    return pa.array(first)


def _source_hashes(rows: pa.Table) -> np.ndarray:
    """64-bit hashes of (source, source_id)."""
    pairs = zip(rows["source"].to_pylist(), rows["source_id"].to_pylist(), strict=True)
    return np.array(
        [xxhash.xxh3_64_intdigest(f"{source}\0{source_id}".encode()) for source, source_id in pairs], np.uint64
    )


def with_vectors(
    documents: pa.Table, encoder: TextEncoder, on_share: Callable[[float], object] = lambda share: None
) -> pa.Table:
    """Replace `tokens` by `vector`, or by `vectors` if documents have `spans` of chunks."""
    tokens, rest = one_array(documents["tokens"]), documents.drop_columns(["tokens"])
    if "spans" not in rest.column_names:
        return rest.append_column("vector", as_column(encoder.encode_tokens(tokens, on_share)))
    vectors = as_column(encoder.encode_tokens(tokens.flatten(), on_share))
    offsets = pc.subtract(tokens.offsets, tokens.offsets[0])
    return rest.append_column("vectors", pa.ListArray.from_arrays(offsets, vectors))


def encoded_rows(documents: pa.Table, encoder: TextEncoder) -> pa.Table:
    """Encode documents with `tokens` to rows with `vector`: one per document, or per chunk."""
    rows = with_vectors(documents, encoder)
    return expand_chunks(rows) if "vectors" in rows.column_names else rows


def count_tokens(tokens: pa.ChunkedArray) -> int:
    """Number of token ids in lists, or in lists of lists."""
    flat = one_array(tokens).flatten()
    return len(flat.flatten() if pa.types.is_list(flat.type) else flat)
