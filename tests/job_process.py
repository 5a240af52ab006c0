"""Jobs run as a user runs them, each in a process of its own, and what tests do to them while they run.

    config = write_config(tmp_path, max_steps=300)
    job = JobProcess("train", config)
    job.wait_for("train: step 50:")
    ray_processes("RayTrainWorker")[-1].kill()
    code, last_line = job.end()

With the fixture `shared_ray`, jobs connect to the Ray session of the tests' process; without it, each job starts one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
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

from tests.conftest import FOR_RAY, make_pairs, write_jsonl

ROOT = Path(__file__).parents[1]
WAIT_S = 900
_TEMPORARY = tempfile.TemporaryDirectory(prefix="t")  # a short name: Ray's sockets lie under it
TEMPORARY = Path(_TEMPORARY.name)
_SHARED = tempfile.TemporaryDirectory(prefix="shared")
RESTING = (
    *("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"),
    *("ray::_AutoscalingCoordinatorActor", "ray::_StatsActor", "ray::ActorLocationTracker"),
    "ray::PlacementGroupCleaner",  # of Ray Train, which stays for some minutes after a controller that was killed
)
UNDISTURBED: dict[str, Any] = {"table_warmup_fraction": 0.4}
"""What a config needs for its training to end with the weights of `trained_alone`."""


def write_config(folder: Path, pairs: int = 4000, **training: Any) -> Path:
    """A config for `pairs` made-up records, which lie in one file for all tests of this process."""
    source = Path(_SHARED.name) / f"{pairs}.jsonl"
    if not source.exists():
        write_jsonl(source, make_pairs(pairs))
    config = {
        "storage": {"root": str(folder / "store"), "run": "r"},
        "data": {"sources": [{"name": "pages", "type": "json", "path": str(source)}]},
        "tokenizer": {"vocab_size": 800, "max_length": 24},
        "model": {"d_model": 64, "d_ff": 64},
        "training": {"global_batch_size": 64, "max_steps": 300, "validate_every_steps": 50, **training},
        "checkpointing": {"every_steps": 25},
        "logging": {"level": "DEBUG"},
        "evaluation": {"held_out_queries": 20},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "c.yaml").write_text(json.dumps(config))
    return folder / "c.yaml"


def prepared_alone() -> Path:
    """A folder whose store holds `write_config`'s 4,000 records, prepared. The first call prepares them."""
    folder = Path(_SHARED.name) / "alone"
    if not folder.exists():
        JobProcess("prepare", write_config(folder)).finish()
    return folder


def with_prepared(config: Path) -> Path:
    """The config, its store filled with what `prepared_alone` made."""
    copy_prepared(config.parent / "store")
    return config


def copy_prepared(root: Path) -> None:
    for name in ("prepared", "stages"):
        shutil.copytree(prepared_alone() / "store" / name, root / name)


def environment(**more: str) -> dict[str, str]:
    """This process's, without what the tests have set for their own use of Ray."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("RAY_ADDRESS", *FOR_RAY) or not name.startswith(("RAY_", "PIPELINE_", "PINECONE_"))
    }
    return kept | {"TMPDIR": str(TEMPORARY)} | more


def free_ports(count: int) -> list[int]:
    """Between Ray's own and those that the kernel hands out, so that nobody else gets one in the meantime."""
    ports: set[int] = set()
    while len(ports) < count:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as server:
            ports.add(server.getsockname()[1])
    return list(ports)


class JobProcess:
    """A job in a process of its own, with small tasks, so that a kill lands in the middle of its work."""

    def __init__(self, name: str, config: Path, *args: str, **more: str) -> None:
        """`more` goes into its environment."""
        self.log, self.before = config.parent / f"{name}-{time.monotonic_ns()}.err", set(busy())
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.small_tasks", name, "--config", str(config), *args],
                cwd=ROOT,
                env=environment(**more),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.children: set[psutil.Process] = set()

    def wait_for(self, text: str) -> None:
        """Until the log says so; fails where the job ends first."""
        wait_until(lambda: text in self.log.read_text(), self)
        self.children |= set(psutil.Process(self.process.pid).children(recursive=True))

    def end(self) -> tuple[int, dict[str, Any]]:
        """Exit code and last line. Ends a job that hangs, and shows its log."""
        try:
            out, _ = self.process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"no end after {WAIT_S} s:\n{self.log.read_text()}")
        assert "Traceback" not in self.log.read_text()
        return self.process.returncode, json.loads(out.splitlines()[-1])

    def finish(self) -> dict[str, Any]:
        """The last line of a job that succeeds."""
        code, last = self.end()
        assert code == 0, self.log.read_text()
        return last

    def kill(self) -> None:
        """SIGKILL, and wait for the workers to be gone; Ray's agents, which are idle, take a minute to notice."""
        self.children -= set(ray_processes("ray::DashboardAgent") + ray_processes("ray::RuntimeEnvAgent"))
        self.process.kill()
        self.process.wait()
        assert self.leftovers() == []

    def leftovers(self) -> list[str]:
        """Processes of the job's that are still there after WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while left := [str(p) for p in {*self.children, *busy()} - self.before if p.is_running()]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return left


def ray_processes(title: str) -> list[psutil.Process]:
    """Processes below this one whose command line has this in it, oldest first: Ray names a worker by its task."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def busy() -> list[psutil.Process]:
    """Ray's workers that are at a job's task or actor, without those that Ray keeps for all jobs."""
    resting = {process for title in RESTING for process in ray_processes(title)}
    return [process for process in ray_processes("ray::") if process not in resting]


def kill(processes: list[psutil.Process]) -> int:
    """SIGKILL. Returns 1 where there was something to kill."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return int(bool(processes))


def wait_until(true: Callable[[], object], job: JobProcess) -> None:
    """Fails where the job ends first."""
    deadline = time.monotonic() + WAIT_S
    ended = False
    while not true():
        assert not ended, f"ended before it was true:\n{job.log.read_text()}"
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.02)
        ended = job.process.poll() is not None


def run(name: str, config: Path, *args: str) -> dict[str, Any]:
    return JobProcess(name, config, *args).finish()


def rows_and_ids(folder: Path) -> tuple[int, int]:
    """Rows of the only table under the folder's store, and how many different ids they have."""
    db = lancedb.connect(str(folder / "store" / "lancedb"))
    ids = db.open_table(db.list_tables().tables[0]).to_arrow()["id"].to_pylist()
    return len(ids), len(set(ids))


def rows_there(folder: Path) -> int:
    return rows_and_ids(folder)[0] if list((folder / "store" / "lancedb").glob("*.lance/_versions/*")) else 0


def weights(folder: Path) -> bytes:
    """Those of the only checkpoint of step 300."""
    (newest,) = folder.glob("store/runs/r/attempt-*/step-00000300/model.safetensors")
    return newest.read_bytes()


def prepared_bytes(folder: Path) -> dict[str, str]:
    """The hash of each file of the only prepared data set, without the manifest's."""
    (manifest,) = folder.glob("store/prepared/*/manifest.json")
    return {
        str(path.relative_to(manifest.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(manifest.parent.rglob("*"))
        if path.suffix in (".parquet", ".json") and path.name != "manifest.json"
    }
