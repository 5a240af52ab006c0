"""Prepares raw text into token shards, in stages that run over the cluster.

    records ──────────────► distinct ───────────────► tokenizer ──► tokens ──────► manifest
    read, filter, drop      drop near-duplicates      one task      one task       written last
    exact duplicates        and evaluation texts                    per file

    folder, manifest = prepare(config, lambda: progress)          # returns at once if nothing has changed

Each file's rows depend only on content, so the shards are byte-identical for any number of workers. Each stage is an
artifact (core/artifact.py): changing an option reruns only the stages that depend on it, and a restarted job runs only
the missing tasks. The prepared data set is an artifact too, linked from the stages' files.

Once a run has started, later data are tokenized with its tokenizer, so that they fit the model (drift.py), and known
records keep their tokens (shards.py). Cost: benchmarks/README.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, Source
from pipeline.core.artifact import Artifact, Output, open_parquet
from pipeline.core.console import log, log_lines, table
from pipeline.core.files import sorted_glob
from pipeline.core.outcome import Finding, check_disk_space, command, raise_findings
from pipeline.core.path import StoragePath, as_path
from pipeline.core.session import Progress
from pipeline.data import near_duplicates
from pipeline.data.decontamination import check_beir_folders
from pipeline.data.drift import TrainedOn, pinned_tokenizer
from pipeline.data.fields import text_fields
from pipeline.data.filtering import Filter
from pipeline.data.manifest import Manifest, SourceCount, read_prepared, sha256
from pipeline.data.partitions import held_out_fraction, is_validation
from pipeline.data.records import (
    after_stage,
    check_duplicates,
    check_sources,
    make_records,
    record_texts,
    text_bytes_of,
    warn_of_bad_input,
)
from pipeline.data.shards import PreparedParts, assemble, series_of, token_recipe, token_shards, tokens_of
from pipeline.data.sources import SourcePlan, check_fields, inputs_by_content, plan_source
from pipeline.data.tokenizer import load_tokenizer, tokenizer_file, train_tokenizer
from pipeline.data.tokenizing import ROW_GROUP_ROWS, Cutter

FORMAT = 8  # raise it when the stages' output changes: all earlier folders become stale
SHARD_BYTES = 8 << 20  # text per shard: a core tokenizes it in seconds
MAX_SHARDS = 4_096  # above 32 GB of text, shards grow instead, because each reads every part of the shuffle
DISK_A_TEXT_BYTE = 1.7  # peak of all stages. Ours, measured: 40.0 MB for 23.5 MB of Debian's descriptions
READING_SHARE = 0.9  # of the time that training a tokenizer takes; the rest makes the vocabulary. Ours, measured
REPORT_TEXTS = 4096  # between two reports of the tokenizer's training
SMALL_ROWS = 10_000  # with more records, even 0.001 of them is enough to hold out
_RECORD_KEYS = {"min_chars", "max_chars", "max_nonprintable", "sanitize", "safety", "quality"}


class Inputs:
    """What a config prepares: its read tasks, stages and output folder. Raises ConfigError if the config is invalid."""

    def __init__(self, config: Config, rehash: bool = False) -> None:
        self.config = config
        self.fields = _common_fields(config)
        if config.tokenizer.long_texts == "windows" and self.fields != ["text"]:
            raise ConfigError(
                f"tokenizer.long_texts: found windows, with the record fields {', '.join(self.fields)}; "
                "windows need sources whose records have only `text`"
            )
        self.recipe = token_recipe(config, self.fields)
        if config.tokenizer.load_path is not None:
            Cutter(load_tokenizer(as_path(config.tokenizer.load_path)), self.recipe)
        self.plans: list[tuple[Source, SourcePlan]] = _plans(config)
        self.work = [(source, task) for source, plan in self.plans for task in plan.tasks]
        self.shards = max(1, min(MAX_SHARDS, sum(_shards(source, plan) for source, plan in self.plans)))
        self._name_stages(rehash)

    @property
    def room(self) -> Finding:
        """Whether the disk has room for all stages."""
        needed = DISK_A_TEXT_BYTE * sum(plan.text_bytes for _, plan in self.plans)
        return check_disk_space("storage.root", self.prepared.folder, needed, "prepare")

    @property
    def stages(self) -> list[Artifact]:
        return [stage for stage in (self.records, self.distinct, self.tokenizer, self.tokens) if stage]

    def record_files(self, stage: Artifact) -> list[StoragePath]:
        return [stage.folder / "records" / f"{i:05d}.parquet" for i in range(self.shards)]

    def _name_stages(self, rehash: bool) -> None:
        data, tokenizer, root = self.config.data, self.config.tokenizer, self.config.root / "stages"
        unused_here = {"weight", "prompts"}  # they do not affect the records
        self.records = Artifact(
            root,
            "records",
            {
                "format": FORMAT,
                "sources": [source.model_dump(mode="json", exclude=unused_here) for source in data.sources],
                "rules": data.model_dump(mode="json", include=_RECORD_KEYS),
                "safety": sha256(Path(data.safety.rules)) if data.safety.rules else None,
                "inputs": [
                    [source.name, inputs_by_content(source, plan) if rehash else plan.inputs]
                    for source, plan in self.plans
                ],
                "cut": [len(self.work), self.shards],
            },
        )
        self.distinct: Artifact | None = None
        if data.near_duplicates.threshold is not None or data.decontaminate:
            evaluation = check_beir_folders(data.decontaminate, rehash)
            near = data.near_duplicates.model_dump(mode="json")
            inputs = [self.records.key, near, evaluation, data.decontaminate_threshold]
            self.distinct = Artifact(root, "distinct", inputs)
        self.texts = self.distinct or self.records
        """The stage whose records are tokenized."""
        self.tokenizer: Artifact | None = None
        if tokenizer.load_path is None:
            trained = tokenizer.model_dump(mode="json", include={"type", "vocab_size", "lowercase", "train_mb"})
            self.tokenizer = Artifact(root, "tokenizer", [self.texts.key, trained, self.fields])
            self.tokenizer_json = self.tokenizer.folder / "tokenizer.json"
            self._name_tokens(self.tokenizer.key)
        else:
            self.tokenizer_json = tokenizer_file(as_path(tokenizer.load_path))
            self._name_tokens(sha256(self.tokenizer_json))
        pinned, then = pinned_tokenizer(self.config), TrainedOn.read(self.config)
        if pinned and then and then.prepared != f"prepared/{self.prepared.folder.name}":
            self.tokenizer, self.tokenizer_json = None, pinned
            self._name_tokens(sha256(pinned))

    def _name_tokens(self, tokenizer_key: str) -> None:
        config = self.config
        data = config.data.model_dump(mode="json", exclude={"prepared"})
        self.tokens = tokens_of(config.root / "stages", self.texts.key, tokenizer_key, self.recipe)
        self.prepared = Artifact(
            config.root / "prepared", "", [self.tokens.key, data, config.tokenizer.model_dump(mode="json")]
        )


def prepare(config: Config, progress: Callable[[], Progress], rehash: bool = False) -> tuple[StoragePath, Manifest]:
    """Bring the prepared data up to date. Returns its folder and manifest. Calls `progress` only if there is work.

    `rehash`: identify inputs by content instead of modification time. With `data.prepared`, nothing is prepared: that
    data set is used as it is.
    """
    if config.data.prepared is not None:
        return open_prepared(config)
    inputs = Inputs(config, rehash)
    folder = inputs.prepared.folder
    if inputs.prepared.read():
        log.info("prepare: nothing to do, %s is up to date", folder)
    else:
        raise_findings([inputs.room])
        inputs.prepared.make(_StageRunner(inputs, progress).run)
    manifest = read_prepared(folder)
    assert manifest
    return folder, manifest


def open_prepared(config: Config) -> tuple[StoragePath, Manifest]:
    """The data set that `data.prepared` names. Raises ConfigError if it is missing or has other settings."""
    folder = config.root / str(config.data.prepared)
    manifest = read_prepared(folder)
    if manifest is None:
        raise ConfigError(
            f"data.prepared: found no manifest.json of a prepared data set in {folder}; give a folder that "
            f"{command('prepare', [])} or {command('mine', [])} has written"
        )
    for key, value in manifest.settings.items():
        if config.get(key) != value:
            raise ConfigError(f"{key}: found {config.get(key)}; set {value}, with which {folder} was prepared")
    prepared = {source.name: source.prompts for source in manifest.sources}
    found = {source.name: source.model_dump()["prompts"] for source in config.data.sources}
    if found != prepared:
        raise ConfigError(
            f"data.sources: found {_named(found)}; set {_named(prepared)}, with which {folder} was prepared"
        )
    return folder, manifest


def _named(prompts: dict[str, dict[str, str]]) -> str:
    return ", ".join(f"{name} with prompts {of}" if of else name for name, of in prompts.items())


@dataclass(frozen=True)
class _StageRunner:
    """Runs the missing stages, and assembles the prepared data set."""

    inputs: Inputs
    progress: Callable[[], Progress]

    def run(self) -> dict[str, Any]:
        """The prepared data set's manifest, without `files`."""
        inputs, config = self.inputs, self.inputs.config
        sources, clusters = self.distinct(self.records())
        self.tokenizer()
        files, tokenizer_json = inputs.record_files(inputs.texts), inputs.tokenizer_json
        recipe = replace(inputs.recipe, validation_fraction=_held_out_fraction(config, files, sources))

        def tokenize() -> dict[str, Any]:
            series = series_of(config, recipe, tokenizer_json)
            return token_shards(inputs.tokens, self.progress(), files, recipe, tokenizer_json, series)

        described = _make(inputs.tokens, tokenize)
        by_name = {source.name: source for source in config.data.sources}
        sources = [
            replace(count, weight=by_name[count.name].weight, prompts=by_name[count.name].model_dump()["prompts"])
            for count in sources
        ]
        rejected = {
            f"{stage.name}-{path.name}": path
            for stage in filter(None, (inputs.records, inputs.distinct))
            for path in sorted_glob(stage.folder / "rejected", "*.parquet")
        }
        fraction = config.data.validation_fraction
        parts = PreparedParts(files, tokenizer_json, recipe, sources, clusters, fraction, rejected)
        manifest = assemble(inputs.prepared, inputs.tokens, described, parts)
        if clusters:
            listed = ", ".join(f"{cluster['source_id']} ({cluster['removed']:,})" for cluster in clusters)
            log.info("prepare: records with the most near-duplicates removed: %s", listed)
        seconds = {stage.name: (stage.read() or {}).get("seconds", 0.0) for stage in inputs.stages}
        log_lines(_summary(manifest, seconds))
        return asdict(manifest)

    def records(self) -> list[SourceCount]:
        """Read, filter and deduplicate every source. Returns the checked counts of each."""
        stage, data = self.inputs.records, self.inputs.config.data

        def fill() -> dict[str, Any]:
            found = make_records(stage, self.progress(), self.inputs.plans, data, self.inputs.shards)
            check_sources(found, data, stage.folder)
            return {"sources": [vars(source) for source in found]}

        found = [SourceCount(**source) for source in _make(stage, fill)["sources"]]
        check_sources(found, data, stage.folder)
        warn_of_bad_input(found, stage.folder)
        check_duplicates(found, data.max_removed_fraction)
        return found

    def distinct(self, sources: list[SourceCount]) -> tuple[list[SourceCount], list[dict[str, Any]]]:
        """Remove near-duplicates and evaluation texts. Returns the counts of each source, and the largest clusters."""
        stage, data = self.inputs.distinct, self.inputs.config.data
        if stage is None:
            return sources, []

        def fill() -> dict[str, Any]:
            files = self.inputs.record_files(self.inputs.records)
            near = near_duplicates.find_duplicates(stage, self.progress(), files, data)
            check_duplicates(sources, data.max_removed_fraction, near)
            outcomes = near_duplicates.write_distinct(stage, self.progress(), files)
            return {"outcomes": outcomes, "clusters": near_duplicates.largest_clusters(stage)}

        made = _make(stage, fill)
        found = [after_stage(source, made["outcomes"]) for source in sources]
        check_duplicates(found, data.max_removed_fraction)
        check_sources(found, data, stage.folder)
        return found, made["clusters"]

    def tokenizer(self) -> None:
        """Train a tokenizer, unless the config gives one."""
        inputs, stage, options = self.inputs, self.inputs.tokenizer, self.inputs.config.tokenizer
        if stage is None:
            return
        files, fields = inputs.record_files(inputs.texts), inputs.fields

        def train(_: int, output: Output) -> None:
            texts = _counted(record_texts(files, fields, options.train_mb << 20), output)
            kind, lowercase = options.type, options.lowercase
            trained = train_tokenizer(texts, kind=kind, vocab_size=options.vocab_size, lowercase=lowercase)
            output.write("tokenizer.json", trained.to_str().encode())

        def fill() -> dict[str, Any]:
            sample = min(text_bytes_of(files, fields), options.train_mb << 20)
            stage.tasks(self.progress(), "prepare: train the tokenizer", [sample], train)
            return {}

        _make(stage, fill)


def _counted(texts: Iterator[str], output: Output) -> Iterator[str]:
    """The texts; reports how much of the tokenizer's training is done while they are read."""
    done = 0
    for number, text in enumerate(texts, 1):
        done += len(text)
        if number % REPORT_TEXTS == 0:
            output.advance(READING_SHARE * min(1.0, done / max(output.size, 1)))
        yield text


def _held_out_fraction(config: Config, files: list[StoragePath], sources: list[SourceCount]) -> float:
    """The share of records to hold out; on small data, more than the config says if it says too little."""
    fraction, rows = config.data.validation_fraction, sum(source.rows_kept for source in sources)
    if rows > SMALL_ROWS:
        return fraction
    ids = [each for file in files for each in open_parquet(file).read(columns=["id"])["id"].to_pylist()]
    found = held_out_fraction(ids, fraction)
    if found != fraction:
        held_out, few = (sum(is_validation(each, share) for each in ids) for share in (found, fraction))
        log.info(
            "prepare: holding out %d of %d records for validation, because data.validation_fraction=%g holds out %d",
            *(held_out, rows, fraction, few),
        )
    return found


def _make(stage: Artifact, fill: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a stage if it is not complete. Returns its manifest, with the seconds that it took."""

    def timed() -> dict[str, Any]:
        began = time.monotonic()
        return fill() | {"seconds": round(time.monotonic() - began, 1)}

    if stage.read():
        log.info("prepare: %s is up to date, from an earlier job", stage.name)
    return stage.make(timed)


def _plans(config: Config) -> list[tuple[Source, SourcePlan]]:
    """Each source with its plan. Raises one ConfigError for all sources that cannot be read as the config says."""
    plans, errors = [], dict[str, None]()  # what is wrong with the rules is the same for all sources
    for source in config.data.sources:
        try:
            plans.append((source, plan_source(source)))
            check_fields(source)
            Filter(source, config.data)
        except ConfigError as error:
            errors[str(error)] = None
    if errors:
        raise ConfigError("; ".join(errors))
    return plans


def _common_fields(config: Config) -> list[str]:
    """The text fields of the records. All sources must have the same ones, except that negatives are optional."""
    shapes = {source.name: text_fields(source) for source in config.data.sources}
    if len({fields[0] for fields in shapes.values()}) > 1:
        listed = "; ".join(f"{name} has {' and '.join(fields)}" for name, fields in shapes.items())
        raise ConfigError(f"data.sources: {listed}; give sources with the same fields, all pairs or all texts")
    return max(shapes.values(), key=len)


def _shards(source: Source, plan: SourcePlan) -> int:
    by_text = math.ceil(plan.text_bytes / SHARD_BYTES)
    return min(by_text, math.ceil(source.max_samples / ROW_GROUP_ROWS)) if source.max_samples else by_text


def _summary(manifest: Manifest, seconds: dict[str, float]) -> str:
    """Tables of record counts by outcome, of token statistics, and of the seconds of each stage."""
    sources = manifest.sources
    reasons = sorted({reason for source in sources for reason in source.rejected})
    rows: list[tuple[str, list[int]]] = [
        ("in", [source.rows_in for source in sources]),
        ("kept", [source.rows_kept for source in sources]),
        *((reason, [source.rejected.get(reason, 0) for source in sources]) for reason in reasons),
    ]
    sums = [[name, *cells, sum(cells)] if len(sources) > 1 else [name, *cells] for name, cells in rows]
    counts = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in sums]
    header = ("records", *(source.name for source in sources), *(["all"] if len(sources) > 1 else []))
    tokens = [
        [
            name,
            *(f"{length[key]:,.0f}" for key in ("rows", "tokens", "mean", "p50", "p95", "max")),
            f"{length['truncation_rate']:.1%}",
            f"{length['unknown_rate']:.2%}",
        ]
        for name, length in manifest.lengths.items()
    ]
    return "\n\n".join(
        [
            table(counts, header),
            table(tokens, ("field", "rows", "tokens", "mean", "p50", "p95", "max", "longer", "unknown")),
            table([[name, f"{value:,.1f}"] for name, value in seconds.items()], ("stage", "seconds")),
        ]
    )
