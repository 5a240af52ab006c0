"""One Ray session for all quick tests, and small data made here."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.session import set_environment
from tests.bucket_servers import CREDENTIALS

os.environ.pop("RAY_ADDRESS", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers' threads that wait for each other keep both cores busy
os.environ |= CREDENTIALS  # in Ray's workers too, which are older than the servers of tests
set_environment()  # before anything imports Ray

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


def _shares_ray(path: Path) -> bool:
    return "ray_cluster" in path.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shares = {path: _shares_ray(path) for path in {item.path for item in items}}
    items.sort(key=lambda item: not shares[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, one process takes all files of the shared Ray session, and the others a file each; slow tests, which
    share nothing, are given out one by one.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if config.option.markexpr == "slow":
                return nodeid
            return "ray" if _shares_ray(config.rootpath / file) else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs, whatever the machine has."""
    import ray

    from pipeline.runtime.session import _quiet_ray_data

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    _quiet_ray_data(None)
    yield
    ray.shutdown()
