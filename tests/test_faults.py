"""Whole jobs as processes: stopped, killed. Run by `make test-slow`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lancedb
import psutil
import pytest

from tests.conftest import make_pairs, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]
WAIT_S = 600
_TEMPORARY = tempfile.TemporaryDirectory(prefix="t")  # a short name: Ray's sockets lie under it
TEMPORARY = Path(_TEMPORARY.name)


def write_config(folder: Path, pairs: int = 4000, **training: Any) -> Path:
    config = {
        "storage": {"root": str(folder / "store"), "run": "r"},
        "data": {"sources": [{"name": "pages", "type": "json", "path": str(folder / "pairs.jsonl")}]},
        "tokenizer": {"vocab_size": 800, "max_length": 24},
        "model": {"d_model": 64, "d_ff": 64},
        "training": {"global_batch_size": 64, "max_steps": 300, "validate_every_steps": 50, **training},
        "checkpointing": {"every_steps": 25},
        "logging": {"level": "DEBUG"},
        "evaluation": {"held_out_queries": 20},
    }
    write_jsonl(folder / "pairs.jsonl", make_pairs(pairs))
    (folder / "c.yaml").write_text(json.dumps(config))
    return folder / "c.yaml"


class JobProcess:
    """A job run as a user runs it, in a process of its own."""

    def __init__(self, name: str, config: Path, *args: str, environment: dict[str, str] | None = None) -> None:
        self.log = config.parent / f"{name}-{time.monotonic_ns()}.err"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PIPELINE_"))}
        environment = inherited | {"TMPDIR": str(TEMPORARY)} | (environment or {})
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, f"jobs/{name}.py", "--config", str(config), *args],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.children: set[psutil.Process] = set()

    def wait_for(self, text: str) -> None:
        """Until the log says so; fails where the job ends first."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.log.read_text():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.log.read_text()}"
            time.sleep(0.1)
        self.children |= set(psutil.Process(self.process.pid).children(recursive=True))

    def end(self) -> tuple[int, dict[str, Any]]:
        out, _ = self.process.communicate(timeout=WAIT_S)
        assert "Traceback" not in self.log.read_text()
        return self.process.returncode, json.loads(out.splitlines()[-1])

    def kill(self) -> None:
        """SIGKILL, and wait for the workers to be gone; Ray's agents, which are idle, take a minute to notice."""
        self.children -= set(self.descendants("ray::DashboardAgent") + self.descendants("ray::RuntimeEnvAgent"))
        self.process.kill()
        self.process.wait()
        assert self.leftovers(WAIT_S) == []

    def descendants(self, name: str) -> list[psutil.Process]:
        """Its processes whose command line has this name, by when they were started."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def leftovers(self, timeout_s: float = 15) -> list[str]:
        """Processes of the job's that outlive it by more than a moment."""
        _, alive = psutil.wait_procs(list(self.children), timeout=timeout_s)
        return [str(p) for p in alive]


def wait_until(true: Callable[[], object], job: JobProcess) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.005)


def run(name: str, config: Path, *args: str) -> dict[str, Any]:
    job = JobProcess(name, config, *args)
    code, last = job.end()
    assert code == 0, job.log.read_text()
    return last


def rows_and_ids(folder: Path) -> tuple[int, int]:
    db = lancedb.connect(str(folder / "store" / "lancedb"))
    ids = db.open_table(db.list_tables().tables[0]).to_arrow()["id"].to_pylist()
    return len(ids), len(set(ids))


def test_ctrl_c_in_each_stage_and_the_next_run_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stages = [
        "prepare: read and judge: begins",
        "train: begins",
        "train: step 50:",
        "embed: begins",
        "evaluate: encode held-out: begins",
    ]
    for stage in stages:
        job = JobProcess("run", config)
        job.wait_for(stage)
        job.process.send_signal(signal.SIGINT)
        code, last = job.end()
        assert (code, last["status"]) == (130, "stopped"), job.log.read_text()
        assert "stopped by SIGINT" in job.log.read_text()
        assert job.leftovers() == []
    finished = run("run", config)
    assert finished["metrics"]["train"]["step"] == 300
    assert rows_and_ids(tmp_path) == (finished["metrics"]["prepare"]["rows_kept"],) * 2
    assert "on from step" in (tmp_path / "store" / "runs" / "r" / "training.log").read_text()
    assert [p.name for p in TEMPORARY.iterdir() if p.name != "ray"] == []


def prepared_bytes(folder: Path) -> dict[str, str]:
    (manifest,) = folder.glob("store/prepared/*/manifest.json")
    return {
        str(path.relative_to(manifest.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(manifest.parent.rglob("*"))
        if path.suffix in (".parquet", ".json") and path.name != "manifest.json"
    }


def test_the_same_bytes_on_1_and_4_workers_and_killed_in_each_stage(tmp_path: Path) -> None:
    """Kills are SIGKILL, each once the stage has some of its files; the next start does not wait for the dead."""
    path = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(150_000))
    overrides = ["data.near_duplicates.threshold=0.8", f"data.sources.0.path={path}"]
    found = []
    for workers in (1, 4):
        config = write_config(tmp_path / str(workers), pairs=1)
        script = (
            "import sys; from pipeline.runtime.session import Board, set_environment; set_environment(); "
            "from pipeline.config import load; from pipeline.data.prepare import prepare; import ray; "
            f"ray.init(address='local', num_cpus={workers}, include_dashboard=False, log_to_driver=False); "
            "prepare(load(sys.argv[1], sys.argv[2:]), Board)"
        )
        command = [sys.executable, "-c", script, str(config), *overrides]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=WAIT_S)
        found.append(prepared_bytes(tmp_path / str(workers)))
    assert found[0] == found[1]
    assert sum(name.startswith("train/") for name in found[0]) > 2

    killed = tmp_path / "killed"
    config = write_config(killed, pairs=1)
    done: dict[str, int] = {}
    for output in ("judged/*.json", "counts/*.json", "keys/*.npy", "gone/*.parquet", "described/*.json"):
        job = JobProcess("prepare", config, *overrides)
        deadline = time.monotonic() + WAIT_S
        while not list(killed.glob(f"store/stages/*/scratch/{output}")):
            assert job.process.poll() is None, f"ended before {output}:\n{job.log.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.wait_for("prepare")
        job.process.kill()
        job.process.wait()
        finished = {str(p): p.stat().st_mtime_ns for p in killed.glob("store/stages/*/done.json")}
        assert done.items() <= finished.items()  # nothing that was done is done again
        done = finished
    run("prepare", config, *overrides)
    assert len(done) == 3
    assert prepared_bytes(killed) == found[0]
    assert job.leftovers(WAIT_S) == []
