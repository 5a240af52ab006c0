"""Which recipes make a model better: each beside its baseline, on the same queries, with a 95% interval.

examples:
  python benchmarks/recipes.py --data data                           # all rows, two hours on two cores
  python benchmarks/recipes.py --data data --only table --seeds 3
  python benchmarks/recipes.py --data data --storage runs            # keep the runs, and resume where this was stopped

Training data is from data/debian/train.jsonl. Scored are data/debian/beir, by NDCG@10, and data/sts_b/test.tsv, by
Spearman's correlation, with the records' normalisation. Each row is a run of jobs/train.py. The teacher, and the base
of pretrained models, is MiniLM from its package. All rows share a storage.root, so a data set is prepared, and encoded
by a teacher, once. Documents per second are of TextEncoder in one process, MiniLM and the row's model in turn.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpora import machine
from benchmarks.fine_tuning import minilm, ranked
from pipeline.config import load
from pipeline.core.console import table
from pipeline.data.filtering import normaliser
from pipeline.evaluation.metrics import bm25_ranking, ndcg_by_query, without_own_documents
from pipeline.evaluation.tasks import RetrievalTask, read_beir
from pipeline.evaluation.verdict import interval
from pipeline.model.scores import read_sts, spearman

FEW = 5_000  # records of each source for transformers, which takes them five to ten minutes a row
TIMED_DOCUMENTS, ROUNDS = 1_000, 3

Sources = tuple[dict[str, Any], ...]
PAIRS: Sources = ({"name": "pairs", "type": "json", "path": "debian/train.jsonl"},)
TEXTS: Sources = ({"name": "texts", "type": "json", "path": "debian/train.jsonl", "fields": {"text": "positive"}},)
MIXED: Sources = (
    *TEXTS,
    {"name": "titles", "type": "json", "path": "debian/train.jsonl", "fields": {"text": "anchor"}},
    {"name": "first", "type": "csv", "path": "sts_b/train.tsv", "fields": {"text": "sentence1"}},
    {"name": "second", "type": "csv", "path": "sts_b/train.tsv", "fields": {"text": "sentence2"}},
)


@dataclass(frozen=True)
class Row:
    """A run of a config. `beside` names the row that it is compared with."""

    name: str
    beside: str
    config: str | None = None
    """None: MiniLM as it is, BM25, or a merged model."""
    overrides: tuple[str, ...] = ()
    sources: Sources = PAIRS
    records: int | None = None
    merge_share: float | None = None
    """This share of the model of `beside`, and the rest of MiniLM."""
    mining: tuple[str, ...] | None = None
    """Overrides of jobs/mine.py, which looks for negatives with the model of `beside`."""


BM25, MINILM, TUNED, TABLE = "BM25", "MiniLM", "MiniLM, fine-tuned", "table from MiniLM"
CAPPED = ("tokenizer.max_length=128",)
BASE = (*CAPPED, "model.pretrained={MiniLM}", "training.global_batch_size=64", "training.max_epochs=1")
SHALLOW = (*BASE, "objective.distillation.teacher={MiniLM}", "training.learning_rate=3e-4", "training.max_epochs=2")
TSDAE = (*BASE, "model.num_layers=null", "training.learning_rate=3e-5")
STARTED = (*CAPPED, "model.static_from={MiniLM}", "training.table_learning_rate=1e-3")
TAUGHT = ("objective.contrastive.weight=1", f"objective.distillation.teacher={{{TUNED}}}")
LEARNT = ("objective.distillation.teacher={MiniLM}",)
ROWS = (
    Row(BM25, BM25),
    Row(MINILM, BM25),
    Row("table", BM25, "pairs", CAPPED),
    Row(TABLE, "table", "pairs", STARTED),
    Row(f"{TABLE}, a third of the steps", "table", "pairs", (*STARTED, "training.max_epochs=2.67")),
    Row(TUNED, MINILM, "fine_tune", BASE, records=2 * FEW),
    *(Row(f"{TUNED}, merged at {share}", TUNED, merge_share=share) for share in (0.25, 0.5, 0.75)),
    Row(f"{TABLE}, {TUNED} as teacher", TABLE, "pairs", (*STARTED, *TAUGHT)),
    Row(f"{TABLE}, mined negatives", TABLE, "pairs", STARTED, mining=()),
    Row(f"{TABLE}, mined negatives with a guide", TABLE, "pairs", STARTED, mining=(f"mining.guide={{{TUNED}}}",)),
    Row("3 layers of MiniLM, distilled", MINILM, "distill", (*SHALLOW, "model.num_layers=3"), MIXED, FEW),
    Row("2 layers of MiniLM, distilled", MINILM, "distill", (*SHALLOW, "model.num_layers=2"), MIXED, FEW),
    Row("texts alone, MiniLM: TSDAE", MINILM, "denoise", TSDAE, TEXTS, FEW),
    Row("texts alone, MiniLM: crops", MINILM, "texts_gpu", BASE, TEXTS, FEW),
    Row("texts alone, table: crops", BM25, "texts", STARTED, TEXTS),
    Row("texts alone, table: crops, MiniLM as teacher", BM25, "texts", (*STARTED, *LEARNT), TEXTS),
)


@dataclass(frozen=True)
class Scored:
    """A model's scores; `model` is its folder."""

    by_query: dict[str, float]
    spearman: float = float("nan")
    model: str | None = None
    steps: int = 0
    train_seconds: float = 0.0

    @property
    def ndcg(self) -> float:
        return float(np.mean(list(self.by_query.values())))


class Runs:
    """Trains the rows' models and scores them; each row once."""

    def __init__(self, data: Path, storage: Path, seed: int) -> None:
        self.data, self.storage, self.seed = data.resolve(), storage.resolve(), seed
        self.found: dict[str, Scored] = {}

    def scored(self, name: str) -> Scored:
        if name not in self.found:
            file = self.storage / "scores" / f"{_slug(name)}-{self.seed}.json"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                (row,) = (row for row in ROWS if row.name == name)
                file.write_text(json.dumps(vars(self._score(row))))
            self.found[name] = Scored(**json.loads(file.read_text()))
            print(f"{name}: {self.found[name].ndcg:.4f}", file=sys.stderr, flush=True)
        return self.found[name]

    def model(self, name: str) -> str:
        return minilm() if name == MINILM else str(self.scored(name).model)

    def _score(self, row: Row) -> Scored:
        if row.name == BM25:
            queries, documents = self.task.queries, dict(self.task.documents.items())
            ranking = bm25_ranking([*queries], [*queries.values()], [*documents], [*documents.values()])
            return Scored(ndcg_by_query(self.task.qrels, without_own_documents(ranking, self.task.qrels)))
        if row.name == MINILM:
            return self._scores_of(minilm())
        if row.merge_share is not None:
            (parent,) = (each for each in ROWS if each.name == row.beside)
            self.scored(parent.name)
            folder = self.storage / "exports" / _slug(row.name)
            self._run("export", parent, parent.overrides, "--to", str(folder), "--merge-share", str(row.merge_share))
            return self._scores_of(str(folder))
        overrides = row.overrides
        if row.mining is not None:
            (parent,) = (each for each in ROWS if each.name == row.beside)
            self.scored(parent.name)
            mined = self._run("mine", parent, (*parent.overrides, *row.mining))
            overrides = (*overrides, f"data.prepared={mined['paths']['prepared']}")
        last = self._run("train", row, overrides)
        scored = self._scores_of(last["paths"]["model"])
        return replace(scored, steps=last["metrics"]["step"], train_seconds=last["metrics"]["train_seconds"])

    def _run(self, job: str, row: Row, overrides: tuple[str, ...], *flags: str) -> dict[str, Any]:
        """One job on the row's run. Returns its last line."""
        capped = {"max_samples": row.records} if row.records else {}
        sources = [each | capped | {"path": str(self.data / each["path"])} for each in row.sources]
        settings = [
            f"data.sources={json.dumps(sources)}",
            f"storage.root={self.storage}",
            f"storage.run={_slug(row.name)}-{self.seed}",
            f"training.seed={self.seed}",
            *(re.sub(r"\{(.+)\}", lambda name: self.model(name[1]), each) for each in overrides),
        ]
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--config"]
        command += [str(ROOT / "configs" / f"{row.config}.yaml"), *flags, *settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    @cached_property
    def task(self) -> RetrievalTask:
        normalise = normaliser(load(ROOT / "configs" / "pairs.yaml").data)
        return read_beir(self.data / "debian" / "beir").normalised(normalise)

    def _scores_of(self, model: str) -> Scored:
        from pipeline.index.encoder import TextEncoder

        encoder, sts = TextEncoder(Path(model)), read_sts(self.data / "sts_b" / "test.tsv")
        texts = dict(self.task.documents.items())
        queries = encoder.encode(list(self.task.queries.values()), "query")
        found = ranked(list(self.task.queries), queries, list(texts), encoder.encode(list(texts.values()), "document"))
        first, second = np.split(encoder.encode(sts.first + sts.second), 2)
        correlation = spearman(sts.scores, (first * second).sum(axis=1).tolist())
        by_query = ndcg_by_query(self.task.qrels, without_own_documents(found, self.task.qrels))
        return Scored(by_query, correlation, model)

    def speedup(self, name: str) -> float:
        """Documents per second of the row's model, divided by MiniLM's."""
        from pipeline.index.encoder import TextEncoder

        texts = [text for _, text in self.task.documents.items()][:TIMED_DOCUMENTS]
        encoders = [TextEncoder(Path(model)) for model in (self.model(name), minilm())]
        took: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for encoder, seconds in zip(encoders, took, strict=True):
                start = time.perf_counter()
                encoder.encode(texts, "document")
                seconds.append(time.perf_counter() - start)
        return median(took[1]) / median(took[0])


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


def line(row: Row, runs: list[Runs]) -> list[str]:
    """The row's cells: means over the seeds, and the interval of the mean difference over queries."""
    own, other = ([each.scored(name) for each in runs] for name in (row.name, row.beside))
    by_query = [
        np.array([[scored.by_query[query] for query in sorted(scored.by_query)] for scored in seeds]).mean(axis=0)
        for seeds in (own, other)
    ]
    low, high = interval(by_query[0] - by_query[1])
    difference = f"{(by_query[0] - by_query[1]).mean():+.4f} ({low:+.4f} to {high:+.4f})"
    correlation = float(np.mean([each.spearman for each in own]))
    return [
        row.name,
        f"{by_query[0].mean():.4f}",
        row.beside if row.beside != row.name else "",
        difference if row.beside != row.name else "",
        f"{correlation:.4f}" if correlation == correlation else "",
        f"{own[0].steps:,}" if own[0].steps else "",
        f"{np.mean([each.train_seconds for each in own]):.0f}" if own[0].steps else "",
        f"{runs[0].speedup(row.name):.1f} x" if "layers" in row.name else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian and sts_b")
    parser.add_argument("--only", default="", help="rows whose name has these words, and the rows that they need")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--storage", type=Path, help="folder for the runs and scores; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [Runs(args.data, args.storage or Path(scratch), seed) for seed in range(args.seeds)]
        lines = [line(row, runs) for row in ROWS if args.only in row.name]
    header = ["recipe", "NDCG@10", "beside", "difference", "STS", "steps", "training s", "documents/s, of MiniLM's"]
    print(f"\n{machine()}, {args.seeds} seeds\n\n{table(lines, header)}")


if __name__ == "__main__":
    main()
