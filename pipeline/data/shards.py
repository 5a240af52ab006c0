"""From record files to a prepared data set: token shards, a histogram of lengths, the manifest last.

described = tokens.make(lambda: token_shards(tokens, progress, files, recipe, tokenizer_json))
parts = Parts(files, tokenizer_json, recipe, sources, clusters, rejected)
prepared.make(lambda: asdict(assemble(prepared, tokens, described, parts)))

Tokens are made once: records that the newest tokens of the same series have are taken from there. A series has one
recipe, one tokenizer and the same sources, so the result is the same bytes with and without. Cost: a read of the token
shards that hold the same range of ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.data.lengths import LengthCounts, draw
from pipeline.data.manifest import SPLITS, Manifest, Shard, SourceCount, sha256
from pipeline.data.tokenizing import Recipe, Tokenized, tokenize_file
from pipeline.data.vocabulary import loaded_tokenizer
from pipeline.runtime.artifact import Artifact, Output, checked, open_parquet, read_manifest
from pipeline.runtime.console import log
from pipeline.runtime.outcome import JobError
from pipeline.runtime.session import Progress
from pipeline.storage.files import for_each, matching, sizes
from pipeline.storage.path import StoragePath
from pipeline.text.augment import Augmentation
from pipeline.text.identity import overlapping


def recipe_of(config: Config, fields: list[str]) -> Recipe:
    """How a config's records become rows of tokens."""
    data, tokenizer = config.data, config.tokenizer
    return Recipe(
        fields=fields,
        max_length=tokenizer.max_length,
        validation_fraction=data.validation_fraction,
        seed=data.seed,
        window_overlap=tokenizer.window_overlap if tokenizer.long_texts == "windows" else None,
        prompts={source.name: source.model_dump()["prompts"] for source in data.sources if source.prompts},
        augmentation=Augmentation(**data.augment.model_dump()),
    )


def tokens_of(root: StoragePath, of_records: str, of_tokenizer: str, recipe: Recipe) -> Artifact:
    """The token shards of the records and the tokenizer that go by these hashes."""
    return Artifact(root, "tokens", [of_records, of_tokenizer, _described(recipe)])


def _described(recipe: Recipe) -> dict[str, Any]:
    return {**vars(recipe), "augmentation": vars(recipe.augmentation)}


def series_of(config: Config, recipe: Recipe, tokenizer: StoragePath) -> str:
    """Names what records with equal ids have equal tokens in."""
    sources = [[source.name, source.type, source.path] for source in config.data.sources]
    content = [sha256(tokenizer), version("tokenizers"), _described(recipe), sources]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EarlierTokens:
    """The tokens of an earlier data set."""

    folder: StoragePath
    files: int
    """Record files that it was made from."""

    @classmethod
    def find(cls, tokens: Artifact, series: str) -> EarlierTokens | None:
        """The newest of the series beside `tokens`."""
        found: list[tuple[int, StoragePath, int]] = []
        for path in matching(tokens.folder.parent, "tokens-*/manifest.json"):
            manifest = read_manifest(path.parent)
            if manifest and manifest.get("series") == series and path.parent != tokens.folder:
                found.append((path.stat().st_mtime_ns, path.parent, manifest["record_files"]))
        return cls(*max(found)[1:]) if found else None

    def read(self, shard: int, shards: int) -> Tokenized | None:
        """Those whose ids may lie in this of so many shards; None if they are gone or damaged."""
        names = [f"{number:05d}.parquet" for number in overlapping(shard, shards, self.files)]
        try:
            texts = self._tables("lengths", names)
            rows = [
                table.append_column("split", pa.array([split] * len(table)))
                for split in SPLITS
                for table in self._tables(split, names)
            ]
        except (OSError, ValueError, JobError):
            return None
        return Tokenized(pa.concat_tables(rows), pa.concat_tables(texts)) if texts else None

    def _tables(self, folder: str, names: Sequence[str]) -> list[pa.Table]:
        files = [self.folder / folder / name for name in names]
        found = [open_parquet(file).read() for file in files if file.is_file()]
        return [table.cast(pa.schema([(f.name, _as_written(f.type)) for f in table.schema])) for table in found]


def _as_written(kind: pa.DataType) -> pa.DataType:
    """Parquet calls the items of lists by another name than Arrow, and a file's bytes hold the name."""
    return pa.list_(_as_written(kind.value_type)) if pa.types.is_list(kind) else kind


def token_shards(
    tokens: Artifact,
    progress: Progress,
    files: Sequence[StoragePath],
    recipe: Recipe,
    tokenizer: StoragePath,
    series: str | None = None,
) -> dict[str, Any]:
    """Tokenize every record file. Returns the shards' descriptions and the counts of lengths.

    Takes over the tokens of an earlier data set of the `series`, in which a record's id stands for its texts.
    """
    changed_ns = tokenizer.stat().st_mtime_ns
    earlier = EarlierTokens.find(tokens, series) if series else None

    def tokenize(index: int, output: Output) -> dict[str, Any]:
        known = earlier.read(index, len(files)) if earlier else None
        found = tokenize_file(files[index], output, recipe, loaded_tokenizer(checked(tokenizer), changed_ns), known)
        output.report(records=sum(shard["rows"] for shard in found["shards"]))
        return found

    found = tokens.tasks(progress, "prepare: tokenize", [size or 0 for size in sizes(files)], tokenize)
    if earlier:
        log.info(
            "prepare: %s of %s records were tokenized, the tokens of the others are those in %s",
            *(f"{sum(part[of] for part in found):,}" for of in ("tokenized", "records")),
            earlier.folder,
        )
    shards = sorted((shard for part in found for shard in part["shards"]), key=lambda shard: shard["path"])
    lengths = {name: _merged([part["lengths"][name] for part in found]) for name in recipe.fields}
    with tokens.output.writing("lengths.png") as file:
        draw(lengths, recipe.max_length, file)
    described = {"shards": shards, "lengths": {name: count.summary() for name, count in lengths.items()}}
    return described | ({"series": series, "record_files": len(files)} if series else {})


def _merged(counts: list[dict[str, Any]]) -> LengthCounts:
    total = LengthCounts()
    for count in counts:
        total.merge(count)
    return total


@dataclass(frozen=True)
class Parts:
    """What a prepared data set is made of beside its token shards. `rejected` are files by the name they get."""

    records: Sequence[StoragePath]
    tokenizer: StoragePath
    recipe: Recipe
    sources: list[SourceCount]
    clusters: list[dict[str, Any]]
    rejected: Mapping[str, StoragePath] = field(default_factory=dict)


def assemble(prepared: Artifact, tokens: Artifact, described: dict[str, Any], parts: Parts) -> Manifest:
    """Give the other artifacts' files their names in the prepared one. Returns what `Artifact.make` adds `files` to."""
    shards = [Shard(**shard) for shard in described["shards"]]
    names: dict[str, StoragePath] = {"tokenizer.json": parts.tokenizer, "lengths.png": tokens.folder / "lengths.png"}
    names |= {shard.path: tokens.folder / shard.path for shard in shards}
    names |= {f"records/{path.name}": path for path in parts.records}
    names |= {f"rejected/{name}": path for name, path in parts.rejected.items()}
    for_each(prepared.folder, lambda of: prepared.output.link(*of), list(names.items()))
    recipe = parts.recipe
    weights = {source.name: source.weight for source in parts.sources if source.weight is not None}
    fixed = [recipe.validation_fraction, recipe.max_length, sha256(parts.tokenizer), weights]
    content = [fixed, [shard.sha256 for shard in shards]]
    return Manifest(
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        sources=parts.sources,
        splits={split: sum(shard.rows for shard in shards if shard.split == split) for split in SPLITS},
        shards=shards,
        lengths=described["lengths"],
        clusters=parts.clusters,
        versions={name: version(name) for name in ("ray", "tokenizers", "pyarrow", "rensa")},
        settings={"data.validation_fraction": recipe.validation_fraction, "tokenizer.max_length": recipe.max_length},
    )
