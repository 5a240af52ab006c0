"""The tracker mlflow, read back by MLflow's own client from a database below storage.root."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load
from pipeline.core.console import log
from pipeline.training import mlflow_tracker
from pipeline.training.trackers import Trackers
from tests.conftest import run_here
from tests.embedding_world import save_random_model
from tests.test_runs import add_run
from tests.test_tracking import training, validation

pytestmark = pytest.mark.slow
TRACKED = ["logging.trackers=[mlflow]", "logging.project=tests"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage.root whose database MLflow has made: it takes seconds, so the tests share it."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(autouse=True)
def without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client_of(root: Path) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{root}/mlflow.db"
    return MlflowClient(uri, uri)


def runs_of(root: Path, name: str) -> list[Any]:
    client = client_of(root)
    experiment = client.get_experiment_by_name("tests").experiment_id
    return [run for run in client.search_runs([experiment]) if run.info.run_name == name]


def test_parameters_and_metrics_and_a_resumed_run_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("pairs", [f"storage.root={root}", "storage.run=tracked", *TRACKED], environ={})
    with Trackers.open(config, 0) as trackers:
        for metrics in (training(10, 2.0), validation(10, 0.5), training(20, 1.0)):
            trackers.log(metrics)
        assert len(trackers.trackers) == 2
    trackers = Trackers.open(config, 20)
    trackers.log(training(30, 0.5))
    trackers.close(failed=True)
    (run,) = runs_of(root, "tracked")
    assert run.info.status == "FAILED"
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.params["storage.run"] == "tracked"
    history = client_of(root).get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(10, 2.0), (20, 1.0), (30, 0.5)]
    assert run.data.metrics["validation/ndcg_at_10"] == 0.5
    assert list(tmp_path.iterdir()) == []  # nothing in the current folder
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_run_that_mlflow_lost_is_begun_anew(root: Path) -> None:
    config = load("pairs", [f"storage.root={root}", "storage.run=lost", *TRACKED], environ={})
    folder = root / "runs" / "lost"
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "run_id").write_text("0" * 32)
    with Trackers.open(config, 0) as trackers:
        trackers.log(training(10))
    (run,) = runs_of(root, "lost")
    assert (folder / "mlflow" / "run_id").read_text() == run.info.run_id
    assert run.info.status == "FINISHED"


def test_a_promoted_model_is_registered(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(root, "good", save_random_model(tmp_path / "model"), "1" * 64, *TRACKED)
    for version in ("1", "2"):
        code, last, _, err = run_here(capsys, "runs", f"storage.root={root}", "promote", "good", "production")
        assert code == 0
        assert "MLflow has it as models:/tests@production" in err
        found = client_of(root).get_model_version_by_alias("tests", "production")
        assert (str(found.version), found.source) == (version, Path(last["paths"]["model"]).as_uri())


def test_without_the_library_and_without_a_server_training_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    config = load("pairs", [f"storage.root={root}", "storage.run=none", *TRACKED], environ={})
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with Trackers.open(config, 0) as trackers:
        assert [tracker.name for tracker in trackers.trackers] == ["metrics.jsonl"]
    assert "pip install 'text-embedding-pipeline[mlflow]'" in caplog.text
    monkeypatch.undo()
    in_bucket = load("pairs", ["storage.root=s3://b/x", *TRACKED], environ={})
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        mlflow_tracker._client(in_bucket)
