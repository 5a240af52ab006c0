"""Collects what is known of a run from its files, for the report. What is missing is empty, and nothing is computed.

    facts = collect(config)                # of the run that the config names
    facts.manifest.sources, facts.metrics, facts.evaluation["comparisons"], facts.examples["held-out"]
    inputs(config)                         # size and hash of each file that the report shows

Examples of rejected records come from the data set's `rejected/`, a few for each reason. Cost: reading the run's small
files, and rejected records until each reason has its examples, at most REJECTED_ROWS of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.core.artifact import open_parquet
from pipeline.core.console import LOG_NAME
from pipeline.core.files import files_below, sorted_glob, xxh3_of
from pipeline.core.job_record import read_job_records
from pipeline.core.path import StoragePath
from pipeline.data.drift import TrainedOn
from pipeline.data.manifest import Manifest, read_prepared
from pipeline.evaluation.job import artifact_of
from pipeline.evaluation.report import hybrid_verdict
from pipeline.training.history import Row, read_rows

EXAMPLES_PER_REASON = 3
REJECTED_ROWS = 1_000_000
MAP = "map.json"
TRUNCATED = 0.2  # a warning if more of the texts are cut. Ours
FILES = ("config.resolved.yaml", "run.json", "metrics.jsonl", "alerts.jsonl", "evaluation.json", MAP)
"""Of the run's folder."""


@dataclass(frozen=True)
class Facts:
    """What the report shows of one run."""

    name: str
    folder: StoragePath
    settings: dict[str, Any] = field(default_factory=dict)  # config.resolved.yaml
    run: dict[str, Any] = field(default_factory=dict)  # run.json
    state: dict[str, Any] = field(default_factory=dict)  # state.json of the newest checkpoint
    prepared: StoragePath | None = None
    manifest: Manifest | None = None
    rejected: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    alerts: list[Row] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    map: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Any]:
        found: dict[str, Any] = self.evaluation.get("scores", {})
        return found

    @property
    def steps(self) -> int:
        """The last step of the run; 0 before it is trained."""
        return int(self.run.get("steps", 0))

    def warnings(self) -> list[str]:
        """What a reader should know: alerts, cut texts, a hybrid search that is worse, an unmet gate."""
        found = [str(sentence) for sentence in self.evaluation.get("not_beaten", [])]
        for name, length in (self.manifest.lengths if self.manifest else {}).items():
            if length["truncation_rate"] > TRUNCATED:
                limit = self.settings.get("tokenizer", {}).get("max_length")
                found.append(
                    f"{length['truncation_rate']:.0%} of the texts in {name} are longer than tokenizer.max_length="
                    f"{limit}, and only their beginning counts."
                )
        worse = hybrid_verdict(self.scores)
        return [*found, *([f"{worse[0].upper()}{worse[1:]}."] if worse else []), *(row["text"] for row in self.alerts)]


def collect(config: Config) -> Facts:
    """What is known of the config's run."""
    folder = config.run_dir
    run, resolved = _json(folder / "run.json"), folder / "config.resolved.yaml"
    settings = yaml.safe_load(resolved.read_text(encoding="utf-8")) if resolved.is_file() else config.dump()
    then, evaluation = TrainedOn.read(config), _json(folder / "evaluation.json")
    prepared = config.root / then.prepared if then else None
    manifest = read_prepared(prepared) if prepared else None
    scored = artifact_of(folder, evaluation["of"]) if "of" in evaluation else None
    return Facts(
        name=config.storage.run,
        folder=folder,
        settings=settings,
        run=run,
        state=_newest_state(folder),
        prepared=prepared,
        manifest=manifest,
        rejected=rejected_examples(prepared, manifest) if prepared and manifest else [],
        metrics=read_rows(folder / "metrics.jsonl"),
        alerts=read_rows(folder / "alerts.jsonl"),
        evaluation=evaluation,
        examples=_json(scored.folder / "examples.json") if scored else {},
        jobs=read_job_records(folder),
        map=_json(folder / MAP),
    )


def inputs(config: Config) -> dict[str, Any]:
    """Size and hash of each file that the report shows, and the names of checkpoints and of jobs."""
    folder = config.run_dir
    found = [folder / name for name in FILES if (folder / name).is_file()]
    return {
        "files": {path.name: [path.stat().st_size, xxh3_of(path)] for path in found},
        "others": sorted(
            name for name in files_below(folder) if name.endswith("/state.json") or name.startswith("jobs/")
        ),
    }


def exists(config: Config) -> bool:
    """Whether the run's folder has more than the log of jobs that failed."""
    return any(not name.startswith((LOG_NAME, "jobs/")) for name in files_below(config.run_dir))


def rejected_examples(prepared: StoragePath, manifest: Manifest) -> list[dict[str, Any]]:
    """A few rejected records for each source and reason: source, reason, source_id, excerpt, duplicate_of."""
    missing = {
        (source.name, reason): min(rows, EXAMPLES_PER_REASON)
        for source in manifest.sources
        for reason, rows in source.rejected.items()
    }
    found, read = [], 0
    for path in sorted_glob(prepared / "rejected", "*.parquet"):
        if not any(missing.values()) or read > REJECTED_ROWS:
            break
        file = open_parquet(path)
        read += file.metadata.num_rows
        for batch in file.iter_batches(8192, columns=["source", "reason", "source_id", "excerpt", "duplicate_of"]):
            for row in batch.to_pylist():
                key = (row["source"], row["reason"])
                if missing.get(key):
                    missing[key] -= 1
                    found.append(row)
    return sorted(found, key=lambda row: (row["source"], row["reason"], row["source_id"]))


def _newest_state(run_dir: StoragePath) -> dict[str, Any]:
    """The state of the newest checkpoint that has one; its weights are not checked."""
    folders = reversed(sorted_glob(run_dir, "attempt-[0-9]*/step-*[0-9]"))
    return next((state for folder in folders if (state := _json(folder / "state.json"))), {})


def _json(path: StoragePath) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
