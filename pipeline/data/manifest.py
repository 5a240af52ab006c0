"""A prepared data set: token shards, the records they came from, and `manifest.json`, written last.

<root>/prepared/<fingerprint>/
    tokenizer.json
    records/00000.parquet             kept records, text and metadata, by hash of id
    rejected/00000.parquet            what was refused: id, source, source_id, reason, excerpt
    train/00000.parquet               token shards: id, anchor, positive (or text) as lists of token ids
    validation/00000.parquet
    manifest.json                     {fingerprint, sources, splits, shards, lengths, versions}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

SPLITS = ("train", "validation")

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
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "source_id", "reason", "excerpt")])
TEXT_FIELDS = ("anchor", "positive", "text")


@dataclass(frozen=True)
class SourceCount:
    """What became of a source's records. `rows_in == rows_kept + sum(rejected.values())`, checked by every run."""

    name: str
    rows_in: int
    rows_kept: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class Shard:
    """A file of one split, with the rows of each of its row groups."""

    path: str  # relative to the data set's folder
    split: str
    rows: int
    row_groups: list[int]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    fingerprint: str
    sources: list[SourceCount]
    splits: dict[str, int]
    shards: list[Shard]
    lengths: dict[str, dict[str, float]]
    versions: dict[str, str]

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    @property
    def text_fields(self) -> list[str]:
        return [name for name in TEXT_FIELDS if name in self.lengths]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished data set; None where there is none, or one that cannot be read."""
    try:
        content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        content["sources"] = [SourceCount(**source) for source in content["sources"]]
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
