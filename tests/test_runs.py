"""tep runs: the list, comparisons and names for models, on disk and in a bucket."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.commands.runs import listed, printed
from pipeline.commands.tep import run_command
from pipeline.config import ConfigError, load
from pipeline.core.aliases import aliased_model, assign_alias, read_aliases
from pipeline.core.files import link_or_copy, write_atomically
from pipeline.core.path import StoragePath, as_path
from pipeline.data.manifest import Manifest, SourceCount
from pipeline.data.unused import find_unused
from pipeline.evaluation.runs import compare_runs, find_runs
from pipeline.model.folder import model_fingerprint
from tests.bucket_servers import s3
from tests.conftest import run_here
from tests.embedding_world import save_random_model

DATA = {"1" * 64: ["a", "b", "c"], "2" * 64: ["a", "b", "d", "e"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_random_model(folder / name, seed) for seed, name in enumerate(("first", "second"))}


def add_data(root: StoragePath, fingerprint: str) -> str:
    """A prepared data set of DATA's records, as its manifest and record files say."""
    folder, ids = root / "prepared" / fingerprint[:16], DATA[fingerprint]
    manifest = Manifest(fingerprint, [SourceCount("pages", 9, len(ids), {})], {"train": len(ids)}, [], {}, [], {})
    write_atomically(folder / "manifest.json", json.dumps(asdict(manifest)).encode())
    sink = pa.BufferOutputStream()
    table = pa.table({"id": sorted(f"{ord(name):032x}" for name in ids), "source_id": [f"pages:{i}" for i in ids]})
    pq.write_table(table, sink)
    write_atomically(folder / "records" / "00000.parquet", sink.getvalue().to_pybytes())
    return f"prepared/{folder.name}"


def add_run(root: StoragePath, name: str, model: Path, fingerprint: str, *overrides: str, ndcg: float = 0.5) -> None:
    """A finished run with a model, and with an evaluation of 40 queries around `ndcg`."""
    config = load("pairs", [f"storage.root={root}", f"storage.run={name}", *overrides], environ={})
    folder = root / "runs" / name
    for file in model.iterdir():
        link_or_copy(file, folder / "best" / "step-00000060" / file.name)
    state = {"step": 60, "train_seconds": 1.0, "metrics": {}, "files": {}}
    described = {"data_fingerprint": fingerprint, "prepared": add_data(root, fingerprint), "settings": {}, "steps": 60}
    scores = {"held-out": {"queries": 40, "documents": 80, "model": {"ndcg@10": ndcg}, "bm25": {"ndcg@10": 0.4}}}
    verdict = {"task": "held-out", "other": "bm25", "verdict": "better", "sentence": f"{name} is better than BM25."}
    evaluation = {"scores": scores, "comparisons": [verdict], "artifact": "evaluations/k"}
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    queries = {"held-out": {"model": {f"q{i}": ndcg + each for i, each in enumerate(noise)}}}
    for file, content in (
        ("best/step-00000060/state.json", state),
        ("run.json", described),
        ("evaluation.json", evaluation),
        ("evaluations/k/queries.json", queries),
    ):
        write_atomically(folder / file, json.dumps(content).encode())
    write_atomically(folder / "config.resolved.yaml", yaml.safe_dump(config.dump()).encode())


@pytest.fixture
def root(tmp_path: Path, models: dict[str, Path]) -> Path:
    add_run(tmp_path, "first", models["first"], "1" * 64)
    add_run(tmp_path, "team/second", models["second"], "2" * 64, "training.learning_rate=0.01", ndcg=0.7)
    (tmp_path / "runs" / "failed").mkdir()
    (tmp_path / "runs" / "failed" / "training.log").write_text("x")
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "sweep" / "tune" / "trials" / "0001")
    return tmp_path


def runs(capsys: pytest.CaptureFixture[str], root: object, *words: str) -> tuple[int, Any, str]:
    code, last, _, err = run_here(capsys, "runs", f"storage.root={root}", *words)
    return code, last, err


class TestList:
    def test_it_says_what_each_run_is(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, found, _ = runs(capsys, root)
        by_name = {each["run"]: each for each in found}
        assert (code, set(by_name)) == (0, {"first", "team/second"})  # neither failed runs nor trials
        first = by_name["first"]
        assert first["data"] == {"sources": ["pairs"], "rows": 3, "fingerprint": "1" * 64}
        assert (first["step"], first["steps"], first["verdict"]) == (60, 60, "better than BM25")
        assert first["scores"] == {"held-out": {"ndcg@10": 0.5}}
        size = sum(file.stat().st_size / file.stat().st_nlink for file in (root / "runs/first").rglob("*.*"))
        assert first["bytes"] == pytest.approx(size, rel=0.1)
        text = listed(find_runs(root))
        assert "ndcg@10 0.700 (held-out)" in text
        assert "better than BM25" in text

    def test_it_writes_nothing(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = sorted(root.rglob("*"))
        runs(capsys, root)
        assert sorted(root.rglob("*")) == before

    def test_an_unreadable_run_is_left_out(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name, text in (("broken", "model: [1"), ("other", "nosuch: {}"), ("list", "[]")):
            shutil.copytree(root / "runs" / "first", root / "runs" / name)
            (root / "runs" / name / "config.resolved.yaml").write_text(text)
        shutil.copytree(root / "runs" / "first", root / "runs" / "no-config")
        (root / "runs" / "no-config" / "config.resolved.yaml").unlink()
        assert {run.name for run in find_runs(root)} == {"first", "team/second"}

    def test_a_run_of_another_version_is_listed(self, root: Path) -> None:
        file = root / "runs" / "first" / "config.resolved.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"gone": {"key": 1}}))
        (first,) = (run for run in find_runs(root) if run.name == "first")
        assert (first.model, first.sources) == ("token table, 256 wide", ["pairs"])

    def test_without_runs_it_says_how_to_make_one(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert runs(capsys, tmp_path)[1] == []
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert run_command("runs", [f"storage.root={tmp_path}"]) == 0
        assert f"no runs below {tmp_path}; to make one: tep run" in capsys.readouterr().out

    def test_a_run_whose_data_are_gone_and_one_that_is_not_evaluated(self, root: Path) -> None:
        shutil.rmtree(root / "prepared")
        (root / "runs/first/evaluation.json").unlink()
        (first,) = (run for run in find_runs(root) if run.name == "first")
        assert (first.rows, first.verdict, first.scores, first.queries()) == (None, "", {}, {})
        assert "not evaluated" in listed([first])


class TestComparison:
    def test_it_says_what_differs(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, found, _ = runs(capsys, root, "first", "team/second")
        assert code == 0
        assert found["config"] == {"training.learning_rate": [1e-3, 0.01]}
        assert found["data"] == "2 records new, 0 changed, 1 removed (100.0%)"
        assert found["scores"] == {"held-out": {"ndcg@10": [0.5, 0.7]}}
        (verdict,) = found["verdicts"]
        assert verdict.startswith("On held-out team/second is better than first: NDCG@10 0.699, and 0.499 for first;")
        text = printed(found, ["first", "team/second"])
        assert "+0.2000" in text
        assert ["training.learning_rate", "0.001", "0.01"] in [line.split() for line in text.splitlines()]

    def test_equal_runs_and_runs_of_other_queries(self, root: Path, models: dict[str, Path]) -> None:
        add_run(root, "again", models["first"], "1" * 64)
        found = {run.name: run for run in find_runs(root)}
        same = compare_runs(found["first"], found["again"])
        assert (same["config"], same["data"]) == ({}, "the same")
        assert "not clearly different from first" in same["verdicts"][0]
        assert "config: the same" in printed(same, ["first", "again"])
        queries = root / "runs/again/evaluations/k/queries.json"
        queries.write_text(json.dumps({"held-out": {"model": {"another": 0.5}}}))
        assert compare_runs(found["first"], found["again"])["verdicts"] == []
        queries.unlink()
        assert compare_runs(found["first"], found["again"])["verdicts"] == []

    def test_wrong_names(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for words, said in (
            (["frist"], "did you mean first?"),
            (["first", "nothing-like-it"], "the runs are"),
            (["a", "b", "c"], "allowed are no run, one, two to compare, and promote RUN NAME"),
            (["promote", "first", "a/b"], "found the name 'a/b'; allowed are letters"),
            (["promote", "first", ".."], "found the name '..'; allowed are letters"),
        ):
            code, _, err = runs(capsys, root, *words)
            assert code == 2
            assert said in err


class TestNames:
    def test_a_promoted_model_is_used_by_its_name(
        self, root: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, last, err = runs(capsys, root, "promote", "first", "production")
        assert (code, last["metrics"]["before"]) == (0, None)
        assert "use it with embedding.model=models:/production" in err
        config = load("pairs", [f"storage.root={root}", "embedding.model=models:/production"], environ={})
        model = Path(config.embedding.model or "")
        assert model.parent == root / "models"
        assert model_fingerprint(model) == model_fingerprint(models["first"])
        code, last, err = runs(capsys, root, "promote", "team/second", "production")
        assert "production was first; to go back: tep runs promote first production" in err
        config = load("pairs", [f"storage.root={root}", "embedding.model=models:/production"], environ={})
        assert model_fingerprint(Path(config.embedding.model or "")) == model_fingerprint(models["second"])
        (second,) = runs(capsys, root, "team/second")[1]
        assert second["names"] == ["production"]

    def test_a_named_model_outlives_its_run_and_is_not_cleaned(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs(capsys, root, "promote", "first", "production")
        shutil.rmtree(root / "runs" / "first")
        config = load("pairs", [f"storage.root={root}", "data.prepared=prepared/x"], environ={})
        assert [each for each in find_unused(config) if each.kind == "model"] == []
        assign_alias(root, "production", {"run": "r", "model": "models/other"})
        assert [each.path.parent.name for each in find_unused(config) if each.kind == "model"] == ["models"]

    def test_an_unknown_name_says_which_there_are(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for before, name, said in (
            (None, "production", "no model has a name yet; tep runs promote RUN production gives it"),
            ("production", "produktion", "did you mean models:/production?"),
            ("production", "zzz", "the names are production; tep runs promote RUN zzz gives it"),
        ):
            if before:
                runs(capsys, root, "promote", "first", before)
            with pytest.raises(ConfigError, match=r"embedding\.model: found no model named") as raised:
                load("pairs", [f"storage.root={root}", f"embedding.model=models:/{name}"], environ={})
            assert said in str(raised.value)

    def test_a_run_without_a_model_cannot_be_promoted(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.rmtree(root / "runs/first/best")
        code, _, err = runs(capsys, root, "promote", "first", "production")
        assert code == 1
        assert "no trained model in" in err
        assert read_aliases(root) == {}

    def test_several_writers_leave_what_one_of_them_wrote(self, tmp_path: Path) -> None:
        contents = [{"run": f"r{i}", "model": f"models/{'x' * 5000}{i}"} for i in range(40)]
        with ThreadPoolExecutor(8) as pool:
            writing = [pool.submit(assign_alias, tmp_path, "production", content) for content in contents]
            while not all(each.done() for each in writing):
                found = read_aliases(tmp_path)
                assert not found or found["production"] in contents
            for each in writing:
                each.result()
        assert read_aliases(tmp_path)["production"] in contents
        assert [file.name for file in (tmp_path / "aliases").iterdir()] == ["production.json"]


@pytest.fixture
def bucket() -> Iterator[StoragePath]:
    with s3("store") as server:
        yield as_path(server.uri("here"))


def test_in_a_bucket(bucket: StoragePath, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    add_run(bucket, "first", models["first"], "1" * 64)
    (found,) = runs(capsys, bucket)[1]
    assert (found["run"], found["data"]["rows"]) == ("first", 3)
    code, _, err = runs(capsys, bucket, "promote", "first", "production")
    assert code == 0, err
    assert str(aliased_model(bucket, "models:/production")).startswith("s3://store/here/models/")
    config = load("pairs", [f"storage.root={bucket}", "embedding.model=models:/production"], environ={})
    assert as_path(config.embedding.model or "").is_dir()
    (found,) = runs(capsys, bucket, "first")[1]
    assert found["names"] == ["production"]
