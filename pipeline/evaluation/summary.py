"""What a person reads at the end of a job: what was done, how good it is, what to look at, and how to go on.

    print(summary("run", config, result))

    Trained on 119,066 pairs (packages): 908 steps of 512 pairs in 1.9 min; a token table without layers.

    <the table of scores>

    On held-out the model is better than BM25: NDCG@10 0.686, and 0.480 for BM25; …

    Look at:
      - 48% of the texts in `positive` are longer than 128 tokens and were cut; to keep more, raise tokenizer.max_length
    …

Reads the run's small files only: run.json, the data's manifest, metrics.jsonl, evaluation.json.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.core.console import duration, number, table
from pipeline.core.outcome import Result, command
from pipeline.core.path import as_path
from pipeline.data.drift import TrainedOn
from pipeline.data.feed import FEW_PAIRS
from pipeline.data.manifest import Manifest, read_prepared
from pipeline.evaluation.report import hybrid_verdict, score_table

MANY_CUT = 0.1  # share of texts that are longer than max_length. Ours
OVERFITTED = 5.0  # validation loss / training loss, each as a share of a random model's. Ours
FOLDERS = ("prepared", "model", "store", "scores", "history", "report", "best")
NO_SCORE = (
    "Nothing was scored. A score needs sources with pairs (anchor and positive) and evaluation.held_out_queries above "
    "0, or evaluation.beir_dir=DIR with queries and judgements, or evaluation.sts_file=FILE with rated sentences."
)


def summary(job: str, config: Config, result: Result) -> str:
    """The text for a job's result; paragraphs separated by blank lines."""
    parts = _parts_of(job, config, result)
    return "\n\n".join(part for part in parts if part)


def _parts_of(job: str, config: Config, result: Result) -> Iterator[str]:
    run = _Run.of(config, result.paths.get("prepared"))
    of_stage = result.metrics.get if job == "run" else lambda name: result.metrics if name == job else None
    if (prepared := of_stage("prepare")) is not None and job == "prepare":
        yield _prepared(prepared, run)
    if (trained := of_stage("train")) is not None:
        yield _trained(config, trained, run)
    scores = of_stage("evaluate")
    if scores is not None:
        yield score_table(scores) if scores else NO_SCORE
        yield "\n".join(_verdicts(config))
    if job == "tune":
        yield str(Result(result.metrics))
    if (embedded := of_stage("embed")) is not None:
        yield _embedded(config, embedded)
    if notes := list(_notes(job, config, run, scores)):
        yield "Look at:\n" + "\n".join(f"  - {note}" for note in notes)
    if rows := [(name, result.paths[name]) for name in FOLDERS if name in result.paths]:
        yield table([*rows, ("log and run", str(config.run_dir))], ("what", "where"))
    yield "Next:\n" + "\n".join(f"  {each}    # {why}" for each, why in _next_commands(job, result))


@dataclass(frozen=True)
class _Run:
    """What the run's folder says: its data, and the rows of its history."""

    manifest: Manifest | None
    begun: dict[str, Any]
    """The keys that stay as the run began, such as model.num_layers."""
    sources: str
    history: list[dict[str, Any]]

    @classmethod
    def of(cls, config: Config, prepared: str | None) -> _Run:
        then, path = TrainedOn.read(config), config.run_dir / "metrics.jsonl"
        folder = as_path(prepared) if prepared else config.root / then.prepared if then else None
        manifest = read_prepared(folder) if folder else None
        begun = json.loads((config.run_dir / "run.json").read_text())["fixed"] if then else {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        names = ", ".join(source.name for source in (manifest.sources if manifest else config.data.sources))
        return cls(manifest, begun, names, [json.loads(line) for line in lines if line.endswith("}")])

    def values(self, name: str) -> list[float]:
        """A metric's values that are finite, in the order of the steps."""
        return [row[name] for row in self.history if math.isfinite(row.get(name, math.nan))]

    def last(self, name: str, rows: int = 1) -> float | None:
        """The mean of a metric's last values."""
        values = self.values(name)[-rows:]
        return sum(values) / len(values) if values else None

    @property
    def unit(self) -> str:
        return self.manifest.unit if self.manifest else "records"


def _prepared(metrics: Mapping[str, Any], run: _Run) -> str:
    splits = metrics["splits"]
    return (
        f"Prepared {metrics['rows_kept']:,} of {metrics['rows_in']:,} records ({run.sources}), {metrics['tokens']:,} "
        f"tokens: {splits['train']:,} to train on, {splits['validation']:,} held out."
    )


def _trained(config: Config, metrics: Mapping[str, Any], run: _Run) -> str:
    rows, batch = run.manifest.splits["train"] if run.manifest else 0, config.training.global_batch_size
    records = f"{rows:,} {run.unit}" if rows else "data that are gone"
    size = f" of {batch:,} {run.unit}" if rows >= batch else ""
    speed = run.last("pairs_per_s", rows=10)
    at = f", {speed:,.0f} {run.unit}/s at the end" if speed else ""
    return (
        f"Trained on {records} ({run.sources}): {metrics['step']:,} steps{size} in "
        f"{duration(metrics['train_seconds'])}{at}. The model is {_model(config, run.begun)}."
    )


def _model(config: Config, begun: Mapping[str, Any]) -> str:
    if config.model.pretrained:
        return f"{config.model.pretrained}, fine-tuned"
    shape = config.model.dimensions()
    layers = begun.get("model.num_layers")
    layers = shape["num_layers"] if layers is None else layers
    kind = f"{layers} transformer layer{'s' * (layers > 1)}" if layers else "a token table without layers"
    return f"{kind}, of width {shape['d_model']:,}"


def _verdicts(config: Config) -> Iterator[str]:
    """What the last evaluation says in sentences."""
    path = config.run_dir / "evaluation.json"
    if path.is_file():
        yield from (each["sentence"] for each in json.loads(path.read_text(encoding="utf-8")).get("comparisons", []))


def _embedded(config: Config, metrics: Mapping[str, Any]) -> str:
    rows, new = metrics.get("rows"), metrics.get("embedded")
    if rows is None or new is None:
        return ""
    return f"Embedded {new:,} texts; {rows:,} can be searched in {config.embedding.store}."


def _notes(job: str, config: Config, run: _Run, scores: Mapping[str, Any] | None) -> Iterator[str]:
    """What a user would want to know, each with the key to change."""
    if run.manifest and job in ("run", "prepare", "train"):
        yield from _of_data(config, run.manifest)
    if job in ("run", "train"):
        yield from _of_training(config, run)
    if scores and (worse := hybrid_verdict(dict(scores))):
        yield f"{worse}; search without --hybrid"


def _of_data(config: Config, manifest: Manifest) -> Iterator[str]:
    most = config.tokenizer.max_length
    for name, lengths in manifest.lengths.items():
        if lengths["truncation_rate"] >= MANY_CUT and config.tokenizer.long_texts == "truncate":
            yield (
                f"{lengths['truncation_rate']:.0%} of the texts in `{name}` are longer than {most} tokens and were "
                "cut; to keep more of them, raise tokenizer.max_length"
            )
    rows = manifest.splits["train"]
    if rows < FEW_PAIRS and manifest.holds_pairs and not config.model.pretrained:
        yield (
            f"{rows:,} pairs are few for a model from scratch; a pretrained model finds more, as in "
            f"{command('run', ['--config', 'fine_tune'])} with your data.sources"
        )


def _of_training(config: Config, run: _Run) -> Iterator[str]:
    trained, held_out = run.last("loss", rows=10), run.last("validation_loss")
    if not (run.manifest and trained and held_out and config.objective.contrastive):
        return
    # A contrastive loss grows with the candidates: that of a random model is the logarithm of their number.
    candidates = min(config.training.validation_pairs, run.manifest.splits["validation"])
    of_random = math.log(max(candidates, 2)) / math.log(config.training.global_batch_size)
    if held_out > OVERFITTED * trained * of_random:
        best = min(run.values("validation_loss"))
        advice = "more data may give a better one"
        if held_out > best:
            advice = (
                f"the validation loss was {number(round(best, 4))} before, so fewer training.max_epochs or "
                "training.early_stopping.patience=3 may give a better one"
            )
        yield (
            f"the training loss, {number(round(trained, 4))}, is far below the validation loss, "
            f"{number(round(held_out, 4))}: the model fits its training data much better than others; {advice}"
        )


def _next_commands(job: str, result: Result) -> list[tuple[str, str]]:
    """Three commands that make sense after a job, with what they do."""
    of_search = re.compile(r"(?!(storage|embedding|pinecone)\.)[a-z]+(\.\w+)+=")  # a search needs no others
    words = [word for word in shlex.split(command("search")) if not of_search.match(word)]
    search = shlex.join([*words, "what you look for"])
    every = {
        "search": (search, "ask the index"),
        "embed": (command("embed"), "embed the documents, to search them"),
        "evaluate": (command("evaluate"), "score the model beside BM25"),
        "train": (command("train"), "train a model on the data"),
        "run": (command("run"), "prepare, train, evaluate, embed: what is done is skipped"),
        "tune": (command("tune"), "look for better values of the config's keys"),
        "export": (f"{command('export')} --to exported", "a folder for sentence-transformers and transformers"),
        "map": (command("map"), "draw the vectors on a plane"),
        "best": (command("run", ["--config", result.paths.get("best", "")]), "train the best trial's model to its end"),
    }
    after = {
        "prepare": ("train", "run", "tune"),
        "train": ("evaluate", "embed", "export"),
        "evaluate": ("embed", "tune", "export"),
        "embed": ("search", "evaluate", "map"),
        "tune": ("best", "evaluate", "tune"),
    }
    return [every[name] for name in after.get(job, ("search", "export", "tune"))]
