"""Groups the records of a prepared data set into documents: one per distinct text, partitioned by ranges of ids.

    documents = Documents.of(prepared, root, manifest, "positive", use_tokens=True)
    documents.make(progress)
    documents.read(3)                    # (id, source, source_id, places, text, metadata, digest) of range 3, by id

    records/00000.parquet ──┐   hash each text          ┌──► documents/00000.parquet     ids from 00… to 55…
    records/00001.parquet ──┼──► shuffle by range ──────┼──► documents/00001.parquet     ids from 55… to aa…
    records/00002.parquet ──┘                           └──► documents/00002.parquet

Twenty questions about one passage are twenty records and one document; `places` lists all records with the text.
Text-only records are documents already: then nothing is written, and each record file is a range. Cost: reads and
writes all texts, once per prepared data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.config import Config
from pipeline.core.artifact import Artifact, Output, open_parquet
from pipeline.core.files import file_sizes, for_each, sorted_glob
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.manifest import SPLITS, Manifest
from pipeline.data.partitions import content_id, read_part, shard_of, write_parts
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.table import PLACE, IdRange, id_range
from pipeline.index.vectors import TOKENS, one_array
from pipeline.model.folder import read_model_spec

FORMAT = 1
READ_ROWS = 8_192
MEASURED_FILES = 8
PLACE_COLUMNS = ("source", "source_id", "metadata")
COLUMNS = ("id", "source", "source_id", "places", "text", "metadata", "digest")


@dataclass(frozen=True)
class Documents:
    """Documents of one record field. With `use_tokens` they have the `tokens` of the token shards."""

    records: Sequence[StoragePath]
    field: str
    prompts: dict[str, str]
    """Source → its prompt. The same text with another prompt is another document."""
    use_tokens: bool
    shards: StoragePath
    """The prepared data set, with the token shards."""
    artifact: Artifact
    are_records: bool
    """Whether each record is already a document, so there is nothing to make."""

    @classmethod
    def of(
        cls, prepared: StoragePath, root: StoragePath, manifest: Manifest, field: str, *, use_tokens: bool
    ) -> Documents:
        prompts = {source.name: source.prompts[field] for source in manifest.sources if source.prompts.get(field)}
        key = {"format": FORMAT, "data": prepared.name, "field": field, "prompts": prompts, "tokens": use_tokens}
        artifact = Artifact(root / "stages", "documents", key)
        records = sorted_glob(prepared / "records", "*.parquet")
        are_records = manifest.text_fields == ["text"] and not prompts
        return cls(records, field, prompts, use_tokens, prepared, artifact, are_records)

    @property
    def key(self) -> str:
        return self.artifact.key

    def __len__(self) -> int:
        """Number of ranges."""
        return len(self.records)

    def bounds(self, index: int) -> IdRange:
        """The ids of a range. All ranges together cover every possible id."""
        return id_range(index, len(self))

    @cached_property
    def rows(self) -> list[int]:
        """Number of documents in each range."""
        if self.are_records:
            return for_each(self.shards, lambda path: open_parquet(path).metadata.num_rows, self.records)
        manifest = self.artifact.read()
        assert manifest
        return list(manifest["rows"])

    @cached_property
    def mean_bytes(self) -> float:
        """Mean size of a document with its metadata, from the footers of the first files."""
        names = [path.name for path in self.records[:MEASURED_FILES]]
        home = self.shards / "records" if self.are_records else self.artifact.folder / "documents"
        footers = [open_parquet(home / name).metadata for name in names]
        groups = (each.row_group(i).total_byte_size for each in footers for i in range(each.num_row_groups))
        return sum(groups) / max(sum(each.num_rows for each in footers), 1)

    def make(self, progress: Any) -> None:
        """Group the records unless that is done. Calls `progress` only if there is work."""
        if not self.are_records:
            self.artifact.make(lambda: self._group(progress()))

    def _group(self, progress: Progress) -> dict[str, Any]:
        ranges = len(self.records)
        bytes_in = [size or 0 for size in file_sizes(self.records)]

        def spread(index: int, output: Output) -> str:
            rows, name = self._identified(index), f"scratch/by-range/{index:05d}.parts"
            with output.writing(name) as file:
                write_parts(rows, [shard_of(each, ranges) for each in rows["id"].to_pylist()], ranges, file)
            output.report(records=len(rows))
            return name

        def group(index: int, output: Output) -> int:
            rows = grouped(read_part(parts, index))
            output.write_table(f"documents/{index:05d}.parquet", rows)
            return len(rows)

        names = self.artifact.tasks(progress, "embed: find distinct texts", bytes_in, spread)
        parts = [self.artifact.folder / name for name in names]
        even = [sum(bytes_in) // max(ranges, 1)] * ranges
        rows = self.artifact.tasks(progress, "embed: write distinct texts", even, group)
        return {"data": self.shards.name, "rows": rows}

    def _identified(self, index: int) -> pa.Table:
        """The records of a file with `text`, and the text's hash as `id`."""
        columns = dict.fromkeys(["id", *PLACE_COLUMNS, self.field])
        rows = open_parquet(self.records[index]).read(columns=list(columns))
        columns = {name: rows[name] for name in PLACE_COLUMNS} | {"text": rows[self.field]}
        columns |= {"tokens": tokens_by_id(rows["id"], self.tokens(index))} if self.use_tokens else {}
        prompts = self.prompts
        ids = [
            content_id([prompts[source], text] if source in prompts else [text])
            for source, text in zip(rows["source"].to_pylist(), rows[self.field].to_pylist(), strict=True)
        ]
        return pa.table({"id": pa.array(ids, pa.string()), **columns})

    def tokens(self, index: int) -> pa.Table:
        """`id` and `tokens` of the records of a file, from its token shards."""
        return shard_tokens(self.shards, self.records[index].name, self.field)

    def read(self, index: int, columns: Sequence[str] = COLUMNS) -> Iterator[pa.Table]:
        """Yield the documents of a range in batches, sorted by id; `tokens` may be among the columns."""
        if not self.are_records:
            path = self.artifact.folder / "documents" / f"{index:05d}.parquet"
            for batch in open_parquet(path).iter_batches(READ_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch])
            return
        tokens = self.tokens(index) if "tokens" in columns else None
        needed = ["id", *PLACE_COLUMNS, *(["text"] if "text" in columns else [])]
        for batch in open_parquet(self.records[index]).iter_batches(READ_ROWS, columns=needed):
            rows = grouped(pa.Table.from_batches([batch]))
            if tokens is not None:
                rows = rows.append_column("tokens", tokens_by_id(rows["id"], tokens))
            yield rows.select(list(columns))

    def table(self, index: int, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """All documents of a range."""
        batches = list(self.read(index, columns))
        schema = pa.schema([(name, pa.list_(PLACE) if name == "places" else pa.string()) for name in columns])
        return pa.concat_tables(batches).combine_chunks() if batches else schema.empty_table()


def shard_tokens(prepared: StoragePath, name: str, field: str) -> pa.Table:
    """`id` and `tokens` of a field, for the records of the file `name`, from its token shards."""
    paths = [path for split in SPLITS if (path := prepared / split / name).is_file()]
    if not paths:  # a record file without rows
        return pa.schema([("id", pa.string()), ("tokens", TOKENS)]).empty_table()
    shards = pa.concat_tables([open_parquet(path).read(columns=["id", field]) for path in paths])
    return shards.rename_columns(["id", "tokens"]).combine_chunks()


def tokens_by_id(ids: pa.ChunkedArray, tokens: pa.Table) -> pa.Array:
    """Token ids of these records, from a table of `id` and `tokens`."""
    return one_array(tokens["tokens"]).take(one_array(pc.index_in(ids, one_array(tokens["id"]))))


def grouped(rows: pa.Table) -> pa.Table:
    """Group rows of `id`, PLACE_COLUMNS and more by id, sorted; a document's first place has the lowest source_id."""
    rows = rows.sort_by([(name, "ascending") for name in ("id", "source_id", "source", "metadata")]).combine_chunks()
    ids = rows["id"]
    begins = np.ones(len(rows), bool)
    if len(rows) > 1:
        begins[1:] = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy()
    starts = np.flatnonzero(begins)
    places = [one_array(rows[name]) for name in PLACE_COLUMNS]
    offsets = pa.array([*starts.tolist(), len(rows)], pa.int32())
    listed = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(places, fields=list(PLACE)))
    first = rows.take(pa.array(starts))
    columns = {name: first[name] for name in rows.column_names}
    columns |= {"places": listed, "digest": place_digests(listed)}
    return pa.table(columns)


def place_digests(places: pa.ListArray) -> pa.Array:
    """A hash of each document's places: of all their fields, each with its length in bytes before it."""
    columns = [pc.fill_null(column, "") for column in places.flatten().flatten()]
    lengths = [pc.binary_length(column).cast(pa.string()) for column in columns]
    flat = pc.binary_join_element_wise(*(part for pair in zip(lengths, columns, strict=True) for part in pair), ":")
    offsets = np.cumsum([0, *pc.fill_null(pc.list_value_length(places), 0).to_pylist()])
    texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat), ":")
    return pa.array(map(xxhash.xxh3_128_hexdigest, texts.cast(pa.binary()).to_pylist()), pa.string())


def first_places(places: pa.ListArray) -> pa.StructArray:
    """The first place of each document, or null."""
    counts = pc.fill_null(pc.list_value_length(places), 0).to_numpy()
    return places.flatten().take(pa.array(np.cumsum(counts) - counts, mask=counts == 0))


def tokens_fit(config: Config, prepared: StoragePath, recipe: EncoderRecipe, field: str, prompt: str) -> bool:
    """Whether the token shards hold exactly the tokens that the model would read, with its own `prompt`."""
    if config.tokenizer.long_texts == "windows" or config.embedding.long_texts != "cut":
        return False
    if field == "anchor" and any(config.data.augment.model_dump().values()):
        return False
    if read_model_spec(recipe.local).max_length != config.tokenizer.max_length:
        return False
    for source in config.data.sources:
        own = source.model_dump()["prompts"].get(field) or ""
        if own != (own or prompt):
            return False
    return _tokenizer(recipe.local / "tokenizer.json") == _tokenizer(prepared / "tokenizer.json")


def _tokenizer(path: StoragePath) -> Any:
    """The content of a tokenizer.json, without truncation and padding."""
    if not path.is_file():
        return None
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("truncation", "padding")}
