"""A whole job whose data and root are in a bucket, killed amid training and gone on with elsewhere.

Run by `make test-slow`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bucket_servers import CREDENTIALS, Served, s3
from tests.test_faults import ROOT, TEMPORARY, JobProcess, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def job_config(folder: Path, root: str, served: Served) -> Path:
    """Reads from the bucket, whatever its root is."""
    file = write_config(folder, pairs=2000, max_steps=120, validate_every_steps=30)
    served.write("input/pairs.jsonl", (folder / "pairs.jsonl").read_bytes())
    (folder / "pairs.jsonl").unlink()
    content = json.loads(file.read_text())
    content["storage"]["root"] = root
    content["data"]["sources"][0]["path"] = served.uri("input/pairs.jsonl")
    content["checkpointing"]["every_steps"] = 15
    content["scaling"] = {"num_workers": 2}
    file.write_text(json.dumps(content))
    return file


def weights_in(served: Served, prefix: str) -> bytes:
    (key,) = [key for key in served.keys(prefix) if "/attempt-" in key and key.endswith("00000120/model.safetensors")]
    return served.read(key)


def elsewhere(name: str, config: Path, home: Path, *args: str) -> str:
    """A job on a machine that has nothing yet. Returns its last line."""
    (home / "tmp").mkdir(parents=True)
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home / "tmp")}
    command = [sys.executable, f"jobs/{name}.py", "--config", str(config), *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("runs")) == []
    return done.stdout.splitlines()[-1]


def test_a_killed_job_goes_on_from_the_bucket_alone(tmp_path: Path) -> None:
    with s3("jobs") as served:
        alone = run("run", job_config(tmp_path / "alone", str(tmp_path / "alone" / "store"), served))
        config = job_config(tmp_path / "killed", served.uri("store"), served)
        job = JobProcess("run", config)
        job.wait_for("train: step 60:")
        job.kill()
        for left in TEMPORARY.glob("text-embedding-pipeline-*"):  # as on another machine
            shutil.rmtree(left)
        finished = JobProcess("run", config)
        code, last = finished.end()
        assert code == 0, finished.log.read_text()
        assert "on from step" in finished.log.read_text()
        assert list(TEMPORARY.glob("text-embedding-pipeline-*/mirror-*")) == []

        (newest,) = (tmp_path / "alone").glob("store/runs/r/attempt-*/step-00000120/model.safetensors")
        assert weights_in(served, "store") == newest.read_bytes()
        assert last["metrics"]["prepare"]["fingerprint"] == alone["metrics"]["prepare"]["fingerprint"]
        assert last["metrics"]["evaluate"] == alone["metrics"]["evaluate"]
        assert last["metrics"]["embed"] == alone["metrics"]["embed"]
        assert not list((tmp_path / "killed").glob("store*"))

        there = {key.removeprefix("store/runs/r/").partition("/")[0] for key in served.keys("store/runs/r/")}
        assert {"metrics.jsonl", "alerts.jsonl", "history.png", "training.log", "run.json", "best", "embedded"} <= there
        assert {"config.resolved.yaml", "evaluation.json"} <= there
        for key in served.keys("store"):
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in served.read(key), key

        query = ["open the invoice", "--json"]
        found = json.loads(elsewhere("search", config, tmp_path / "other", *query))
        expected = json.loads(elsewhere("search", tmp_path / "alone" / "c.yaml", tmp_path / "same", *query))
        assert [each["id"] for each in found] == [each["id"] for each in expected]
        assert len(found) == 10
        exported = tmp_path / "exported"
        answer = json.loads(
            elsewhere("export", config, tmp_path / "third", "--to", str(exported), "--embeddings", "float16")
        )
        assert answer["metrics"]["embeddings"] == last["metrics"]["embed"]["rows"]
        assert "1,9" in (exported / "README.md").read_text()  # the data of its run
