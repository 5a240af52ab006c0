"""Runs the last two stages of prepare: token shards, and the prepared data set with its manifest.

    described = tokens.make(lambda: token_shards(tokens, progress, files, recipe, tokenizer_json))
    parts = PreparedParts(files, tokenizer_json, recipe, sources, clusters, 0.02, rejected)
    prepared.make(lambda: asdict(assemble(prepared, tokens, described, parts)))

Known records are not tokenized again: their tokens are copied from the newest earlier token shards of the same series.
A series has the same recipe, tokenizer and sources, so copying does not change a byte. Cost: reading the earlier shards
that cover the same range of ids.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.core.artifact import Artifact, Output, checked, open_parquet, read_manifest
from pipeline.core.console import log
from pipeline.core.files import file_sizes, for_each, sorted_glob
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.manifest import SPLITS, LengthCounts, Manifest, Shard, SourceCount, draw_lengths, sha256
from pipeline.data.partitions import overlapping
from pipeline.data.tokenizer import loaded_tokenizer
from pipeline.data.tokenizing import Tokenized, TokenRecipe, tokenize_file


def token_recipe(config: Config, fields: list[str]) -> TokenRecipe:
    """How a config turns records into rows of tokens."""
    data, tokenizer = config.data, config.tokenizer
    return TokenRecipe(
        fields=fields,
        max_length=tokenizer.max_length,
        validation_fraction=data.validation_fraction,
        seed=data.seed,
        window_overlap=tokenizer.window_overlap if tokenizer.long_texts == "windows" else None,
        prompts={source.name: source.model_dump()["prompts"] for source in data.sources if source.prompts},
        augmentation=data.augment,
    )


def tokens_of(root: StoragePath, of_records: str, of_tokenizer: str, recipe: TokenRecipe) -> Artifact:
    """The artifact of the token shards, given the keys of the records and the tokenizer."""
    return Artifact(root, "tokens", [of_records, of_tokenizer, _described(recipe)])


def _described(recipe: TokenRecipe) -> dict[str, Any]:
    return {**vars(recipe), "augmentation": recipe.augmentation.model_dump()}


def series_of(config: Config, recipe: TokenRecipe, tokenizer: StoragePath) -> str:
    """Hash of everything that a record's tokens depend on, except the record."""
    sources = [[source.name, source.type, source.path] for source in config.data.sources]
    content = [sha256(tokenizer), version("tokenizers"), _described(recipe), sources]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EarlierTokens:
    """Token shards of an earlier data set, made from `files` record files."""

    folder: StoragePath
    files: int

    @classmethod
    def find(cls, tokens: Artifact, series: str) -> EarlierTokens | None:
        """The newest complete token shards of the series, except `tokens`."""
        found: list[tuple[int, StoragePath, int]] = []
        for path in sorted_glob(tokens.folder.parent, "tokens-*/manifest.json"):
            manifest = read_manifest(path.parent)
            if manifest and manifest.get("series") == series and path.parent != tokens.folder:
                found.append((path.stat().st_mtime_ns, path.parent, manifest["record_files"]))
        return cls(*max(found)[1:]) if found else None

    def read(self, shard: int, shards: int) -> Tokenized | None:
        """The tokens of ids that shard `shard` of `shards` may contain; None if the files are missing or damaged."""
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
    """Restore Arrow's name for list items; Parquet's name would change the bytes of a file."""
    return pa.list_(_as_written(kind.value_type)) if pa.types.is_list(kind) else kind


def token_shards(
    tokens: Artifact,
    progress: Progress,
    files: Sequence[StoragePath],
    recipe: TokenRecipe,
    tokenizer: StoragePath,
    series: str | None = None,
) -> dict[str, Any]:
    """Tokenize every record file. Returns descriptions of the shards and summaries of text lengths.

    With a `series`, copies the tokens of known records from an earlier data set of that series.
    """
    changed_ns = tokenizer.stat().st_mtime_ns
    earlier = EarlierTokens.find(tokens, series) if series else None

    def tokenize(index: int, output: Output) -> dict[str, Any]:
        known = earlier.read(index, len(files)) if earlier else None
        found = tokenize_file(files[index], output, recipe, loaded_tokenizer(checked(tokenizer), changed_ns), known)
        output.report(records=sum(shard["rows"] for shard in found["shards"]))
        return found

    found = tokens.tasks(progress, "prepare: tokenize", [size or 0 for size in file_sizes(files)], tokenize)
    if earlier:
        log.info(
            "prepare: tokenized %s of %s records, copied the tokens of the others from %s",
            *(f"{sum(part[of] for part in found):,}" for of in ("tokenized", "records")),
            earlier.folder,
        )
    shards = sorted((shard for part in found for shard in part["shards"]), key=lambda shard: shard["path"])
    lengths = {name: LengthCounts() for name in recipe.fields}
    for part, name in itertools.product(found, recipe.fields):
        lengths[name].merge(part["lengths"][name])
    with tokens.output.writing("lengths.png") as file:
        draw_lengths(lengths, recipe.max_length, file)
    described = {
        "shards": shards,
        "lengths": {name: count.summary() for name, count in lengths.items()},
        "histograms": {name: count.histogram(recipe.max_length) for name, count in lengths.items()},
    }
    return described | ({"series": series, "record_files": len(files)} if series else {})


@dataclass(frozen=True)
class PreparedParts:
    """The parts of a prepared data set, except its token shards. `rejected`: name in the data set → file."""

    records: Sequence[StoragePath]
    tokenizer: StoragePath
    recipe: TokenRecipe
    sources: list[SourceCount]
    clusters: list[dict[str, Any]]
    validation_fraction: float
    """The config's; `recipe` has the share that is held out, which is larger on small data."""
    rejected: Mapping[str, StoragePath] = field(default_factory=dict)


def assemble(prepared: Artifact, tokens: Artifact, described: dict[str, Any], parts: PreparedParts) -> Manifest:
    """Link the stages' files into the prepared data set. Returns its manifest, with `files` still empty."""
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
        settings={"data.validation_fraction": parts.validation_fraction, "tokenizer.max_length": recipe.max_length},
        histograms=described["histograms"],
        held_out_fraction=recipe.validation_fraction,
    )
