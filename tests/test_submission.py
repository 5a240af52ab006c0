"""Jobs submitted to a head node with dashboard and token authentication, as a user does it: by Ray's own commands.

A key is planted in the environment that `ray start` is given, where a user's would be; the job uses it, and in the end
it stands nowhere. Run by `make test-slow`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import make_pairs, write_jsonl
from tests.job_process import ROOT, TEMPORARY, WAIT_S, environment, free_ports
from tests.pinecone_server import pinecone_server
from tests.test_loopback import outside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Head:
    """A head node, and the environment to submit to it from."""

    process: psutil.Process
    environment: dict[str, str]
    token: str
    address: str
    session: Path
    said: str = ""

    def ray(self, *arguments: str) -> str:
        """What a command of Ray's prints."""
        done = subprocess.run(
            ["ray", *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=WAIT_S
        )
        self.said += done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, path: str, token: str | None = None) -> str:
        """What the dashboard answers."""
        request = urllib.request.Request(self.environment["RAY_API_SERVER_ADDRESS"] + path)
        request.add_header("Authorization", f"Bearer {self.token if token is None else token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def wait_for(self, true: Callable[[], bool], job: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not true():
            assert time.monotonic() < deadline, self.ask(f"/api/jobs/{job}/logs")
            time.sleep(0.5)

    def log(self, job: str) -> str:
        return str(json.loads(self.ask(f"/api/jobs/{job}/logs"))["logs"])

    def status(self, job: str) -> str:
        return str(json.loads(self.ask(f"/api/jobs/{job}"))["status"])


@contextmanager
def head_node(folder: Path, secret: dict[str, str]) -> Iterator[Head]:
    """`ray start --head` on loopback. Whoever submits knows the token, and not the secret."""
    port, dashboard, client, agent = free_ports(4)
    token, session = secrets.token_hex(32), TEMPORARY / "head"
    (folder / "token").write_text(token)
    of_user = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(folder / "token"),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    of_head = of_user | secret | {"PIPELINE_STORAGE": str(folder / "store"), "RAY_JOB_STOP_WAIT_TIME_S": "75"}
    command = ["ray", "start", "--head", "--block", "--port", str(port), "--num-cpus", "2", "--disable-usage-stats"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--temp-dir", str(session)]
    command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=of_head, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_S
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        submitter = of_user | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        yield Head(psutil.Process(head.pid), submitter, token, f"127.0.0.1:{port}", session)
    finally:
        children = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        head.wait(timeout=120)
        for child in psutil.wait_procs(children, timeout=30)[1]:
            child.kill()


def files_with(words: list[str], *folders: Path) -> list[str]:
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                found += [f"{path}: {word}" for word in words if word.encode() in content]
    return found


def refused(head: Head, arguments: list[str]) -> tuple[int, str]:
    """The exit code, and the words, of a job that comes to the head with another token."""
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH_TOKEN")}
    environment |= {"RAY_ADDRESS": head.address, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [
        sys.executable,
        "jobs/prepare.py",
        "--check",
        *arguments,
        f"storage.root={head.session.parent / 'other'}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    return done.returncode, done.stderr


def trains(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() and "loss" in (folder / "metrics.jsonl").read_text()


def newest_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself."""
    return dict(
        max((json.loads(p.read_text()) for p in folder.glob("attempt-*/step-*/state.json")), key=itemgetter("step"))
    )


@pytest.mark.parametrize("sweep", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_submitted_stopped_and_submitted_again_and_no_secret_is_left(sweep: bool, tmp_path: Path) -> None:
    key, pairs, run_dir = f"pcsk-{secrets.token_hex(16)}", tmp_path / "pairs.jsonl", tmp_path / "store/runs/r"
    write_jsonl(pairs, make_pairs(4000))
    with pinecone_server(key) as pinecone, head_node(tmp_path, {"PINECONE_API_KEY": key}) as head:
        arguments = ["--config", "configs/pairs.yaml", "storage.run=r", "logging.level=DEBUG"]
        arguments += [f"data.sources=[{{name: pages, type: json, path: {pairs}}}]", "tokenizer.vocab_size=800"]
        arguments += ["tokenizer.max_length=24", "model.d_model=64", "model.d_ff=64", "training.global_batch_size=64"]
        arguments += ["training.max_steps=100000", "training.max_epochs=null", "training.validate_every_steps=100000"]
        arguments += ["checkpointing.every_steps=100000", "evaluation.held_out_queries=20", "embedding.store=pinecone"]
        arguments += [f"pinecone.host={pinecone.url}", "pinecone.create=true"]

        def submit(job: str, entry: str, *more: str, wait: bool = True) -> str:
            options = ["--working-dir", ".", "--submission-id", job, *([] if wait else ["--no-wait"])]
            return head.ray("job", "submit", *options, "--", "python", f"jobs/{entry}.py", *arguments, *more)

        with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
            head.ask("/api/jobs/", token="of somebody else")
        code, sentence = refused(head, arguments)
        assert code == 1
        assert f"prepare: RAY_ADDRESS: cannot connect to the cluster at {head.address}" in sentence
        submit("first", "train", wait=False)
        head.wait_for(lambda: trains(run_dir) or head.status("first") == "FAILED", "first")
        assert "RUNNING" in head.ray("job", "status", "first")
        sockets, places = outside([head.process, *head.process.children(recursive=True)])
        assert sockets > 2
        assert places == set()
        head.ray("job", "stop", "first")
        head.wait_for(lambda: head.status("first") == "STOPPED", "first")
        said = head.ray("job", "logs", "first")
        assert "train: stopped by SIGTERM; run the same command to continue" in said
        assert '"status": "stopped"' in said
        left = newest_state(run_dir)
        assert left["step"] > 0

        said = submit("second", "run", f"training.max_time_s={left['train_seconds'] + 4}")
        assert "succeeded" in said
        assert f", from step {left['step']:,}" in said
        assert newest_state(run_dir)["step"] > left["step"]
        assert key in pinecone.keys
        (spaces,) = pinecone.records.values()
        rows = json.loads(said[said.index('{"job": "run"') :].splitlines()[0])["metrics"]["embed"]["rows"]
        assert sum(map(len, spaces.values())) == rows > 3000

        if sweep:
            swept = submit("third", "tune", "storage.run=s", "tune.trials=2", "tune.max_steps=20")
            assert "succeeded" in swept
            assert list((tmp_path / "store/runs/s").rglob("best.yaml"))

        shown = head.ray("job", "list")
        assert "SUCCEEDED" in shown
        for path in ("jobs/", "v0/actors?detail=1", "v0/tasks?detail=1", "v0/runtime_envs?detail=1"):
            head.said += head.ask(f"/api/{path}")
        assert "EncodeTexts" in head.said
        words = [key, head.token]
        assert [word for word in words if word in head.said] == []
        assert files_with(words, head.session, tmp_path / "store") == []
        assert len(files_with(["train: step"], head.session, tmp_path / "store")) > 0  # it is there that one would look
    assert files_with(words, head.session, tmp_path / "store") == []
