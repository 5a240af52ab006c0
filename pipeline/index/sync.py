"""How a range of the vector table differs from the documents: what is to be embedded, rewritten and deleted.

    sync.difference(3)           # counts, and the row ids to delete
    for batch in sync.due(3):    # documents that have no row yet, tokenized
    sync.rewritten(3)            # rows in place of those whose places or metadata changed

All of it is an anti-join of documents and rows by id, range by range, in one process and without Ray, which only
spreads it (index/embed.py). Tasks read the version of the table that the job began with, so a task that is repeated
after its node died finds the same. Memory: the ids of a range, and a batch of texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.index.chunks import as_chunks, chunk_metadata, expanded, parts_of
from pipeline.index.documents import COLUMNS, PLACE_COLUMNS, Documents, first_places, place_digests
from pipeline.index.encoder import EncoderRecipe, tokenize
from pipeline.index.table import DIGEST_CHARS, VectorTable, content_digests
from pipeline.index.vectors import as_column, as_matrix, one_array

if TYPE_CHECKING:
    from pipeline.index.encoder import TextEncoder  # torch, which what only reads can do without

COUNTS = ("new", "changed", "metadata", "untouched", "deleted")
"""Documents by what has to be done: `changed` have another text under the same source_id, `metadata` other places or
metadata with the same text."""


@dataclass(frozen=True)
class Difference:
    """Counts of documents; `_rowid` of rows to delete; hashes of (source, source_id) of new and of vanished texts."""

    counts: Counter[str] = field(default_factory=Counter)
    obsolete: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    new: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    vanished: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def total(cls, found: Sequence[Difference]) -> Difference:
        """That of all ranges together."""
        found = [cls(), *found]
        counts = sum((each.counts for each in found), Counter[str]())
        obsolete, new, vanished = zip(*((each.obsolete, each.new, each.vanished) for each in found), strict=True)
        return cls(counts, np.concatenate(obsolete), np.concatenate(new), np.concatenate(vanished))

    @property
    def summary(self) -> Counter[str]:
        """The counts by COUNTS, and `wrong`: rows that are not what they should be."""
        changed = len(np.intersect1d(self.new, self.vanished))
        counts = Counter(self.counts)
        counts.update(new=-changed, changed=changed, deleted=len(self.vanished) - changed)
        return counts


@dataclass(frozen=True)
class Sync:
    """Documents, and the version of a table that they are compared with."""

    documents: Documents
    table: VectorTable
    recipe: EncoderRecipe
    prompt: str
    """The model's own, for sources without one of theirs."""
    version: int
    """0 where the table has no rows yet."""
    check: bool = False
    """Whether to trust nothing: texts, metadata and vectors are hashed again and compared with id and digest."""

    @property
    def is_new(self) -> bool:
        return self.version == 0

    def is_small(self, most: int) -> bool:
        return sum(self.documents.rows) <= most

    def difference(self, index: int) -> Difference:
        rows = self.documents.rows[index]
        if self.is_new:
            return Difference(Counter(new=rows))
        there, wrong = self._there(index)
        documents = self.documents.table(index, ["id", "source", "source_id", "digest"])
        known, changed = _compare(documents, there)
        vanished = there.filter(pc.invert(pc.is_in(there["key"], one_array(documents["id"]))))
        rewritten = there.filter(pc.is_in(there["key"], one_array(documents["id"].filter(pa.array(changed)))))
        once = vanished["_rowid"].filter(_first_of_each(vanished["key"])).to_numpy()
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
            _source_hashes(self.table.take(once, ["source", "source_id"], self.version)),
        )

    def due(self, index: int) -> Iterator[pa.Table]:
        """Documents that have no row, with `tokens`."""
        there = None if self.is_new else self._there(index)[0]
        use_tokens = self.documents.use_tokens
        for batch in self.documents.read(index, [*COLUMNS, "tokens"] if use_tokens else COLUMNS):
            if there is not None:
                batch = batch.filter(pa.array(~_compare(batch, there)[0]))
            if len(batch):
                yield batch if use_tokens else self.tokenized(batch)

    def tokenized(self, documents: pa.Table) -> pa.Table:
        """Documents with the `tokens` that the encoder takes, and the `spans` of chunks."""
        leads = [self.documents.prompts.get(source, self.prompt) for source in documents["source"].to_pylist()]
        if self.table.chunks:
            return as_chunks(documents, leads, self.recipe.tokenizer())
        texts = documents["text"].to_pylist()
        if any(leads):
            texts = [lead + text for lead, text in zip(leads, texts, strict=True)]
        return documents.append_column("tokens", tokenize(self.recipe.tokenizer(), texts))

    def rewritten(self, index: int) -> pa.Table:
        """Whole rows in place of those whose document has other places; the vectors are theirs."""
        there, _ = self._there(index)
        documents = self.documents.table(index, ["id", *PLACE_COLUMNS, "places", "digest"])
        documents = documents.filter(pa.array(_compare(documents, there)[1]))
        old = there["_rowid"].filter(pc.is_in(there["key"], one_array(documents["id"]))).to_numpy()
        rows = self.table.take(old, self.table.schema.names, self.version)
        key = pc.coalesce(rows["parent_id"], rows["id"]) if self.table.chunks else rows["id"]
        of = documents.take(pc.index_in(key, one_array(documents["id"])))
        new = {name: of[name] for name in ("source", "source_id", "places")}
        new["metadata"] = chunk_metadata(of["metadata"], rows["metadata"]) if self.table.chunks else of["metadata"]
        contents = pc.utf8_slice_codeunits(rows["digest"], DIGEST_CHARS)
        new["digest"] = pc.binary_join_element_wise(of["digest"], contents, "")
        return self.table.typed(pa.table({name: new.get(name, rows[name]) for name in rows.column_names}))

    def _there(self, index: int) -> tuple[pa.Table, np.ndarray]:
        """Rows of a range that pass all checks, with `key`, the id of their document; and `_rowid` of the others."""
        columns = ["id", "digest", "_rowid"]
        columns += ["parent_id"] if self.table.chunks else []
        columns += [*PLACE_COLUMNS, "text", "places", "vector"] if self.check else []
        rows = self.table.read(columns, self.documents.bounds(index), self.version).combine_chunks()
        key = pc.coalesce(rows["parent_id"], rows["id"]) if self.table.chunks else rows["id"]
        rows = rows.append_column("key", key)
        right = _first_of_each(rows["id"]).to_numpy(zero_copy_only=False).copy()
        if self.check and len(rows):
            right &= self._is_right(rows)
            if self.table.chunks:  # of a text with a chunk that is wrong or missing, all are made again
                keys = key.to_pylist()
                found = Counter(one for one, is_right in zip(keys, right.tolist(), strict=True) if is_right)
                parts = map(parts_of, rows["id"].to_pylist(), rows["metadata"].to_pylist())
                right &= np.array([found[one] == count for one, count in zip(keys, parts, strict=True)], bool)
        return rows.filter(pa.array(right)), rows["_rowid"].to_numpy()[~right]

    def _is_right(self, rows: pa.Table) -> np.ndarray:
        """Whether each row is what its digest was made of."""
        places = one_array(rows["places"])
        contents = content_digests(rows["text"], as_matrix(rows["vector"]))
        digests = pc.binary_join_element_wise(place_digests(places), contents, "")
        right, first = pc.equal(pc.fill_null(one_array(rows["digest"]), ""), digests), first_places(places)
        right = pc.and_(right, first.is_valid())
        for name in ["source", "source_id"] if self.table.chunks else PLACE_COLUMNS:
            own, expected = (pc.fill_null(each, "") for each in (rows[name], pc.struct_field(first, name)))
            right = pc.and_(right, pc.equal(one_array(own), expected))
        return right.to_numpy(zero_copy_only=False)


def _compare(documents: pa.Table, there: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Whether each document has a row, and whether that has other places."""
    at = pc.index_in(one_array(documents["id"]), one_array(there["key"]))
    digests = pc.utf8_slice_codeunits(there["digest"], 0, DIGEST_CHARS).take(at)
    known = at.is_valid().to_numpy(zero_copy_only=False)
    return known, known & pc.fill_null(pc.not_equal(digests, documents["digest"]), True).to_numpy()


def _first_of_each(values: pa.ChunkedArray) -> pa.Array:
    """Where a value stands for the first time."""
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


def with_vectors(documents: pa.Table, encoder: TextEncoder) -> pa.Table:
    """Documents with a `vector` in place of their `tokens`, or, where they have chunks, with `vectors`."""
    tokens, rest = one_array(documents["tokens"]), documents.drop_columns(["tokens"])
    if "spans" not in rest.column_names:
        return rest.append_column("vector", as_column(encoder.encode_tokens(tokens)))
    vectors = as_column(encoder.encode_tokens(tokens.flatten()))
    offsets = pc.subtract(tokens.offsets, tokens.offsets[0])
    return rest.append_column("vectors", pa.ListArray.from_arrays(offsets, vectors))


def encoded_rows(documents: pa.Table, encoder: TextEncoder) -> pa.Table:
    """Rows of id, text and `vector` of documents with `tokens`: several of one that has chunks."""
    rows = with_vectors(documents, encoder)
    return expanded(rows) if "vectors" in rows.column_names else rows


def count_tokens(tokens: pa.ChunkedArray) -> int:
    """Token ids in lists, or in lists of lists."""
    flat = one_array(tokens).flatten()
    return len(flat.flatten() if pa.types.is_list(flat.type) else flat)
