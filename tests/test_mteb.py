"""MTEB tasks: their scores are those of our own tasks on the same data; names, libraries and data that are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import mteb
import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from pipeline.config import ConfigError
from pipeline.evaluation import mteb_tasks
from pipeline.evaluation.mteb_tasks import find_tasks
from tests.conftest import make_pairs, run_here, write_jsonl
from tests.test_evaluation import small_model, write_beir

PROMPTS = (("query", "find "), ("document", "page "))
PAIRS = make_pairs(60, seed=5)
RATED = [
    (PAIRS[i]["anchor"], PAIRS[j]["positive"], (i * 7 + j * 3) % 6 if i != j else 5)
    for i, j in [(i, (i * i) % 60) for i in range(60)]
]


def described(kind: Any, name: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="made by a test",
        dataset={"path": "none", "revision": "none"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )


class LocalSts(AbsTaskSTS):
    metadata = described("STS", "LocalSts", "cosine_spearman")

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        first, second, score = (list(column) for column in zip(*RATED, strict=True))
        rows = Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})
        self.dataset, self.data_loaded = {"default": DatasetDict(test=rows)}, True


class LocalRetrieval(AbsTaskRetrieval):
    metadata = described("Retrieval", "LocalRetrieval", "ndcg_at_10")

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        ids = [row["id"] for row in PAIRS]
        split = {
            "corpus": Dataset.from_dict({"id": ids, "text": [row["positive"] for row in PAIRS], "title": [""] * 60}),
            "queries": Dataset.from_dict({"id": [f"q{i}" for i in ids], "text": [row["anchor"] for row in PAIRS]}),
            "relevant_docs": {f"q{i}": {i: 1} for i in ids},
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


class Unreachable(LocalSts):
    metadata = described("STS", "Unreachable", "cosine_spearman")
    error: ClassVar[Exception] = ConnectionError("no route to the hub")

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        raise self.error


@pytest.fixture
def local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {task.metadata.name: task for task in (LocalSts, LocalRetrieval, Unreachable)}
    real = mteb.get_task
    monkeypatch.setattr(mteb, "get_task", lambda name: tasks[name]() if name in tasks else real(name))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    corpus = "".join(json.dumps({"_id": row["id"], "text": row["positive"]}) + "\n" for row in PAIRS)
    queries = "".join(json.dumps({"_id": f"q{row['id']}", "text": row["anchor"]}) + "\n" for row in PAIRS)
    beir = write_beir(tmp_path / "beir", corpus, queries, "h\n" + "".join(f"q{r['id']}\t{r['id']}\t1\n" for r in PAIRS))
    lines = ["score\tsentence1\tsentence2", *(f"{score}\t{one}\t{two}" for one, two, score in RATED)]
    (tmp_path / "sts.tsv").write_text("\n".join(lines) + "\n")
    settings = {
        "storage": {"root": str(tmp_path / "store"), "run": "r"},
        "data": {"sources": [{"name": "p", "type": "json", "path": str(write_jsonl(tmp_path / "p.jsonl", PAIRS))}]},
        "tokenizer": {"vocab_size": 600, "max_length": 24},
        "embedding": {"model": str(small_model(tmp_path / "model", PROMPTS))},
        "evaluation": {"held_out_queries": 0, "beir_dir": str(beir), "sts_file": str(tmp_path / "sts.tsv")},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    return tmp_path / "c.yaml"


@pytest.mark.usefixtures("ray_cluster", "local_tasks")
def test_scores_are_those_of_our_own_tasks_on_the_same_data(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ("--config", str(config), "--mteb", "LocalSts", "--mteb", "LocalRetrieval")
    code, last, _, err = run_here(capsys, "evaluate", *told)
    assert code == 0, err
    scores = last["metrics"]
    assert list(scores) == ["beir", "sts", "MTEB LocalSts", "MTEB LocalRetrieval"]
    assert scores["MTEB LocalSts"]["texts"] == scores["MTEB LocalRetrieval"]["texts"] == 120
    assert scores["MTEB LocalSts"]["model"]["cosine_spearman"] == pytest.approx(
        scores["sts"]["model"]["spearman"], abs=1e-3
    )
    ours = scores["beir"]["model"]["ndcg@10"]
    assert scores["MTEB LocalRetrieval"]["model"]["ndcg_at_10"] == pytest.approx(ours, abs=1e-3)
    assert "MTEB LocalRetrieval (120 texts)" in err
    kept = json.loads((config.parent / "store" / "runs" / "r" / "evaluation.json").read_text())
    assert kept["scores"] == scores


@pytest.mark.usefixtures("ray_cluster", "local_tasks")
def test_queries_and_documents_get_their_prompts(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config import load
    from pipeline.evaluation.retrieval import TextVectors
    from pipeline.index.published import encoder_recipe
    from tests.conftest import no_progress

    asked: list[tuple[str, str]] = []
    real = TextVectors.of

    def of(self: TextVectors, texts: list[str], name: str, prompt: str = "") -> Any:
        asked.extend((prompt, text) for text in texts)
        return real(self, texts, name, prompt)

    monkeypatch.setattr(TextVectors, "of", of)
    loaded = load(config, environ={})
    vectors = TextVectors(encoder_recipe(loaded, Path(str(loaded.embedding.model))), no_progress)
    mteb_tasks.score_mteb(["LocalRetrieval"], vectors, str.upper)
    assert {text for prompt, text in asked if prompt == "query"} == {str(row["anchor"]).upper() for row in PAIRS}
    assert {text for prompt, text in asked if prompt == "document"} == {str(row["positive"]).upper() for row in PAIRS}
    asked.clear()
    mteb_tasks.score_mteb(["LocalSts"], vectors, str.upper)
    assert {prompt for prompt, _ in asked} == {""}


@pytest.mark.usefixtures("ray_cluster", "local_tasks")
def test_data_that_the_hub_does_not_give(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, last, _, err = run_here(capsys, "evaluate", "--config", str(config), "evaluation.mteb=[Unreachable]")
    assert (code, last["status"]) == (1, "failed")
    sentence = "evaluation.mteb: cannot load the data of Unreachable: no route to the hub; it comes from"
    assert sentence in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("stsbenchmark", "mteb has no task 'stsbenchmark'; did you mean STSBenchmark or "),
        ("SciFactt", "did you mean SciFact"),
        ("zzz qq", "mteb has no task 'zzz qq'; mteb.get_tasks() lists its tasks"),
        ("CIFAR10", "CIFAR10 is a task of image; allowed are tasks of text alone"),
    ],
)
def test_names_that_are_none(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_tasks(["SciFact", name])
    assert sentence in str(error.value)
    assert str(error.value).startswith("evaluation.mteb: ")


def test_a_name_is_checked_before_ray_starts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _, err = run_here(capsys, "evaluate", "--config", str(config), "--mteb", "SciFactt")
    assert code == 2
    assert "did you mean SciFact" in err


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'text-embedding-pipeline\[mteb\]'"):
        find_tasks(["SciFact"])
