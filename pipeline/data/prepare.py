"""Raw text to token shards, in stages that Ray Data spreads over the cluster.

    records ──────────────► distinct ───────────────► tokenizer ──► tokens ──────► manifest
    read, judge,            near-duplicates and       one task      a task a file  last
    exact duplicates        evaluation texts out

Every file's rows follow from content alone, so the shards are byte-identical for any number of workers. Each stage is
an artifact (runtime/artifact.py): a changed option redoes the stages that depend on it, and a killed job resumes with
the tasks that were not done. The prepared data set is an artifact too, made of the stages' files.

Once a run has begun, its tokenizer stays: later data are tokenized with it, so that they fit the model (drift.py), and
records that were there before keep their tokens (shards.py).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, Source
from pipeline.data import contamination, near_duplicates
from pipeline.data.drift import TrainedOn, pinned_tokenizer
from pipeline.data.judging import Judge
from pipeline.data.manifest import Manifest, SourceCount, read_prepared, sha256
from pipeline.data.records import make_records, record_texts
from pipeline.data.report import check_duplicates, check_sources, log_clusters, summary_table, warn_of_bad_input
from pipeline.data.shards import Parts, assemble, recipe_of, series_of, token_shards, tokens_of
from pipeline.data.tokenizing import ROW_GROUP_ROWS, Cutter
from pipeline.data.vocabulary import load_tokenizer, tokenizer_file, train_tokenizer
from pipeline.runtime.artifact import Artifact, Output
from pipeline.runtime.console import log
from pipeline.runtime.findings import Finding, refuse, room
from pipeline.runtime.session import Progress
from pipeline.sources.content import inputs_by_content
from pipeline.sources.source import Plan, check_fields, plan_source, text_fields
from pipeline.storage.files import matching, sizes
from pipeline.storage.path import StoragePath, as_path

FORMAT = 3  # of prepared data; a change of what the stages write makes all earlier folders stale
SHARD_BYTES = 8 << 20  # text a shard stands for: a core tokenizes it in seconds
MAX_SHARDS = 4_096  # larger ones beyond 32 GB: each meets every part of the exchange
DISK_A_TEXT_BYTE = 1.7  # that all stages take at their most: 40.0 MB of 23.5 MB of Debian's descriptions. Ours
_RECORD_KEYS = {"min_chars", "max_chars", "max_nonprintable", "sanitize", "safety", "quality"}


class Inputs:
    """What would be prepared under a config: the tasks, the stages and the folder they lead to. Raises ConfigError."""

    def __init__(self, config: Config, rehash: bool = False) -> None:
        self.fields = _common_fields(config)
        if config.tokenizer.long_texts == "windows" and self.fields != ["text"]:
            raise ConfigError(
                f"tokenizer.long_texts: found windows with records of {', '.join(self.fields)}; "
                "allowed is windows with records of text alone"
            )
        self.recipe = recipe_of(config, self.fields)
        if config.tokenizer.load_path is not None:
            Cutter(load_tokenizer(as_path(config.tokenizer.load_path)), self.recipe)
        self.plans: list[tuple[Source, Plan]] = [(source, plan_source(source)) for source in config.data.sources]
        for source in config.data.sources:
            check_fields(source)
            Judge(source, config.data)
        self.work = [(source, task) for source, plan in self.plans for task in plan.tasks]
        self.shards = max(1, min(MAX_SHARDS, sum(_shards(source, plan) for source, plan in self.plans)))
        self._name_stages(config, rehash)

    @property
    def room(self) -> Finding:
        """Whether there is room to prepare them."""
        return room(
            "storage.root", self.prepared.folder, DISK_A_TEXT_BYTE * sum(p.text_bytes for _, p in self.plans), "prepare"
        )

    def _name_stages(self, config: Config, rehash: bool) -> None:
        data, tokenizer, root = config.data, config.tokenizer, config.root / "stages"
        unread = {"weight", "prompts"}
        self.records = Artifact(
            root,
            "records",
            {
                "format": FORMAT,
                "sources": [source.model_dump(mode="json", exclude=unread) for source in data.sources],
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
            evaluation = contamination.check_folders(data.decontaminate, rehash)
            near = data.near_duplicates.model_dump(mode="json")
            self.distinct = Artifact(
                root, "distinct", [self.records.key, near, evaluation, data.decontaminate_threshold]
            )
        source_of_texts = (self.distinct or self.records).key
        self.tokenizer: Artifact | None = None
        if tokenizer.load_path is None:
            trained = tokenizer.model_dump(mode="json", include={"type", "vocab_size", "lowercase", "train_mb"})
            self.tokenizer = Artifact(root, "tokenizer", [source_of_texts, trained, self.fields])
            self.tokenizer_json = self.tokenizer.folder / "tokenizer.json"
            self._name_tokens(config, source_of_texts, self.tokenizer.key)
        else:
            self.tokenizer_json = tokenizer_file(as_path(tokenizer.load_path))
            self._name_tokens(config, source_of_texts, sha256(self.tokenizer_json))
        pinned, then = pinned_tokenizer(config), TrainedOn.read(config)
        if pinned and then and then.prepared != f"prepared/{self.prepared.folder.name}":
            self.tokenizer, self.tokenizer_json = None, pinned
            self._name_tokens(config, source_of_texts, sha256(pinned))

    def _name_tokens(self, config: Config, source_of_texts: str, tokenizer_key: str) -> None:
        data, tokenizer = config.data.model_dump(mode="json", exclude={"prepared"}), config.tokenizer
        self.tokens = tokens_of(config.root / "stages", source_of_texts, tokenizer_key, self.recipe)
        whole = [self.tokens.key, data, tokenizer.model_dump(mode="json")]
        self.prepared = Artifact(config.root / "prepared", "", whole)


def prepare(config: Config, progress: Callable[[], Progress], rehash: bool = False) -> tuple[StoragePath, Manifest]:
    """Bring the prepared data up to date. Returns its folder and manifest; asks for the `progress` if there is work.

    With `rehash`, inputs are known by their content rather than by their times of change. `data.prepared` is taken as
    it is.
    """
    if config.data.prepared is not None:
        return prepared_elsewhere(config)
    inputs = Inputs(config, rehash)
    folder = inputs.prepared.folder
    if inputs.prepared.read():
        log.info("prepare: nothing to do, %s is up to date", folder)
    else:
        _refuse_older(config.root)
        refuse([inputs.room])
        inputs.prepared.make(lambda: _fill(inputs, config, progress))
    manifest = read_prepared(folder)
    assert manifest
    return folder, manifest


def _refuse_older(root: StoragePath) -> None:
    """Raise ConfigError for stages of a version that noted what was done in another way."""
    if older := matching(root, "stages/*/done.json"):
        raise ConfigError(
            f"storage.root: found {older[0].parent}, which an earlier version wrote; delete {root / 'stages'} and "
            f"{root / 'prepared'}, and run the same command again"
        )


def _fill(inputs: Inputs, config: Config, progress: Callable[[], Progress]) -> dict[str, Any]:
    sources = _records(inputs, config, progress)
    sources, clusters = _distinct(inputs, config, progress, sources)
    _tokenizer(inputs, config, progress)
    files, recipe, tokenizer = _record_files(inputs), inputs.recipe, inputs.tokenizer_json

    def tokenize() -> dict[str, Any]:
        series = series_of(config, recipe, tokenizer)
        return token_shards(inputs.tokens, progress(), files, recipe, tokenizer, series)

    described = _made(inputs.tokens, tokenize)
    manifest = _assemble(inputs, config, sources, clusters, described)
    log_clusters(clusters)
    log.info("%s", summary_table(manifest, _seconds(inputs)))
    return asdict(manifest)


def prepared_elsewhere(config: Config) -> tuple[StoragePath, Manifest]:
    """The data set that `data.prepared` names. Raises ConfigError where it is none, or of other settings or sources."""
    folder = config.root / str(config.data.prepared)
    manifest = read_prepared(folder)
    if manifest is None:
        raise ConfigError(
            f"data.prepared: found no manifest.json of a prepared data set in {folder}; allowed is a folder that "
            "jobs/prepare.py or jobs/mine.py has written"
        )
    for key, value in manifest.settings.items():
        if config.get(key) != value:
            raise ConfigError(f"{key}: found {config.get(key)}; allowed with data.prepared is {value}, as in {folder}")
    own = {source.name: source.prompts for source in manifest.sources}
    found = {source.name: source.model_dump()["prompts"] for source in config.data.sources}
    if found != own:
        raise ConfigError(
            f"data.sources: found {_named(found)}; allowed with data.prepared are {_named(own)}, as in {folder}"
        )
    return folder, manifest


def _named(prompts: dict[str, dict[str, str]]) -> str:
    return ", ".join(f"{name} with prompts {of}" if of else name for name, of in prompts.items())


def _stages(inputs: Inputs) -> list[Artifact]:
    return [stage for stage in (inputs.records, inputs.distinct, inputs.tokenizer, inputs.tokens) if stage]


def _made(stage: Artifact, fill: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A stage's manifest, which has the seconds that it took."""

    def timed() -> dict[str, Any]:
        began = time.monotonic()
        return fill() | {"seconds": round(time.monotonic() - began, 1)}

    if stage.read():
        log.info("prepare: %s are there from an earlier job", stage.name)
    return stage.make(timed)


def _record_files(inputs: Inputs) -> list[StoragePath]:
    return [(inputs.distinct or inputs.records).folder / "records" / f"{i:05d}.parquet" for i in range(inputs.shards)]


def _records(inputs: Inputs, config: Config, progress: Callable[[], Progress]) -> list[SourceCount]:
    """Read, judge and deduplicate every source. Returns what became of each, checked."""
    stage = inputs.records

    def fill() -> dict[str, Any]:
        found = make_records(stage, progress(), inputs.work, config.data, inputs.shards)
        check_sources(found, config.data, stage.folder)
        return {"sources": [vars(source) for source in found]}

    found = [SourceCount(**source) for source in _made(stage, fill)["sources"]]
    check_sources(found, config.data, stage.folder)
    warn_of_bad_input(found, stage.folder)
    check_duplicates(found, config.data.max_removed_fraction)
    return found


def _distinct(
    inputs: Inputs, config: Config, progress: Callable[[], Progress], sources: list[SourceCount]
) -> tuple[list[SourceCount], list[dict[str, Any]]]:
    """Take near-duplicates and evaluation texts out. Returns what became of each source, and the largest clusters."""
    stage = inputs.distinct
    if stage is None:
        return sources, []

    def fill() -> dict[str, Any]:
        files = [inputs.records.folder / "records" / f"{i:05d}.parquet" for i in range(inputs.shards)]
        near = near_duplicates.find(stage, progress(), files, config.data)
        check_duplicates(sources, config.data.max_removed_fraction, near)
        outcomes = near_duplicates.write_distinct(stage, progress(), files)
        return {"outcomes": outcomes, "clusters": near_duplicates.largest_clusters(stage)}

    made = _made(stage, fill)
    found = [_after(source, Counter(made["outcomes"].get(source.name, {}))) for source in sources]
    check_duplicates(found, config.data.max_removed_fraction)
    check_sources(found, config.data, stage.folder)
    return found, made["clusters"]


def _after(source: SourceCount, outcome: Counter[str]) -> SourceCount:
    """A source's count after a stage that took more of its records out."""
    kept = outcome.pop("kept", 0)
    return replace(source, rows_kept=kept, rejected=dict(sorted((Counter(source.rejected) + outcome).items())))


def _tokenizer(inputs: Inputs, config: Config, progress: Callable[[], Progress]) -> None:
    """Train a tokenizer where none was given."""
    stage, wanted = inputs.tokenizer, config.tokenizer
    if stage is None:
        return
    files, fields = _record_files(inputs), inputs.fields

    def train(_: int, output: Output) -> None:
        texts = record_texts(files, fields, wanted.train_mb << 20)
        trained = train_tokenizer(texts, kind=wanted.type, vocab_size=wanted.vocab_size, lowercase=wanted.lowercase)
        output.write("tokenizer.json", trained.to_str().encode())

    def fill() -> dict[str, Any]:
        sample = min(sum(filter(None, sizes(files))), wanted.train_mb << 20)
        stage.tasks(progress(), "prepare: train the tokenizer", [sample], train)
        return {}

    _made(stage, fill)


def _seconds(inputs: Inputs) -> dict[str, float]:
    return {stage.name: (stage.read() or {}).get("seconds", 0.0) for stage in _stages(inputs)}


def _assemble(
    inputs: Inputs,
    config: Config,
    sources: list[SourceCount],
    clusters: list[dict[str, Any]],
    described: dict[str, Any],
) -> Manifest:
    ways = {source.name: source for source in config.data.sources}
    sources = [
        replace(source, weight=ways[source.name].weight, prompts=ways[source.name].model_dump()["prompts"])
        for source in sources
    ]
    rejected = {
        f"{stage.name}-{path.name}": path
        for stage in filter(None, (inputs.records, inputs.distinct))
        for path in matching(stage.folder / "rejected", "*.parquet")
    }
    parts = Parts(_record_files(inputs), inputs.tokenizer_json, inputs.recipe, sources, clusters, rejected)
    return assemble(inputs.prepared, inputs.tokens, described, parts)


def _common_fields(config: Config) -> list[str]:
    """The text fields that all sources give; one prepared set has one shape, negatives or not."""
    shapes = {source.name: text_fields(source) for source in config.data.sources}
    if len({fields[0] for fields in shapes.values()}) > 1:
        listed = "; ".join(f"{name} gives {' and '.join(fields)}" for name, fields in shapes.items())
        raise ConfigError(f"data.sources: {listed}; allowed are sources of one shape")
    return max(shapes.values(), key=len)


def _shards(source: Source, plan: Plan) -> int:
    by_text = math.ceil(plan.text_bytes / SHARD_BYTES)
    return min(by_text, math.ceil(source.max_samples / ROW_GROUP_ROWS)) if source.max_samples else by_text
