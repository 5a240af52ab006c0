"""Tokenizes record files into token shards.

    tokenize_file(Path("records/00007.parquet"), Output(folder), recipe, tokenizer)
    # train/00007.parquet, validation/00007.parquet: id, source, and anchor and positive as lists of token ids

A shard's rows are ordered by a hash of (id, seed); train shards by source first, so a row group holds one source. A
text longer than `max_length` tokens, including special tokens, is truncated or split into windows: several rows of the
same `id`, numbered in `window`. Cost: 1.1 times that of `tokenizers.encode_batch`.

`lengths/00007.parquet` has each text's number of tokens before truncation, and how many are unknown. A later data set
copies the tokens of shared records from it and the shards (`Tokenized`).

Anchors of the training split can be augmented, in the same way on every run:

>>> augment("remove the duplicate rows of a table", Augment(word_dropout=0.5), "5f3a", seed=0)
'the duplicate rows a table'
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from tokenizers import Tokenizer

from pipeline.config import Augment, ConfigError
from pipeline.core.artifact import Output, open_parquet
from pipeline.core.path import StoragePath
from pipeline.core.tokenizer_files import bounded, encoding
from pipeline.data.manifest import SPLITS, LengthCounts, Shard, sha256
from pipeline.data.partitions import is_validation
from pipeline.data.tokenizer import unknown_token_id
from pipeline.data.words import dense_chars, word_spans

ROW_GROUP_ROWS = 1024  # about 0.5 MB of token ids: small enough to shuffle by, large enough to read fast
ENCODE_ROWS = 1024
MASK = "[MASK]"
MEAN_SPAN_WORDS = 3  # SpanBERT (Joshi et al. 2020), section 3.1, has 3.8 after clipping at 10 tokens

Tokens = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenRecipe:
    """How records become rows of tokens."""

    fields: list[str]
    max_length: int
    validation_fraction: float
    seed: int = 0
    window_overlap: int | None = None  # in tokens; None: truncate longer texts
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)  # by source and field
    augmentation: Augment = field(default_factory=Augment)  # for the training split's anchors


class Cutter:
    """Cuts texts to `max_length` and adds special tokens. Raises ConfigError if these leave no room."""

    def __init__(self, tokenizer: Tokenizer, recipe: TokenRecipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        with encoding(tokenizer):
            bare, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
        before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = whole[:before], whole[before + len(bare) :] if bare else []
        self.room = recipe.max_length - len(self.prefix) - len(self.suffix)
        self.step = None if recipe.window_overlap is None else self.room - recipe.window_overlap
        self.unknown = unknown_token_id(tokenizer)
        if self.room < 1 or (self.step is not None and self.step < 1):
            raise ConfigError(
                f"tokenizer: found max_length {recipe.max_length} and window_overlap {recipe.window_overlap}, which "
                f"leave no room for text with {len(self.prefix) + len(self.suffix)} special tokens; raise max_length, "
                "or lower window_overlap"
            )

    def cut(self, lengths: Ints) -> tuple[Ints, Ints, Ints]:
        """Rows for texts of these lengths, as three arrays: index of the text, first token, end token."""
        if self.step is None:
            return np.arange(len(lengths)), np.zeros_like(lengths), np.minimum(lengths, self.room)
        windows = 1 - np.maximum(lengths - self.room, 0) // -self.step  # rounded up
        text = np.repeat(np.arange(len(lengths)), windows)
        start = _count_up(windows) * self.step
        return text, start, np.minimum(start + self.room, lengths[text])

    def frame(self, tokens: Tokens, begin: Ints, end: Ints) -> pa.Array:
        """Lists of `tokens[begin:end]`, each framed by the special tokens."""
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


@dataclass(frozen=True)
class Tokenized:
    """Tokenized records."""

    rows: pa.Table
    """Rows of the token shards, with the `split` of each."""
    texts: pa.Table
    """One row per record: id, source, and for each text field its number of tokens before truncation (`anchor_tokens`)
    and of unknown tokens (`anchor_unknown`). Lists for negatives."""

    def select(self, ids: pa.ChunkedArray) -> Tokenized:
        """Only the records with these ids."""
        rows, texts = (table.filter(pc.is_in(table["id"], value_set=ids)) for table in (self.rows, self.texts))
        return Tokenized(rows, texts)

    def contains(self, records: pa.Table) -> pa.BooleanArray:
        """Which of these records are included, with the same source (the prompt depends on it)."""
        is_known = pc.is_in(records["id"], value_set=self.rows["id"])
        index = pc.index_in(records["id"], value_set=self.texts["id"])
        same_source = pc.equal(self.texts["source"].take(index), records["source"])
        return pc.and_(is_known, pc.fill_null(same_source, False)).combine_chunks()


def tokenize_file(
    records: StoragePath, output: Output, recipe: TokenRecipe, tokenizer: Tokenizer, earlier: Tokenized | None = None
) -> dict[str, Any]:
    """Write one token shard per split of a record file. Returns descriptions of the shards and counts of text lengths.

    Copies records from `earlier`, which has the same recipe and tokenizer; `tokenized` counts the others.
    """
    cutter, file = Cutter(tokenizer, recipe), open_parquet(records)
    parts, known = [], np.zeros(file.metadata.num_rows, bool)
    if earlier is not None:
        keys = file.read(columns=["id", "source"])
        known = earlier.contains(keys).to_numpy(zero_copy_only=False)
        parts.append(earlier.select(keys["id"].filter(known)))
    first = 0
    for batch in file.iter_batches(ENCODE_ROWS, columns=["id", "source", *recipe.fields]):
        new = batch.filter(pa.array(~known[first : first + len(batch)]))
        first += len(batch)
        if len(new):
            parts.append(_encode(new, cutter))
    report: dict[str, Any] = {"shards": [], "records": len(known), "tokenized": int(np.count_nonzero(~known))}
    if not parts:
        return report | {"lengths": {name: vars(LengthCounts()) for name in recipe.fields}}
    rows, texts = (
        pa.concat_tables(tables) for tables in zip(*((each.rows, each.texts) for each in parts), strict=True)
    )
    output.write_table(f"lengths/{records.name}", texts.sort_by("id"))
    for split in SPLITS:
        split_rows = rows.filter(pc.equal(rows["split"], split)).drop_columns("split")
        if len(split_rows):
            report["shards"].append(_write_split(split_rows, output, f"{split}/{records.name}", split, recipe))
    return report | {"lengths": {name: vars(_counted(name, rows, texts, cutter)) for name in recipe.fields}}


def _counted(name: str, rows: pa.Table, texts: pa.Table, cutter: Cutter) -> LengthCounts:
    stored, whole, unknown = rows[name], texts[f"{name}_tokens"], texts[f"{name}_unknown"]
    if name == "negatives":
        stored, whole, unknown = (pc.list_flatten(column) for column in (stored, whole, unknown))
    count = LengthCounts()
    lengths = pc.list_value_length(stored).to_numpy()
    count.add(whole.to_numpy(), lengths, cutter.room, pc.sum(unknown, min_count=0).as_py())
    return count


def _encode(batch: pa.RecordBatch, cutter: Cutter) -> Tokenized:
    recipe = cutter.recipe
    ids, sources = batch["id"].to_pylist(), batch["source"].to_pylist()
    held_out = [is_validation(one, recipe.validation_fraction) for one in ids]
    columns: dict[str, Any] = {}
    sizes: dict[str, Any] = {"id": batch["id"], "source": batch["source"]}
    parents = np.arange(len(ids))
    windows: Ints | None = None
    for name in recipe.fields:
        texts = batch[name].to_pylist()
        if name == "negatives":
            flat = [text for several in texts for text in several or []]
            of = [source for source, several in zip(sources, texts, strict=True) for _ in several or []]
            bounds = pa.array(np.cumsum([0, *(len(several or []) for several in texts)]), pa.int32())
            found = _encode_texts(flat, name, of, cutter)
            columns[name], sizes[f"{name}_tokens"], sizes[f"{name}_unknown"] = (
                pa.ListArray.from_arrays(bounds, values) for values in (found.rows, found.tokens, found.unknown)
            )
            continue
        if name == "anchor" and recipe.augmentation != Augment():
            rows = zip(texts, ids, held_out, strict=True)
            texts = [text if out else augment(text, recipe.augmentation, one, recipe.seed) for text, one, out in rows]
        found = _encode_texts(texts, name, sources, cutter)
        columns[name], sizes[f"{name}_tokens"], sizes[f"{name}_unknown"] = found.rows, found.tokens, found.unknown
        if cutter.step is not None:
            parents, windows = found.text, found.start // cutter.step
    leading: dict[str, Any] = {name: batch[name].take(pa.array(parents)) for name in ("id", "source")}
    columns["split"] = pa.array([SPLITS[out] for out in held_out]).take(pa.array(parents))
    if windows is not None:
        leading["window"] = pa.array(windows, pa.int32())
    return Tokenized(pa.table(leading | columns), pa.table(sizes))


@dataclass(frozen=True)
class _Encoded:
    """Texts as rows of token ids."""

    rows: pa.ListArray
    text: Ints  # index of each row's text
    start: Ints  # each row's first token in its text
    tokens: pa.Array  # number of tokens of each text, before truncation
    unknown: pa.Array  # number of unknown tokens of each text


def _encode_texts(texts: list[str], name: str, sources: list[str], cutter: Cutter) -> _Encoded:
    if cutter.recipe.prompts:
        prompts = [cutter.recipe.prompts.get(source, {}).get(name, "") for source in sources]
        texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    with encoding(cutter.tokenizer):
        encodings = cutter.tokenizer.encode_batch_fast(bounded(cutter.tokenizer, texts), add_special_tokens=False)
    lists = pa.array([encoding.ids for encoding in encodings], pa.list_(pa.int32()))
    tokens, bounds = lists.values.to_numpy(), lists.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(bounds)
    text, start, stop = cutter.cut(lengths)
    rows = cutter.frame(tokens, bounds[text] + start, bounds[text] + stop)
    is_unknown = np.zeros(len(tokens), bool) if cutter.unknown is None else tokens == cutter.unknown
    unknown = np.diff(np.concatenate([[0], np.cumsum(is_unknown)])[bounds])
    return _Encoded(rows, text, start, pa.array(lengths, pa.int32()), pa.array(unknown, pa.int32()))


def augment(text: str, shares: Augment, record_id: str, seed: int) -> str:
    """Augment a text, deterministically for the text, the record's id and the seed. Keeps at least one word."""
    parts = [(chunk, word) for chunk, joined in enumerate(text.split()) for word in _words_in(joined)]
    if not parts:
        return text
    chance = random.Random(f"{seed}:{record_id}")
    parts = parts[: max(1, round(len(parts) * (1 - shares.truncation * chance.random())))]
    chunks, words = zip(*parts, strict=True)
    parts = list(zip(chunks, _with_spans_masked(list(words), shares.span_masking, chance), strict=True))
    kept = [part for part in parts if chance.random() >= shares.word_dropout] or parts[:1]
    by_chunk = itertools.groupby(kept, key=operator.itemgetter(0))
    return " ".join("".join(word for _, word in chunk) for _, chunk in by_chunk)


def _words_in(chunk: str) -> list[str]:
    """Text between blanks; cut before each word if it has scripts without blanks."""
    if not dense_chars(chunk):
        return [chunk]
    starts = [start for start, _, _ in word_spans(chunk)]
    return [chunk[start:stop] for start, stop in itertools.pairwise([0, *starts[1:], len(chunk)])]


def _with_spans_masked(words: list[str], share: float, chance: random.Random) -> list[str]:
    """Mask `share` of the words, one mask per word, in spans of geometric length."""
    left = min(round(len(words) * share), sum(word != MASK for word in words))
    while left > 0:
        length = 1
        while length < left and chance.random() > 1 / MEAN_SPAN_WORDS:
            length += 1
        start = chance.randrange(len(words))
        for place in range(start, min(start + length, len(words))):
            left -= words[place] != MASK
            words[place] = MASK
    return words


def _write_split(table: pa.Table, output: Output, file_name: str, split: str, recipe: TokenRecipe) -> dict[str, Any]:
    """Write rows in canonical order. Asserts that the cutter made no row longer than `max_length`."""
    for name in set(recipe.fields) - {"negatives"}:
        assert pc.max(pc.list_value_length(table[name])).as_py() <= recipe.max_length
    hashes = [xxhash.xxh3_64_intdigest(one.encode(), seed=recipe.seed) for one in table["id"].to_pylist()]
    table = table.append_column("hash", pa.array(hashes, pa.uint64()))
    order = ("source", "hash", "id", "window") if split == "train" else ("hash", "id", "window")
    table = table.sort_by([(key, "ascending") for key in order if key in table.column_names]).drop_columns("hash")
    groups: list[int] = []
    group_sources: list[str | None] = []
    with output.writing(file_name) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd", write_page_checksum=True) as writer:
            for source, rows in _runs(table, split):
                for start in range(0, len(rows), ROW_GROUP_ROWS):
                    writer.write_table(rows.slice(start, ROW_GROUP_ROWS).combine_chunks())
                    groups.append(min(ROW_GROUP_ROWS, len(rows) - start))
                    group_sources.append(source)
        digest = sha256(temporary)
    return vars(Shard(file_name, split, len(table), groups, group_sources, digest))


def _runs(table: pa.Table, split: str) -> Iterator[tuple[str | None, pa.Table]]:
    """(source, rows) per source in train, where rows are sorted by source; (None, all rows) in validation."""
    if split != "train":
        yield None, table
        return
    sources = table["source"].to_pylist()
    bounds = [0, *(i for i in range(1, len(sources)) if sources[i] != sources[i - 1]), len(sources)]
    for start, stop in itertools.pairwise(bounds):
        yield sources[start], table.slice(start, stop - start)
