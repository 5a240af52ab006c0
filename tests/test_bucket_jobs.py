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

from tests.bucket_servers import CREDENTIALS, Served, s3, serving
from tests.conftest import make_pairs, run_here, write_jsonl
from tests.job_process import ROOT, TEMPORARY, UNDISTURBED, JobProcess, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def job_config(folder: Path, served: Served) -> Path:
    """The config of `trained_alone`, with its source and its root in the bucket."""
    file = write_config(folder, **UNDISTURBED)
    content = json.loads(file.read_text())
    (source,) = content["data"]["sources"]
    served.write("input/pairs.jsonl", Path(source["path"]).read_bytes())
    source["path"], content["storage"]["root"] = served.uri("input/pairs.jsonl"), served.uri("store")
    file.write_text(json.dumps(content))
    return file


def weights_in(served: Served, prefix: str, step: int = 300) -> bytes:
    name = f"step-{step:08d}/model.safetensors"
    (key,) = [key for key in served.keys(prefix) if "/attempt-" in key and key.endswith(name)]
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


@pytest.mark.usefixtures("shared_ray")
def test_a_killed_job_goes_on_from_the_bucket_alone(trained_alone: Path, tmp_path: Path) -> None:
    with s3("jobs") as served:
        alone = json.loads((trained_alone / "last.json").read_text())
        config = job_config(tmp_path / "killed", served)
        job = JobProcess("run", config)
        job.wait_for("train: step 100:")
        job.kill()
        for left in TEMPORARY.glob("text-embedding-pipeline-*"):  # as on another machine
            shutil.rmtree(left)
        job = JobProcess("run", config)
        last = job.finish()
        assert ", from step" in job.log.read_text()
        assert list(TEMPORARY.glob("text-embedding-pipeline-*/mirror-*")) == []

        (newest,) = trained_alone.glob("store/runs/r/attempt-*/step-00000300/model.safetensors")
        assert weights_in(served, "store") == newest.read_bytes()
        assert last["metrics"]["prepare"]["fingerprint"] == alone["metrics"]["prepare"]["fingerprint"]
        assert last["metrics"]["evaluate"] == alone["metrics"]["evaluate"]
        assert last["metrics"]["embed"] == alone["metrics"]["embed"]
        assert not list((tmp_path / "killed").glob("store*"))

        there = {key.removeprefix("store/runs/r/").partition("/")[0] for key in served.keys("store/runs/r/")}
        assert {"metrics.jsonl", "alerts.jsonl", "history.png", "training.log", "run.json", "best"} <= there
        assert {"config.resolved.yaml", "evaluation.json", "published.json"} <= there
        for key in served.keys("store"):
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in served.read(key), key

        query = ["open the invoice", "--json"]
        found = json.loads(elsewhere("search", config, tmp_path / "other", *query))
        expected = json.loads(elsewhere("search", trained_alone / "c.yaml", tmp_path / "same", *query))
        assert [each["id"] for each in found] == [each["id"] for each in expected]
        assert len(found) == 10
        exported = tmp_path / "exported"
        answer = json.loads(
            elsewhere("export", config, tmp_path / "third", "--to", str(exported), "--embeddings", "float16")
        )
        assert answer["metrics"]["embeddings"] == last["metrics"]["embed"]["rows"]
        assert "3,9" in (exported / "README.md").read_text()  # the data of its run


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_whole_job_on_the_other_services(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepared, trained, embedded, evaluated, searched and exported; a rerun has nothing to do, but for new data."""
    config, pages = write_config(tmp_path, pairs=800, max_steps=20), write_jsonl(tmp_path / "p.jsonl", make_pairs(800))
    config.write_text(
        config.read_text().replace(json.loads(config.read_text())["data"]["sources"][0]["path"], str(pages))
    )
    with serving(scheme, "jobs", tmp_path) as served:
        arguments = ["--config", str(config), f"storage.root={served.uri('store')}"]
        code, first, _, err = run_here(capsys, "run", *arguments)
        assert code == 0, err
        code, again, _, err = run_here(capsys, "run", *arguments)
        assert "nothing to do" in err
        assert (code, again["metrics"]["train"]) == (0, first["metrics"]["train"])
        assert again["metrics"]["embed"] == {"embedded": 0, "rows": first["metrics"]["embed"]["rows"]}
        code, _, out, _ = run_here(capsys, "search", "--json", "open the invoice", *arguments)
        assert len(json.loads(out)) == 10
        code, _, _, err = run_here(capsys, "export", "--to", served.uri("exported"), *arguments)
        assert code == 0, err
        assert {"exported/export.json", "exported/model.safetensors"} <= set(served.keys("exported/"))
        assert weights_in(served, "store", 20)
        write_jsonl(pages, [*make_pairs(800), *(dict(row, id=f"new{row['id']}") for row in make_pairs(5, seed=9))])
        code, moved, _, err = run_here(capsys, "run", *arguments)
        assert code == 0, err
        assert "model was trained: 5 records new, 0 changed, 0 removed" in err
        assert "prepare: tokenized 5 of 805 records" in err
        assert moved["paths"]["model"] == first["paths"]["model"]
        assert moved["metrics"]["embed"]["rows"] == first["metrics"]["embed"]["rows"] + 5
    assert not (tmp_path / "store").exists()
