"""Raw text to token shards, through Ray Data.

    read + judge ──► shuffle by hash of id ──► dedup, records/ ──► tokenizer ──► token shards ──► manifest
    a task a few MB    a group a shard          a file a shard      one task      a task a file     last

Every file's rows follow from content alone, so the shards are byte-identical for any number of workers. A prepared
data set lies in a folder named by the hash of its config and its inputs' paths, sizes and times: where that folder has
a manifest there is nothing to do, and after a crash the stages whose marker is there are not done again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, Source
from pipeline.data.manifest import Manifest, Shard, SourceCount, read_manifest, write_atomically, write_manifest
from pipeline.data.sources import Plan, check_fields, plan_source, text_fields
from pipeline.data.tokenizing import ROW_GROUP_ROWS, length_summary, load_tokenizer, tokenize_file, train_bpe
from pipeline.runtime.console import Stage, log, table
from pipeline.runtime.job import JobError, alone_in
from pipeline.runtime.session import Board

FORMAT = 1  # of prepared data; a change of what the stages write makes all earlier folders stale
SHARD_BYTES = 16 << 20  # input a shard stands for: a core tokenizes it in seconds
MAX_SHARDS = 4096
BAD_REASONS = ("invalid_utf8", "broken_json", "broken_python", "missing_field", "wrong_type", "unreadable_file")


class Inputs:
    """What would be prepared under a config: the tasks, and the folder they lead to. Raises ConfigError."""

    def __init__(self, config: Config) -> None:
        self.fields = _common_fields(config)
        self.plans: list[tuple[Source, Plan]] = [(source, plan_source(source)) for source in config.data.sources]
        for source in config.data.sources:
            check_fields(source)
        if config.tokenizer.load_path:
            load_tokenizer(Path(config.tokenizer.load_path))
        self.shards = max(1, min(MAX_SHARDS, sum(_shards(source, plan) for source, plan in self.plans)))
        self.folder = config.root / "prepared" / self._key(config)

    def _key(self, config: Config) -> str:
        load_path = config.tokenizer.load_path
        described = {
            "format": FORMAT,
            "data": config.data.model_dump(mode="json"),
            "tokenizer": config.tokenizer.model_dump(mode="json"),
            "inputs": [[source.name, plan.inputs] for source, plan in self.plans],
            "tokenizer_file": _file_hash(Path(load_path)) if load_path else None,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def prepare(config: Config, board: Callable[[], Board]) -> tuple[Path, Manifest]:
    """Bring the prepared data up to date. Returns its folder and manifest; asks for the `board` if there is work."""
    inputs = Inputs(config)
    folder = inputs.folder
    manifest = read_manifest(folder)
    if manifest:
        log.info("prepare: nothing to do, %s is up to date", folder)
        return folder, manifest
    with alone_in(folder):
        sources = _records(inputs, config, board(), folder)
        files = sorted((folder / "records").glob("*.parquet"))
        _tokenizer(config, folder, files, inputs.fields)
        manifest = _shards_of(config, board(), folder, files, inputs.fields, sources)
        write_manifest(folder, manifest)
    log.info("%s", _counts(manifest))
    return folder, manifest


def _counts(manifest: Manifest) -> str:
    rows: list[tuple[str, str]] = []
    for source in manifest.sources:
        rows.append((f"{source.name}: records in", f"{source.rows_in:,}"))
        rows.append(("  kept", f"{source.rows_kept:,}"))
        rows += [(f"  {reason}", f"{count:,}") for reason, count in source.rejected.items()]
    rows += [(f"tokens a text, mean: {field}", f"{length['mean']}") for field, length in manifest.lengths.items()]
    return table(rows, ("prepared", ""))


def _records(inputs: Inputs, config: Config, board: Board, folder: Path) -> list[SourceCount]:
    """Read, judge and deduplicate every source. Returns what became of each, checked."""
    marker = folder / "records.json"
    if marker.is_file():
        log.info("prepare: records are there from an earlier run")
        return [SourceCount(**source) for source in json.loads(marker.read_text())]
    counts = _run_records(inputs, config, board, folder)
    sources = [_source_count(source.name, counts) for source in config.data.sources]
    for source in sources:
        _check(source, config)
    write_atomically(marker, json.dumps([vars(source) for source in sources]).encode())
    return sources


def _run_records(inputs: Inputs, config: Config, board: Board, folder: Path) -> Counter[tuple[str, str]]:
    import pyarrow as pa
    import ray.data

    from pipeline.data.records import judge_task, write_shard

    work = [(source, task) for source, plan in inputs.plans for task in plan.tasks]
    handle, data, shards = board.handle, config.data, inputs.shards

    def judge(batch: dict[str, Any]) -> Any:
        for index in batch["id"].tolist():
            source, task = work[index]
            yield from judge_task(task, source, data, shards)
            handle.add.remote("judged", 1)

    def write(group: pa.Table) -> pa.Table:
        return write_shard(group, folder)

    dataset = ray.data.range(len(work), override_num_blocks=len(work)).map_batches(judge, batch_size=1)
    dataset = dataset.groupby("shard").map_groups(write, batch_format="pyarrow")
    with board.stage("prepare: read, judge, deduplicate", len(work), "tasks", counter="judged"):
        rows = dataset.take_all()
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts[row["source"], row["outcome"]] += row["rows"]
    return counts


def _source_count(name: str, counts: Counter[tuple[str, str]]) -> SourceCount:
    outcomes = {outcome: rows for (source, outcome), rows in counts.items() if source == name}
    rows_in, rows_kept = outcomes.pop("in", 0), outcomes.pop("kept", 0)
    return SourceCount(name, rows_in, rows_kept, dict(sorted(outcomes.items())))


def _check(source: SourceCount, config: Config) -> None:
    """The books must balance, and no more may be broken than the user allows."""
    found = source.rows_kept + sum(source.rejected.values())
    if source.rows_in != found:
        raise JobError(f"source {source.name}: {source.rows_in} records were read but {found} accounted for")
    bad = {reason: rows for reason, rows in source.rejected.items() if reason in BAD_REASONS}
    if sum(bad.values()) > config.data.max_bad_fraction * source.rows_in:
        listed = ", ".join(f"{rows} {reason}" for reason, rows in bad.items())
        raise JobError(
            f"source {source.name}: {listed} of {source.rows_in} records are more than "
            f"data.max_bad_fraction={config.data.max_bad_fraction} allows"
        )
    if source.rows_kept == 0:
        listed = ", ".join(f"{rows} {reason}" for reason, rows in source.rejected.items()) or "it is empty"
        raise JobError(f"source {source.name}: none of its {source.rows_in} records was kept ({listed})")


def _tokenizer(config: Config, folder: Path, files: list[Path], fields: list[str]) -> None:
    """Put `tokenizer.json` in place: the one that was asked for, else one trained on the records."""
    import ray

    from pipeline.data.records import record_texts

    target, wanted = folder / "tokenizer.json", config.tokenizer
    if target.is_file():
        return
    if wanted.load_path:
        text = load_tokenizer(Path(wanted.load_path)).to_str()
    else:
        train = ray.remote(num_cpus=1)(
            lambda: train_bpe(
                record_texts(files, fields, wanted.train_mb << 20),
                vocab_size=wanted.vocab_size,
                lowercase=wanted.lowercase,
            ).to_str()
        )
        with Stage("prepare: train the tokenizer", wanted.vocab_size, "tokens") as stage:
            text = ray.get(train.remote())
            stage.advance(wanted.vocab_size)
    write_atomically(target, text.encode())


def _shards_of(
    config: Config, board: Board, folder: Path, files: list[Path], fields: list[str], sources: list[SourceCount]
) -> Manifest:
    """Tokenize every record file and describe the result."""
    import ray.data

    handle, wanted, fraction = board.handle, config.tokenizer, config.data.validation_fraction

    def tokenize(batch: dict[str, Any]) -> Any:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        tokenizer.enable_truncation(wanted.max_length)
        for index in batch["id"].tolist():
            described = tokenize_file(files[index], folder, fields, tokenizer, fraction)
            handle.add.remote("tokenized", sum(shard["rows"] for shard in described))
            yield {"shards": [json.dumps(shard) for shard in described]}

    dataset = ray.data.range(len(files), override_num_blocks=len(files)).map_batches(tokenize, batch_size=1)
    rows = sum(source.rows_kept for source in sources)
    with board.stage("prepare: tokenize", rows, "records", counter="tokenized"):
        described = [json.loads(row["shards"]) for row in dataset.take_all()]
    described.sort(key=lambda shard: shard["path"])
    shards = [Shard(**{key: shard[key] for key in Shard.__dataclass_fields__}) for shard in described]
    lengths = {field: length_summary([shard["lengths"][field] for shard in described]) for field in fields}
    splits = {split: sum(s.rows for s in shards if s.split == split) for split in ("train", "validation")}
    content = [config.data.validation_fraction, wanted.max_length, _file_hash(folder / "tokenizer.json")]
    fingerprint = hashlib.sha256(json.dumps([content, [s.sha256 for s in shards]]).encode()).hexdigest()
    versions = {name: version(name) for name in ("ray", "tokenizers", "pyarrow")}
    return Manifest(fingerprint, sources, splits, shards, lengths, versions)


def _common_fields(config: Config) -> list[str]:
    """The text fields that all sources give; one prepared set has one shape."""
    shapes = {source.name: tuple(text_fields(source)) for source in config.data.sources}
    if len(set(shapes.values())) > 1:
        listed = "; ".join(f"{name} gives {' and '.join(fields)}" for name, fields in shapes.items())
        raise ConfigError(f"data.sources: {listed}; allowed are sources of one shape")
    return list(next(iter(shapes.values())))


def _shards(source: Source, plan: Plan) -> int:
    by_bytes = math.ceil(plan.total_bytes / SHARD_BYTES)
    return (
        min(by_bytes, math.ceil((source.max_samples or math.inf) / ROW_GROUP_ROWS)) if source.max_samples else by_bytes
    )


def _file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"tokenizer.load_path: found {path}: {error.strerror}; allowed is a tokenizer.json") from None
