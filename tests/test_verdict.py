"""Verdicts: the bootstrap against SciPy's, and runs that do not publish a model that is no better."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.config import load
from pipeline.evaluation.metrics import ndcg_by_query, retrieval_metrics
from pipeline.evaluation.verdict import compare, comparisons, interval
from tests.conftest import make_pairs, run_here, write_jsonl
from tests.test_evaluation import small_model, write_beir


@pytest.mark.parametrize(("shift", "verdict"), [(0.05, "better"), (-0.05, "worse"), (0.0, "not clearly different")])
def test_the_interval_is_that_of_scipy(shift: float, verdict: str) -> None:
    chance = np.random.default_rng(3)
    rival = chance.random(400)
    model = rival + shift + 0.2 * chance.normal(size=400)
    result = stats.bootstrap((model - rival,), np.mean, n_resamples=10_000, method="percentile", rng=chance)
    found = interval(model - rival)
    np.testing.assert_allclose(found, result.confidence_interval, atol=0.002)
    names = [f"q{i}" for i in range(400)]
    compared = compare(
        "beir",
        "bm25",
        dict(zip(names, model, strict=True)),
        dict(zip(reversed(names), reversed(rival), strict=True)),
    )
    assert (compared.low, compared.high) == pytest.approx(found, abs=1e-3)  # the queries are in another order
    assert compared.difference == pytest.approx(float((model - rival).mean()))
    assert compared.verdict == verdict


def test_a_sentence() -> None:
    ones, zeros = {f"q{i}": 1.0 for i in range(50)}, {f"q{i}": 0.0 for i in range(50)}
    found = comparisons(
        {"beir": {"model": ones, "bm25": zeros}, "held-out": {"model": zeros}}, {"base": {"held-out": {"model": zeros}}}
    )
    assert [each.sentence for each in found] == [
        "On beir the model is better than BM25: NDCG@10 1.000, and 0.000 for BM25; the difference is +1.000, 95% "
        "interval +1.000 to +1.000 (50 queries).",
        "On held-out the model is not clearly different from the base: NDCG@10 0.000, and 0.000 for the base; the "
        "difference is +0.000, 95% interval +0.000 to +0.000 (50 queries).",
    ]


def test_ndcg_by_query() -> None:
    qrels = {"q": {"a": 1, "b": 1}, "r": {"c": 1}, "s": {"d": 1}}
    ranking = {"q": {"a": 0.9, "x": 0.8, "b": 0.7}, "r": {"y": 0.5, "c": 0.4}}
    found = ndcg_by_query(qrels, ranking)
    ideal = 1 + 1 / np.log2(3)
    assert found == {"q": pytest.approx((1 + 1 / 2) / ideal), "r": pytest.approx(1 / np.log2(3)), "s": 0.0}
    assert np.mean([*found.values()]) == pytest.approx(retrieval_metrics(qrels, ranking)["ndcg@10"], abs=1e-4)


def config_of(folder: Path, **evaluation: Any) -> Path:
    """Pairs that a model can learn, among which BM25 finds all: they share rare words."""
    settings = {
        "storage": {"root": str(folder / "store"), "run": "r"},
        "data": {
            "sources": [{"name": "p", "type": "json", "path": str(write_jsonl(folder / "p.jsonl", make_pairs(400)))}],
            "validation_fraction": 0.2,
        },
        "tokenizer": {"vocab_size": 600, "max_length": 24},
        "model": {"d_model": 16, "num_layers": 0, "d_ff": 16},
        "training": {"global_batch_size": 32, "max_steps": 2, "learning_rate": 0.01},
        "evaluation": evaluation,
    }
    (folder / "c.yaml").write_text(json.dumps(settings))
    return folder / "c.yaml"


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_is_no_better_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, must_beat=["bm25"])
    code, last, _, err = run_here(capsys, "run", "--config", str(config))
    assert (code, last["status"]) == (1, "failed")
    reason = r"because of evaluation\.must_beat: On held-out the model is (worse than|not clearly different from) BM25"
    assert re.search(reason, err)
    run = tmp_path / "store" / "runs" / "r"
    assert not (run / "published.json").exists()
    (found,) = json.loads((run / "evaluation.json").read_text())["comparisons"]
    assert found["other"] == "bm25"
    assert found["verdict"] != "better"

    code, last, _, err = run_here(capsys, "run", "--config", str(config), "evaluation.must_beat=[]")
    assert (code, last["status"]) == (0, "ok")
    assert (run / "published.json").exists()
    assert list(last["metrics"]) == ["prepare", "train", "evaluate", "embed"]


@pytest.mark.usefixtures("ray_cluster")
def test_the_base_the_published_model_and_a_general_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each model is scored once; a task outside the domain does not keep a model from being published."""
    base = small_model(tmp_path / "base")
    pairs = make_pairs(40, seed=9)
    corpus = "".join(json.dumps({"_id": row["id"], "text": row["positive"]}) + "\n" for row in pairs)
    queries = "".join(json.dumps({"_id": f"q{row['id']}", "text": row["anchor"]}) + "\n" for row in pairs)
    judged = "h\n" + "".join(f"q{row['id']}\t{row['id']}\t1\n" for row in pairs)
    general = write_beir(tmp_path / "other", corpus, queries, judged)
    config = config_of(tmp_path, general=str(general), bm25=False)
    told = ["objective.distillation.teacher=" + str(base), "objective.contrastive.weight=1"]
    assert run_here(capsys, "run", "--config", str(config), *told)[0] == 0
    latest = tmp_path / "store" / "runs" / "r" / "evaluation.json"
    first = json.loads(latest.read_text())
    assert [(each["task"], each["other"]) for each in first["comparisons"]] == [
        ("general other", "base"),
        ("held-out", "base"),
    ]
    assert "general other" in first["scores"]

    more = [*told, "training.max_steps=60", "checkpointing.accept_changes=[training.max_steps]"]
    assert run_here(capsys, "train", "--config", str(config), *more)[0] == 0
    code, _, _, err = run_here(capsys, "evaluate", "--config", str(config), *more)
    assert code == 0
    second = json.loads(latest.read_text())
    assert [each["other"] for each in second["comparisons"]] == ["base", "previous", "base", "previous"]
    assert "the published model" in err


def test_what_cannot_be_beaten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, must_beat=["base"])
    code, _, _, err = run_here(capsys, "run", "--config", str(config))
    assert code == 2
    assert "evaluation.must_beat: found base, but the run begins from no model" in err
    code, _, _, err = run_here(
        capsys, "run", "--config", str(config), "evaluation.must_beat=[bm25]", "evaluation.bm25=false"
    )
    assert code == 2
    assert "evaluation.must_beat: found bm25, but evaluation.bm25 is false" in err
    assert load(config, environ={}).evaluation.must_beat == ["base"]
