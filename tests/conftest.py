"""One Ray session for all tests of a process, jobs in that process, and small data made here."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pipeline.commands.tep import run_command
from pipeline.core.session import LOCAL_ENVIRONMENT, Progress, set_environment
from tests.bucket_servers import CREDENTIALS

for name in ("RAY_ADDRESS", "PIPELINE_STORAGE"):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of tiny products that wait for each other keep all cores busy
FOR_RAY = {
    "RAY_worker_niceness": "0",  # not 15, at which other tests leave Ray's workers next to nothing
    **LOCAL_ENVIRONMENT,
    # On a loaded machine processes come up late
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
}
"""Settings of Ray for the tests and for the jobs that they start as processes."""
for name, value in FOR_RAY.items():
    os.environ.setdefault(name, value)
os.environ |= CREDENTIALS  # in Ray's workers too, which are older than the servers of tests
set_environment()  # before anything imports Ray
# The same inputs in every run, without a time limit for each. A property test in the slow tier tries max_examples=1000.
hypothesis.settings.register_profile("pipeline", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("pipeline")

TOPICS = ["invoice", "kernel", "violin", "glacier", "pepper", "satellite", "carpet", "enzyme", "lantern", "harbour"]
VERBS = ["open", "merge", "count", "rotate", "compress", "validate", "sort", "translate", "archive", "measure"]


def make_pairs(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Pairs whose anchor and positive share two rare words, so that a model can learn to match them."""
    chance = random.Random(seed)
    rows = []
    for i in range(count):
        topic, verb, code = chance.choice(TOPICS), chance.choice(VERBS), f"{chance.randrange(16**4):04x}"
        rows.append(
            {
                "id": f"doc{i}",
                "anchor": f"{verb} the {topic} {code}",
                "positive": f"This page says how to {verb} a {topic} with reference {code} in the usual way.",
                "line": i,
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_here(capsys: pytest.CaptureFixture[str], name: str, *args: str) -> tuple[int, Any, str, str]:
    """A job in this process: its exit code, its last line, all of stdout, and stderr."""
    code = run_command(name, [*args])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), out, err


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need Ray first: they take longest, and processes that share the tests get a file at a time."""
    with_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in with_ray)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray session of two CPUs, whatever the machine has, for all tests of this process. Yields its address."""
    import ray

    from pipeline.core.session import configure_ray_data

    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    configure_ray_data()
    yield context.address_info["gcs_address"]
    ray.shutdown()


@functools.cache
def progress() -> Progress:
    """One progress for all tests of this process: each is an actor, which takes a process's start."""
    return Progress()


def no_progress() -> Progress:
    raise AssertionError("Ray was asked for")


@pytest.fixture
def shared_ray(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that the test starts as processes connect to this process's Ray session in place of starting one each."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)


@pytest.fixture(scope="session")
def trained_alone(ray_cluster: str) -> Path:
    """A folder with the run `r` of `write_config`, which nothing has disturbed: 300 steps on two workers, embedded."""
    from tests.job_process import UNDISTURBED, JobProcess, prepared_alone, write_config

    folder = prepared_alone()
    config = write_config(folder, **UNDISTURBED)
    last = JobProcess("run", config, RAY_ADDRESS=ray_cluster).finish()
    (folder / "last.json").write_text(json.dumps(last))
    return folder
