"""Reads the runs under a storage root, and compares two of them.

    for run in find_runs(config.root):                      # the last changed first
        print(run.name, run.step, run.verdict)
    compare_runs(runs["a"], runs["b"])["config"]            # {"training.learning_rate": [0.001, 0.002]}

A run is a folder with run.json; the trials of a sweep are left out. Cost: one listing of all runs, three small files of
each, and a comparison of two data sets if they differ (data/drift.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import Model
from pipeline.core.aliases import read_aliases
from pipeline.core.console import log
from pipeline.core.files import disk_bytes, files_below
from pipeline.core.outcome import flatten
from pipeline.core.path import Stat, StoragePath
from pipeline.data.drift import Drift
from pipeline.data.manifest import read_prepared
from pipeline.evaluation.verdict import NAMES, compare

_RUN = re.compile(r"(.+)/run\.json")
_STEP = re.compile(r"(?:attempt-\d+|best)/step-(\d+)/.+")


@dataclass(frozen=True)
class Run:
    """A run's folder. `changed_s` is when a file in it last changed, in seconds since 1970."""

    root: StoragePath
    name: str
    settings: dict[str, Any]
    """config.resolved.yaml, perhaps of another version."""
    described: dict[str, Any]
    """`data_fingerprint`, `prepared` and `steps` of run.json."""
    evaluation: dict[str, Any]
    """evaluation.json; empty before the first evaluation."""
    step: int
    changed_s: float
    aliases: list[str]

    @property
    def folder(self) -> StoragePath:
        return self.root / "runs" / self.name

    @property
    def steps(self) -> int:
        return int(self.described["steps"])

    @property
    def model(self) -> str:
        """The model in a few words: what it began from, or its size."""
        try:
            settings = Model.model_validate(self.settings["model"])
        except ValidationError:
            return "of another version"
        if settings.pretrained:
            return settings.pretrained
        sizes = settings.dimensions()
        count = sizes["num_layers"]
        layers = f"{count} layer{'s' if count > 1 else ''}" if count else "token table"
        return f"{layers}, {sizes['d_model']} wide"

    @property
    def sources(self) -> list[str]:
        return [source["name"] for source in self.settings["data"]["sources"]]

    @cached_property
    def rows(self) -> int | None:
        """Records of its data; None if its prepared data are gone."""
        manifest = read_prepared(self.root / self.described["prepared"])
        return sum(manifest.splits.values()) if manifest else None

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Task → metric → the model's score."""
        scores = self.evaluation.get("scores", {})
        return {task: result["model"] for task, result in scores.items() if isinstance(result.get("model"), dict)}

    @property
    def verdict(self) -> str:
        """How the model compares on its first retrieval task: "better than BM25, worse than the base"."""
        found = [each for each in self.evaluation.get("comparisons", []) if each["other"] != "previous"]
        return ", ".join(
            f"{each['verdict']} {'from' if each['verdict'].startswith('not') else 'than'} {NAMES[each['other']]}"
            for each in found
            if each["task"] == found[0]["task"]
        )

    @cached_property
    def bytes(self) -> int:
        """The disk space of its folder."""
        return round(disk_bytes(self.folder))

    def queries(self) -> dict[str, dict[str, float]]:
        """Task → query → the model's NDCG@10, as last evaluated."""
        file = self.folder / self.evaluation.get("artifact", "") / "queries.json"
        tasks = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return {task: systems["model"] for task, systems in tasks.items()}


def find_runs(root: StoragePath) -> list[Run]:
    """All runs, the last changed first. Runs that cannot be read are skipped with a warning."""
    listed, aliases, found = files_below(root / "runs"), read_aliases(root), []
    names = sorted(match[1] for each in listed if "/tune/" not in each and (match := _RUN.fullmatch(each)))
    for name in names:
        inside = {each[len(name) + 1 :]: stat for each, stat in listed.items() if each.startswith(f"{name}/")}
        named = [alias for alias, content in aliases.items() if content["run"] == name]
        try:
            found.append(_read_run(root, name, inside, named))
        except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
            log.warning("skipping the run %s, which cannot be read: %s", name, str(error).partition("\n")[0])
    return sorted(found, key=lambda run: -run.changed_s)


def _read_run(root: StoragePath, name: str, inside: dict[str, Stat], aliases: list[str]) -> Run:
    folder = root / "runs" / name
    settings = yaml.safe_load((folder / "config.resolved.yaml").read_text("utf-8"))
    if not isinstance(settings, dict) or not {"data", "model", "logging"} <= settings.keys():
        raise ValueError("config.resolved.yaml is no config")
    described = json.loads((folder / "run.json").read_text("utf-8"))
    return Run(
        root,
        name,
        settings,
        {key: described[key] for key in ("data_fingerprint", "prepared", "steps")},
        json.loads((folder / "evaluation.json").read_text("utf-8")) if "evaluation.json" in inside else {},
        max((int(match[1]) for each in inside if (match := _STEP.fullmatch(each))), default=0),
        max(stat.st_mtime_ns for stat in inside.values()) / 1e9,
        aliases,
    )


def compare_runs(first: Run, second: Run) -> dict[str, Any]:
    """What differs: config as {key: [a, b]}, data as a sentence, scores as {task: {metric: [a, b]}}, and verdicts."""
    a, b = flatten(first.settings), flatten(second.settings)
    keys = [key for key in dict.fromkeys([*a, *b]) if key != "storage.run" and a.get(key) != b.get(key)]
    tasks = dict.fromkeys([*first.scores, *second.scores])
    scores = {
        task: {
            metric: [run.scores.get(task, {}).get(metric) for run in (first, second)]
            for metric in dict.fromkeys([*first.scores.get(task, {}), *second.scores.get(task, {})])
        }
        for task in tasks
    }
    return {
        "config": {key: [a.get(key), b.get(key)] for key in keys},
        "data": _data(first, second),
        "scores": scores,
        "verdicts": list(_verdicts(first, second)),
    }


def _data(first: Run, second: Run) -> str:
    if first.described["data_fingerprint"] == second.described["data_fingerprint"]:
        return "the same"
    folders = [run.root / run.described["prepared"] for run in (first, second)]
    gone = [str(folder) for folder in folders if read_prepared(folder) is None]
    return f"different; {gone[0]} is gone" if gone else str(Drift.between(*folders))


def _verdicts(first: Run, second: Run) -> Iterator[str]:
    """Whether the second run is better than the first, on each task for which both have scores of the same queries."""
    before, after = first.queries(), second.queries()
    for task in before:
        if before[task].keys() != after.get(task, {}).keys():
            continue
        found = compare(task, first.name, after[task], before[task])
        than = "from" if found.verdict.startswith("not") else "than"
        yield (
            f"On {task} {second.name} is {found.verdict} {than} {first.name}: NDCG@10 {found.model_ndcg:.3f}, "
            f"and {found.other_ndcg:.3f} for {first.name}; the difference is {found.difference:+.3f}, 95% interval "
            f"{found.low:+.3f} to {found.high:+.3f} ({found.queries:,} queries)."
        )
