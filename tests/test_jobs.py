"""The jobs as a user runs them, in one process that shares the tests' Ray session, on small data."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.data.partitions import content_id
from tests.conftest import make_pairs, no_progress, run_here, write_jsonl


class Job:
    """Runs jobs on one config; returns (exit code, last line, all of stdout, stderr)."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "store"
        self.config = folder / "c.yaml"
        self.pairs = write_jsonl(folder / "pairs.jsonl", make_pairs(800))
        self.config.write_text(
            json.dumps(
                {
                    "storage": {"root": str(self.root), "run": "small"},
                    "data": {
                        "sources": [{"name": "pages", "type": "json", "path": str(self.pairs), "metadata": ["line"]}],
                        "validation_fraction": 0.1,
                    },
                    "tokenizer": {"vocab_size": 800, "max_length": 24},
                    "model": {"d_model": 64, "d_ff": 64},
                    "training": {
                        "global_batch_size": 64,
                        "learning_rate": 1e-2,
                        "max_steps": 60,
                        "table_warmup_fraction": 0.5,
                        "validate_every_steps": 20,
                        "gradient_accumulation_steps": 2,
                    },
                    "checkpointing": {"every_steps": 20, "max_checkpoints": 2},
                    "evaluation": {"held_out_queries": 50},
                }
            )
        )

    def __call__(self, capsys: pytest.CaptureFixture[str], name: str, *args: str) -> tuple[int, Any, str, str]:
        return run_here(capsys, name, "--config", str(self.config), *args)


def _obey_permissions() -> None:
    """Let a process of root's, once it runs a program, be refused as other users are."""
    libc, drop_from_bounding_set = ctypes.CDLL(None), 24
    for override in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(drop_from_bounding_set, override, 0, 0, 0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("jobs"))


@pytest.mark.usefixtures("ray_cluster")
class TestWholeJob:
    """In this order: each test goes on from the one before."""

    def test_search_before_anything_says_what_to_run(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        code, last, _, err = job(capsys, "search", "merge the invoice")
        assert (code, last["status"]) == (1, "failed")
        assert "the run small has no vectors yet; run tep run first" in err

    def test_too_few_cpus_are_refused_before_training(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, _, err = job(capsys, "train", "scaling.cpus_per_worker=4", "storage.run=refused")
        assert code == 2
        assert "2 workers of 4 CPUs and 2 CPUs" in err
        assert "allowed is scaling.cpus_per_worker=0.5" in err
        assert not list(job.root.glob("runs/refused/attempt-*"))

    def test_run_does_all_stages(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        code, last, _, err = job(capsys, "run")
        assert (code, last["status"], last["job"]) == (0, "ok", "run"), err
        metrics = last["metrics"]
        assert metrics["train"]["step"] == 60
        assert metrics["embed"]["rows"] == metrics["prepare"]["rows_kept"]
        held_out = metrics["evaluate"]["held-out"]
        assert held_out["queries"] == 50
        assert held_out["model"]["ndcg@10"] > 0.5  # by chance: 0.01
        assert held_out["bm25"]["ndcg@10"] > 0.9  # a rare word settles it
        for what in ("manifest", "model", "history", "store", "scores"):
            assert Path(last["paths"][what]).exists()
        assert "ndcg@10" in err

    def test_the_history_falls_and_the_run_is_described(self, job: Job) -> None:
        run = job.root / "runs" / "small"
        history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in history if "loss" in row]
        assert len(losses) == 6
        assert losses[-1] < 0.5 * losses[0]
        assert sum("validation_ndcg@10" in row for row in history) == 3
        assert json.loads((run / "run.json").read_text())["data_fingerprint"]
        assert "max_steps: 60" in (run / "config.resolved.yaml").read_text()
        assert "train: 60 steps" in (run / "training.log").read_text()

    def test_checkpoints_are_the_newest_and_the_best(self, job: Job) -> None:
        run = job.root / "runs" / "small"
        assert sorted(p.name for p in run.glob("attempt-001/step-*")) == ["step-00000040", "step-00000060"]
        (best,) = (run / "best").iterdir()
        state = json.loads((best / "state.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert state["best_metric"] == max(row.get("validation_ndcg@10", 0) for row in rows)

    def test_every_text_is_embedded_once_with_its_own_vector(self, job: Job) -> None:
        from pipeline.index.encoder import TextEncoder

        (best,) = (job.root / "runs" / "small" / "best").iterdir()
        db = lancedb.connect(str(job.root / "lancedb"))
        rows = db.open_table(db.list_tables().tables[0]).to_arrow().to_pylist()
        records = pq.read_table(next((job.root / "prepared").iterdir()) / "records").to_pylist()
        places: dict[str, set[str]] = {}
        for record in records:
            places.setdefault(record["positive"], set()).add(record["source_id"])
        assert sorted(row["text"] for row in rows) == sorted(places)
        for row in rows:
            assert row["id"] == content_id([row["text"]])
            assert {place["source_id"] for place in row["places"]} == places[row["text"]]
            assert row["source_id"] == min(places[row["text"]])
        (documents,) = job.root.glob("stages/documents-*/documents")
        assert "tokens" in pq.read_table(documents).column_names  # those of the token shards: made once
        vectors = TextEncoder(best, batch_tokens=10**9).encode([row["text"] for row in rows[:20]])
        np.testing.assert_allclose([row["vector"] for row in rows[:20]], vectors, atol=1e-5)

    def test_a_rerun_skips_everything_without_ray(
        self, job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.stages.ray_session", no_progress)
        code, last, _, err = job(capsys, "run")
        assert code == 0, err
        assert err.count("nothing to do") == 4
        assert last["metrics"]["evaluate"]["held-out"]["queries"] == 50

    def test_search_finds_the_page(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        row = make_pairs(800)[17]
        code, last, _, _ = job(capsys, "search", str(row["anchor"]), "--json")
        assert code == 0
        assert [result["rank"] for result in last] == list(range(1, 11))
        assert set(last[0]) == {"rank", "score", "id", "source_id", "text", "metadata"}
        assert [result["score"] for result in last] == sorted((r["score"] for r in last), reverse=True)
        assert row["positive"] in [result["text"] for result in last]
        assert all("line" in result["metadata"] for result in last)
        code, last, out, _ = job(capsys, "search", "training.max_steps=60", str(row["anchor"]), "--limit", "2")
        assert (code, last["metrics"]["results"]) == (0, 2)
        assert out.startswith(" 1  0.")

    def test_what_only_reads_works_on_a_root_that_can_only_be_read(self, job: Job) -> None:
        def run(name: str, *args: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, f"jobs/{name}.py", "--config", str(job.config), *args]
            return subprocess.run(command, capture_output=True, text=True, preexec_fn=_obey_permissions)

        before = {path: path.stat().st_mtime_ns for path in job.root.rglob("*")}
        modes = {path: path.stat().st_mode for path in (job.root, *before)}
        for path, mode in modes.items():
            path.chmod(mode & 0o555)
        try:
            for arguments in (
                ["search", "merge the invoice"],
                ["prepare"],
                ["run"],
                ["evaluate"],
                ["clean", "--dry-run"],
            ):
                done = run(*arguments)
                assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
            hybrid = run("search", "merge the invoice", "--hybrid")
            assert (hybrid.returncode, json.loads(hybrid.stdout.splitlines()[-1])["status"]) == (1, "failed")
            assert re.search(r"^search: \S+ has no index of words yet, and cannot be written; ", hybrid.stderr, re.M)
            refused = run("prepare", "tokenizer.max_length=12")
            assert refused.returncode == 1
            assert re.search(
                r"^prepare: \S+ cannot be read or written \(Permission denied\); .*$", refused.stderr, re.M
            )
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        assert {path: path.stat().st_mtime_ns for path in job.root.rglob("*")} == before

    @pytest.mark.parametrize(
        ("query", "found"), [("", "an empty text"), (" \n", "an empty text"), ("x" * 100_000, "100,000")]
    )
    def test_search_refuses_queries_that_are_none(
        self, query: str, found: str, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, _, err = job(capsys, "search", query)
        assert code == 2
        assert f"query: found {found}" in err

    def test_missing_folders_are_found_before_any_work(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        for key in ("evaluation.beir_dir", "embedding.model"):
            code, _, _, err = job(capsys, "run", f"{key}=nowhere", "storage.run=other")
            assert code == 2
            assert f"{key}: found no " in err
            assert "prepare" not in err

    def test_evaluate_scores_a_beir_folder(
        self, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = make_pairs(60, seed=9)
        write_jsonl(tmp_path / "corpus.jsonl", [{"_id": r["id"], "title": "", "text": r["positive"]} for r in rows])
        write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{r['id']}", "text": r["anchor"]} for r in rows[:20]])
        (tmp_path / "qrels").mkdir()
        judged = "".join(f"q{r['id']}\t{r['id']}\t1\n" for r in rows[:20])
        (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
        code, last, _, err = job(capsys, "evaluate", f"evaluation.beir_dir={tmp_path}", "evaluation.held_out_queries=0")
        assert code == 0, err
        (scores,) = last["metrics"].values()
        assert (scores["queries"], scores["documents"]) == (20, 60)
        assert scores["model"]["recall@100"] == scores["hybrid"]["recall@100"] == 1
        assert scores["model"].keys() == scores["bm25"].keys() == scores["hybrid"].keys()
        again = [f"evaluation.beir_dir={tmp_path}", "evaluation.held_out_queries=0"]
        assert "evaluate: nothing to do" in job(capsys, "run", *again)[3]
        with (tmp_path / "qrels" / "test.tsv").open("a") as file:
            file.write("qdoc1\tdoc2\t1\n")
        monkeypatch.setattr("pipeline.stages.ray_session", no_progress)
        assert "Ray was asked for" in job(capsys, "run", *again)[3]

    def test_a_run_folder_of_another_config_is_refused(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, _, err = job(capsys, "train", "training.learning_rate=0.5", "model.d_model=32")
        assert code == 2
        assert "training.learning_rate (then 0.01, now 0.5)" in err
        assert "model.d_model (then 64, now 32)" in err
        assert "storage.run=NAME" in err

    def test_a_run_folder_of_other_data_is_refused(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, _, err = job(capsys, "train", "data.min_chars=12")
        assert code == 0, err  # the same records, so the same data
        code, _, _, err = job(capsys, "train", "tokenizer.max_length=20")
        assert code == 2
        assert "the prepared data" in err

    def test_a_missing_table_is_made_anew(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        db = lancedb.connect(str(job.root / "lancedb"))
        (name,) = db.list_tables().tables
        ids = sorted(db.open_table(name).to_arrow()["id"].to_pylist())
        db.drop_table(name)
        code, _, _, err = job(capsys, "search", "merge the invoice")
        assert code == 1
        assert "run tep embed first" in err
        code, last, _, _ = job(capsys, "embed")
        assert code == 0
        assert last["metrics"]["embedded"] == last["metrics"]["rows"]
        assert sorted(db.open_table(name).to_arrow()["id"].to_pylist()) == ids

    def test_the_librarys_examples(self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        names = {name: getattr(pipeline, name) for name in pipeline.__all__}
        names["config"] = names["load_config"](job.config)
        for name in ("prepare", "train", "embed", "evaluate", "run", "mine", "export", "search", "open_embedder"):
            (example,) = re.findall(rf"^ *(.*\b{name}\(.*?) *(?:#|$)", names[name].__doc__, re.MULTILINE)
            found = eval(example, names)
            assert found is not None or name == "open_embedder", example

    def test_a_folder_of_text_files(self, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for row in make_pairs(30):
            (tmp_path / f"{row['id']}.txt").write_text(f"{row['anchor']}\n\n{row['positive']}\n")
        code, last, _, err = job(capsys, "prepare", "--local_data_dir", str(tmp_path))
        assert code == 0, err
        assert last["metrics"]["rows_in"] == 30

    def test_small_data_work_at_once_and_grow(
        self, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "nötes 📝"
        folder.mkdir()
        rows = make_pairs(41)
        for row in rows[:40]:
            (folder / f"{row['id']}.txt").write_text(f"{row['anchor']}\n\n{row['positive']}\n")
        small = ["--local-data-dir", str(folder), "storage.run=notes", "data.validation_fraction=1e-6"]
        small += ["training.max_steps=4", "evaluation.held_out_queries=3"]
        code, last, _, err = job(capsys, "run", *small)
        assert code == 0, err
        assert last["metrics"]["prepare"]["splits"] == {"train": 36, "validation": 4}
        assert last["metrics"]["embed"]["rows"] == 40
        assert last["metrics"]["evaluate"]["held-out"]["queries"] == 3
        assert "holding out 4 of 40 records" in err
        assert "train: batches of 9, because the training split has only 36 records" in err
        assert "tep run --config fine_tune" in err
        (folder / "new.txt").write_text(f"{rows[40]['anchor']}\n\n{rows[40]['positive']}\n")
        code, last, _, err = job(capsys, "run", *small)
        assert code == 0, err
        assert last["metrics"]["embed"]["rows"] == 41
        assert "1 records new, 0 changed, 0 removed" in err
        code, found, _, _ = job(
            capsys, "search", "storage.run=notes", str(rows[40]["positive"]), "--json", "--limit", "1"
        )
        assert (code, found[0]["text"]) == (0, rows[40]["positive"])

    def test_too_few_records_are_refused_in_one_sentence(
        self, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for row in make_pairs(3):
            (tmp_path / f"{row['id']}.txt").write_text(f"{row['anchor']}\n\n{row['positive']}\n")
        code, _, _, err = job(capsys, "train", "--local-data-dir", str(tmp_path), "storage.run=few")
        assert code == 2
        assert "data.sources: found 3 records; training needs 4 or more" in err
