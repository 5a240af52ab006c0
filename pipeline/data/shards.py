"""From record files to a prepared data set: token shards, a histogram of lengths, the manifest last.

described = token_shards(stage, board, files, recipe, tokenizer_json)
manifest = assemble(folder, stage, described, Parts(files, tokenizer_json, recipe, sources, clusters, rejected))
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
from pipeline.data.manifest import SPLITS, Manifest, Shard, SourceCount, sha256, write_manifest
from pipeline.data.tokenizing import Recipe, tokenize_file
from pipeline.data.vocabulary import loaded_tokenizer
from pipeline.data.work import Report, Stage, Task, run_tasks
from pipeline.runtime.files import for_each, place, sizes, write_atomically
from pipeline.runtime.session import Board
from pipeline.storage.bucket import AnyPath
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


def tokens_stage(root: AnyPath, of_records: str, of_tokenizer: str, recipe: Recipe) -> Stage:
    """The stage that makes token shards of the records and the tokenizer that go by these hashes."""
    described = {**vars(recipe), "augmentation": vars(recipe.augmentation)}
    return Stage(root, "tokens", [of_records, of_tokenizer, described])


def token_shards(
    stage: Stage, board: Board, files: Sequence[AnyPath], recipe: Recipe, tokenizer: AnyPath
) -> dict[str, Any]:
    """Tokenize every record file. Returns the shards' descriptions and the counts of lengths."""
    described = [stage.scratch / "described" / f"{file.stem}.json" for file in files]
    file_bytes, changed_ns = [size or 0 for size in sizes(files)], tokenizer.stat().st_mtime_ns

    def tokenize(index: int, report: Report) -> None:
        found = tokenize_file(files[index], stage.folder, recipe, loaded_tokenizer(tokenizer, changed_ns))
        write_atomically(described[index], json.dumps(found).encode())
        report({"bytes": file_bytes[index], "records": sum(shard["rows"] for shard in found["shards"])})

    with stage.open():
        tasks = [Task(size, output) for size, output in zip(file_bytes, described, strict=True)]
        run_tasks(board, "prepare: tokenize", tasks, tokenize)
        found = for_each(stage.scratch, lambda output: json.loads(output.read_text()), described)
        shards = sorted((shard for part in found for shard in part["shards"]), key=lambda shard: shard["path"])
        lengths = {name: _merged([part["lengths"][name] for part in found]) for name in recipe.fields}
        draw(lengths, recipe.max_length, stage.folder / "lengths.png")
        summary = {"shards": shards, "lengths": {name: count.summary() for name, count in lengths.items()}}
        stage.finish(summary)
    return summary


def _merged(counts: list[dict[str, Any]]) -> LengthCounts:
    total = LengthCounts()
    for count in counts:
        total.merge(count)
    return total


@dataclass(frozen=True)
class Parts:
    """What a prepared data set is made of beside its token shards. `rejected` are files by the name they get."""

    records: Sequence[AnyPath]
    tokenizer: AnyPath
    recipe: Recipe
    sources: list[SourceCount]
    clusters: list[dict[str, Any]]
    rejected: Mapping[str, AnyPath] = field(default_factory=dict)


def assemble(folder: AnyPath, tokens: Stage, described: dict[str, Any], parts: Parts) -> Manifest:
    """Give the stages' files their names in the prepared folder, the manifest last."""
    shards = [Shard(**shard) for shard in described["shards"]]
    names: dict[str, AnyPath] = {"tokenizer.json": parts.tokenizer, "lengths.png": tokens.folder / "lengths.png"}
    names |= {shard.path: tokens.folder / shard.path for shard in shards}
    names |= {f"records/{path.name}": path for path in parts.records}
    names |= {f"rejected/{name}": path for name, path in parts.rejected.items()}
    for_each(folder, lambda of: place(of[1], folder / of[0]), list(names.items()))
    recipe = parts.recipe
    weights = {source.name: source.weight for source in parts.sources if source.weight is not None}
    fixed = [recipe.validation_fraction, recipe.max_length, sha256(parts.tokenizer), weights]
    content = [fixed, [shard.sha256 for shard in shards]]
    manifest = Manifest(
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        sources=parts.sources,
        splits={split: sum(shard.rows for shard in shards if shard.split == split) for split in SPLITS},
        shards=shards,
        lengths=described["lengths"],
        clusters=parts.clusters,
        versions={name: version(name) for name in ("ray", "tokenizers", "pyarrow", "rensa")},
        settings={"data.validation_fraction": recipe.validation_fraction, "tokenizer.max_length": recipe.max_length},
    )
    write_manifest(folder, manifest)
    return manifest
