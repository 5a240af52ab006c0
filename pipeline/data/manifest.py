"""A prepared data set: token shards, the records they came from, and `manifest.json`, written last.

<root>/prepared/<fingerprint>/
    tokenizer.json
    records/00000.parquet             kept records, text and metadata, by hash of id
    rejected/00000.parquet            what was refused: id, source, source_id, reason, excerpt, duplicate_of, similarity
    train/00000.parquet               token shards: id, source, and the text fields as lists of token ids
    validation/00000.parquet
    lengths.png                       how long the texts are, in tokens
    manifest.json                     {fingerprint, sources, splits, shards, lengths, clusters, versions, settings,
                                       files}

The files are second names (hard links) of those in the folders of the stages that made them, <root>/stages/; in a
bucket they are copies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.runtime.artifact import Files, read_manifest
from pipeline.storage.files import digest_of
from pipeline.storage.path import StoragePath

SPLITS = ("train", "validation")
EXCERPT_CHARS = 200

RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("source_id", pa.string()),
        ("text", pa.string()),
        ("anchor", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("metadata", pa.string()),  # a JSON object of the columns that ride along
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "source_id", "reason", "excerpt")),
        ("duplicate_of", pa.string()),  # source_id of the record that stays in its place, or the evaluation text's id
        ("similarity", pa.float64()),  # Jaccard, to a record that it nearly equals
    ]
)
TEXT_FIELDS = ("anchor", "positive", "negatives", "text")


@dataclass(frozen=True)
class SourceCount:
    """What became of a source's records. `rows_in == rows_kept + sum(rejected.values())`, checked by every run."""

    name: str
    rows_in: int
    rows_kept: int
    rejected: dict[str, int]
    weight: float | None = None  # its share of training batches, against the other sources' weights
    prompts: dict[str, str] = field(default_factory=dict)  # by text field: already in the token shards


@dataclass(frozen=True)
class Shard:
    """A file of one split, with the rows of each of its row groups and, in train, the one source they come from."""

    path: str  # relative to the data set's folder
    split: str
    rows: int
    row_groups: list[int]
    row_group_sources: list[str | None]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    fingerprint: str
    sources: list[SourceCount]
    splits: dict[str, int]
    shards: list[Shard]
    lengths: dict[str, dict[str, float]]  # by text field: see lengths.LengthCounts.summary
    clusters: list[dict[str, Any]]  # the records that stand for the most near-duplicates
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)  # keys of the config that the shards depend on
    files: Files = field(default_factory=dict)

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    @property
    def holds_pairs(self) -> bool:
        return "anchor" in self.lengths

    @property
    def text_fields(self) -> list[str]:
        return [name for name in TEXT_FIELDS if name in self.lengths]


def read_prepared(folder: StoragePath) -> Manifest | None:
    """The manifest of a finished data set; None where there is none, or one that cannot be read."""
    content = read_manifest(folder)
    if content is None:
        return None
    try:
        content["sources"] = [SourceCount(**source) for source in content["sources"]]
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return Manifest(**content)
    except (KeyError, TypeError):
        return None


def rejections(rows: pa.Table, reason: str, similarity: pa.Array | None) -> pa.Table:
    """Rows as REJECTED_SCHEMA has them: `reason` where they have none yet, an excerpt, who stands for them."""
    excerpt = pc.utf8_slice_codeunits(pc.coalesce(rows["anchor"], rows["text"]), 0, EXCERPT_CHARS)
    columns = {name: rows[name] for name in ("id", "source", "source_id")}
    columns["reason"] = pc.fill_null(rows["reason"], reason) if "reason" in rows.column_names else [reason] * len(rows)
    columns["excerpt"] = pc.coalesce(rows["excerpt"], excerpt) if "excerpt" in rows.column_names else excerpt
    columns["duplicate_of"] = rows["duplicate_of"]
    columns["similarity"] = pa.nulls(len(rows), pa.float64()) if similarity is None else similarity
    return pa.table(columns).cast(REJECTED_SCHEMA)


def sha256(path: StoragePath) -> str:
    return digest_of(path, hashlib.sha256())
