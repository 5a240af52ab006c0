"""From record files to a prepared data set: token shards, a histogram of lengths, the manifest last.

described = tokens.make(lambda: token_shards(tokens, board, files, recipe, tokenizer_json))
parts = Parts(files, tokenizer_json, recipe, sources, clusters, rejected)
prepared.make(lambda: asdict(assemble(prepared, tokens, described, parts)))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pipeline.config import Config
from pipeline.data.lengths import LengthCounts, draw
from pipeline.data.manifest import SPLITS, Manifest, Shard, SourceCount, sha256
from pipeline.data.tokenizing import Recipe, tokenize_file
from pipeline.data.vocabulary import loaded_tokenizer
from pipeline.runtime.artifact import Artifact, Output, checked
from pipeline.runtime.session import Board
from pipeline.storage.files import for_each, sizes
from pipeline.storage.path import StoragePath
from pipeline.text.augment import Augmentation


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
    described = {**vars(recipe), "augmentation": vars(recipe.augmentation)}
    return Artifact(root, "tokens", [of_records, of_tokenizer, described])


def token_shards(
    tokens: Artifact, board: Board, files: Sequence[StoragePath], recipe: Recipe, tokenizer: StoragePath
) -> dict[str, Any]:
    """Tokenize every record file. Returns the shards' descriptions and the counts of lengths."""
    changed_ns = tokenizer.stat().st_mtime_ns

    def tokenize(index: int, output: Output) -> dict[str, Any]:
        found = tokenize_file(files[index], output, recipe, loaded_tokenizer(checked(tokenizer), changed_ns))
        output.report(records=sum(shard["rows"] for shard in found["shards"]))
        return found

    found = tokens.tasks(board, "prepare: tokenize", [size or 0 for size in sizes(files)], tokenize)
    shards = sorted((shard for part in found for shard in part["shards"]), key=lambda shard: shard["path"])
    lengths = {name: _merged([part["lengths"][name] for part in found]) for name in recipe.fields}
    with tokens.output.writing("lengths.png") as file:
        draw(lengths, recipe.max_length, file)
    return {"shards": shards, "lengths": {name: count.summary() for name, count in lengths.items()}}


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
