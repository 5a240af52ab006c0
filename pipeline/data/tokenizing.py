"""Record files turned into token shards.

    tokenize_file(Path("records/00007.parquet"), Output(folder), recipe, tokenizer)
    # train/00007.parquet, validation/00007.parquet: id, source, anchor and positive as lists of token ids

A shard's rows are in the order of a hash of (id, seed); in train, of their source first, so that a row group holds rows
of one source alone. A text is cut after `max_length` tokens, special ones included, or, as windows, becomes several
rows of its `id` with their number in `window`. Cost: that of `tokenizers.encode_batch` and a tenth of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from tokenizers import Tokenizer

from pipeline.config import ConfigError
from pipeline.data.lengths import LengthCounts
from pipeline.data.manifest import SPLITS, sha256
from pipeline.data.vocabulary import unknown_token_id
from pipeline.runtime.artifact import Output, open_parquet
from pipeline.storage.path import StoragePath
from pipeline.text.augment import Augmentation
from pipeline.text.identity import is_validation

ROW_GROUP_ROWS = 1024  # of token ids, about half a megabyte: small enough to shuffle by, large enough to read fast
ENCODE_ROWS = 1024

Tokens = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How records become rows of tokens."""

    fields: list[str]
    max_length: int
    validation_fraction: float
    seed: int = 0
    window_overlap: int | None = None  # None: longer texts are cut
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)  # by source and field
    augmentation: Augmentation = field(default_factory=Augmentation)


class Cutter:
    """Cuts token ids to length and puts a tokenizer's special tokens round them. Raises ConfigError without room."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        bare, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
        before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = whole[:before], whole[before + len(bare) :] if bare else []
        self.room = recipe.max_length - len(self.prefix) - len(self.suffix)
        self.step = None if recipe.window_overlap is None else self.room - recipe.window_overlap
        self.unknown = unknown_token_id(tokenizer)
        if self.room < 1 or (self.step is not None and self.step < 1):
            raise ConfigError(
                f"tokenizer: found max_length {recipe.max_length} and window_overlap {recipe.window_overlap}, which "
                f"leave no room beside the {len(self.prefix) + len(self.suffix)} special tokens; allowed is a longer "
                "max_length or a smaller overlap"
            )

    def cut(self, lengths: Ints) -> tuple[Ints, Ints, Ints]:
        """The rows that texts of so many tokens become: each row's text, and the tokens from where to where."""
        if self.step is None:
            return np.arange(len(lengths)), np.zeros_like(lengths), np.minimum(lengths, self.room)
        windows = 1 - np.maximum(lengths - self.room, 0) // -self.step  # rounded up
        text = np.repeat(np.arange(len(lengths)), windows)
        start = _count_up(windows) * self.step
        return text, start, np.minimum(start + self.room, lengths[text])

    def frame(self, tokens: Tokens, begin: Ints, end: Ints) -> pa.Array:
        """Lists of `tokens[begin:end]` between the special tokens."""
        sizes = end - begin
        body = tokens[np.repeat(begin, sizes) + _count_up(sizes)]
        before, after = len(self.prefix), len(self.suffix)
        offsets = np.concatenate([[0], np.cumsum(sizes + before + after)])
        if before or after:
            framed = np.empty(offsets[-1], dtype=np.int32)
            special = np.zeros(offsets[-1], dtype=bool)
            for places, ids in (
                (offsets[:-1, None] + np.arange(before), self.prefix),
                (offsets[1:, None] - after + np.arange(after), self.suffix),
            ):
                framed[places], special[places] = ids, True
            framed[~special] = body
            body = framed
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(body, pa.int32()))


def _count_up(lengths: Ints) -> Ints:
    """0 1 2, 0 1 for lengths 3, 2."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def tokenize_file(records: StoragePath, output: Output, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write one record file's token shards, one a split. Returns their descriptions and the counts of lengths."""
    cutter = Cutter(tokenizer, recipe)
    counts = {name: LengthCounts() for name in recipe.fields}
    tables = [
        _encode(batch, recipe, tokenizer, cutter, counts)
        for batch in open_parquet(records).iter_batches(ENCODE_ROWS, columns=["id", "source", *recipe.fields])
    ]
    shards = []
    for split in SPLITS if tables else ():
        rows = pa.concat_tables(tables)
        rows = rows.filter(pa.array([split == of for of in rows["split"].to_pylist()])).drop_columns("split")
        if len(rows):
            shards.append(_write_split(rows, output, f"{split}/{records.name}", split, recipe))
    return {"shards": shards, "lengths": {name: count.to_json() for name, count in counts.items()}}


def _encode(
    batch: pa.RecordBatch, recipe: Recipe, tokenizer: Tokenizer, cutter: Cutter, counts: dict[str, LengthCounts]
) -> pa.Table:
    """Rows of token ids, with the split that each belongs to."""
    ids, sources = batch["id"].to_pylist(), batch["source"].to_pylist()
    held_out = [is_validation(one, recipe.validation_fraction) for one in ids]
    columns: dict[str, Any] = {}
    parents = np.arange(len(ids))
    windows: Ints | None = None
    for name in recipe.fields:
        texts = batch[name].to_pylist()
        if name == "negatives":
            columns[name] = _encode_lists(texts, sources, recipe, tokenizer, cutter, counts[name])
            continue
        if name == "anchor" and recipe.augmentation:
            pairs = zip(texts, ids, held_out, strict=True)
            texts = [text if out else recipe.augmentation.apply(text, one, recipe.seed) for text, one, out in pairs]
        columns[name], of, start = _encode_texts(texts, name, sources, recipe, tokenizer, cutter, counts[name])
        if cutter.step is not None:
            parents, windows = of, start // cutter.step
    leading: dict[str, Any] = {
        "id": batch["id"].take(pa.array(parents)),
        "source": batch["source"].take(pa.array(parents)),
        "split": pa.array([SPLITS[out] for out in held_out]).take(pa.array(parents)),
    }
    if windows is not None:
        leading["window"] = pa.array(windows, pa.int32())
    return pa.table(leading | columns)


def _encode_texts(
    texts: list[str],
    name: str,
    sources: list[str],
    recipe: Recipe,
    tokenizer: Tokenizer,
    cutter: Cutter,
    count: LengthCounts,
) -> tuple[pa.Array, Ints, Ints]:
    """Rows of token ids, and for each the text that it is of and the token that it begins with."""
    if recipe.prompts:
        prompts = [recipe.prompts.get(source, {}).get(name, "") for source in sources]
        texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    lists = pa.array([encoding.ids for encoding in encodings], pa.list_(pa.int32()))
    tokens, bounds = lists.values.to_numpy(), lists.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(bounds)
    text, start, stop = cutter.cut(lengths)
    rows = cutter.frame(tokens, bounds[text] + start, bounds[text] + stop)
    unknown = 0 if cutter.unknown is None else int(np.count_nonzero(tokens == cutter.unknown))
    count.add(lengths, np.diff(rows.offsets.to_numpy()), cutter.room, unknown)
    return rows, text, start


def _encode_lists(
    lists: list[list[str] | None],
    sources: list[str],
    recipe: Recipe,
    tokenizer: Tokenizer,
    cutter: Cutter,
    count: LengthCounts,
) -> pa.Array:
    """Negatives: a list of token lists a record."""
    flat = [text for texts in lists for text in texts or []]
    of = [source for source, texts in zip(sources, lists, strict=True) for _ in texts or []]
    rows, _, _ = _encode_texts(flat, "negatives", of, recipe, tokenizer, cutter, count)
    offsets = np.cumsum([0, *(len(texts or []) for texts in lists)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), rows)


def _write_split(table: pa.Table, output: Output, file_name: str, split: str, recipe: Recipe) -> dict[str, Any]:
    """Write rows in canonical order. Raises AssertionError for a row that is too long: the cutter would be broken."""
    for name in set(recipe.fields) - {"negatives"}:
        assert pa.compute.max(pa.compute.list_value_length(table[name])).as_py() <= recipe.max_length
    hashes = [xxhash.xxh3_64_intdigest(one.encode(), seed=recipe.seed) for one in table["id"].to_pylist()]
    keys = [(key, "ascending") for key in ("hash", "id", "window") if key == "hash" or key in table.column_names]
    by_source = [("source", "ascending")] if split == "train" else []
    table = table.append_column("hash", pa.array(hashes, pa.uint64())).sort_by(by_source + keys).drop_columns("hash")
    groups: list[int] = []
    of: list[str | None] = []
    with output.writing(file_name) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd", write_page_checksum=True) as writer:
            for source, rows in _runs(table, split):
                for start in range(0, len(rows), ROW_GROUP_ROWS):
                    writer.write_table(rows.slice(start, ROW_GROUP_ROWS).combine_chunks())
                    groups.append(min(ROW_GROUP_ROWS, len(rows) - start))
                    of.append(source)
        digest = sha256(temporary)
    return {
        "path": file_name,
        "split": split,
        "rows": len(table),
        "row_groups": groups,
        "row_group_sources": of,
        "sha256": digest,
    }


def _runs(table: pa.Table, split: str) -> Iterator[tuple[str | None, pa.Table]]:
    """The rows of each source, which stand together in train; validation is one run of all."""
    if split != "train":
        yield None, table
        return
    sources = table["source"].to_pylist()
    bounds = [0, *(i for i in range(1, len(sources)) if sources[i] != sources[i - 1]), len(sources)]
    for start, stop in itertools.pairwise(bounds):
        yield sources[start], table.slice(start, stop - start)
