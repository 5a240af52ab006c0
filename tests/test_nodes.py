"""Several nodes for real, on one machine: raylets of two kinds, whose work goes where the config says, and which are
killed in mid-run. Run by `make test-slow`."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.index.encoder import TextEncoder
from tests.job_process import UNDISTURBED, JobProcess, prepared_bytes, wait_until, weights, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CPU, GPU = {"pool": "cpu"}, {"pool": "gpu"}
PLACED = (
    "scaling.labels={data: {pool: cpu}, train: {pool: gpu}, encode: {pool: gpu}}",
    "scaling.placement=spread",
    "scaling.max_failures=8",
)


class Nodes:
    """A head without CPUs for work, as in ray_cluster.yaml, and labelled nodes of one CPU; and what ran on each."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.kinds: dict[int, str] = {self._raylet(self.cluster.head_node): "head"}
        self.ran: dict[int, set[str]] = defaultdict(set)

    def add(self, labels: dict[str, str]) -> Any:
        node = self.cluster.add_node(num_cpus=1, labels=labels)
        self.kinds[self._raylet(node)] = labels["pool"]
        return node

    def kill(self, node: Any) -> None:
        """The raylet and all of its workers at once, as a machine that loses its power."""
        raylet = psutil.Process(self._raylet(node))
        for process in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def _raylet(self, node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)

    def look(self) -> None:
        """Note the titles that Ray gives its workers' processes: the task or actor that each is at."""
        for raylet in list(self.kinds):
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(raylet).children():
                    with suppress(psutil.NoSuchProcess):
                        self.ran[raylet].add(" ".join(process.cmdline()))

    def at_work(self, node: Any, title: str) -> bool:
        self.look()
        return any(title in each for each in self.ran[self._raylet(node)])

    def places(self, title: str) -> list[str]:
        """The kind of each node that something of this title ran on."""
        return [self.kinds[raylet] for raylet, titles in self.ran.items() if any(title in each for each in titles)]


@contextmanager
def nodes_of_two_kinds() -> Iterator[Nodes]:
    nodes = Nodes()
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.05):
            nodes.look()

    watcher = threading.Thread(target=follow, daemon=True)
    try:
        watcher.start()
        yield nodes
    finally:
        ended.set()
        watcher.join()
        nodes.cluster.shutdown()


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_nodes_are_lost_and_nothing_else_is(
    everything: bool, trained_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prepare a node that reads, of training one that trains, of embedding one that reads and one that encodes.

    What is left in the end is what one machine makes when it is left alone: bytes and bits, and of each text the
    vector that the model gives it here. With everything: of training one that reads too; a sweep; installed packages.
    """
    config = write_config(tmp_path, **UNDISTURBED)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the head is of this process, which has read another mode
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")  # of the head, which then misses a node after five of them
    with nodes_of_two_kinds() as nodes:
        readers, trainers = [nodes.add(CPU)], [nodes.add(GPU), nodes.add(GPU)]
        access = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": nodes.cluster.address}

        def start(name: str, *args: str) -> JobProcess:
            return JobProcess(name, config, *PLACED, *args, **access)

        job = start("prepare")
        wait_until(lambda: list(tmp_path.glob("store/stages/records-*/scratch/prepare-read-and-filter/*.json")), job)
        nodes.kill(readers.pop())
        readers.append(nodes.add(CPU))
        job.finish()
        assert "4 nodes, 3 CPUs, 0 GPUs" in job.log.read_text()
        assert f"{tmp_path / 'store'}, seen by the 3 other nodes" in job.log.read_text()
        assert prepared_bytes(tmp_path) == prepared_bytes(trained_alone)
        assert set(nodes.places("MapBatches(run)")) == {"cpu"}

        job = start("train")
        job.wait_for("train: step 50:")
        assert nodes.places("RayTrainWorker") == ["gpu", "gpu"]
        nodes.kill(trainers.pop())
        if everything:
            job.wait_for("train: step 100:")
            nodes.kill(readers.pop())
            readers.append(nodes.add(CPU))
        trained = job.finish()
        assert trained["metrics"]["step"] == 300
        assert weights(tmp_path) == weights(trained_alone)
        assert set(nodes.places("MapBatches(read)")) == {"cpu"}

        trainers.append(nodes.add(GPU))
        if everything:
            job = start("tune", "storage.run=s", "tune.trials=2", "tune.max_steps=50", "tune.scheduler=none")
            swept = job.finish()["metrics"]
            assert "tune: running 2 of 2 trials, 2 at a time" in job.log.read_text()
            assert (swept["done"], set(nodes.places("ImplicitFunc"))) == (2, {"gpu"})

        job = start("embed", "embedding.batch_tokens=1024")
        wait_until(lambda: nodes.at_work(trainers[-1], "EncodeTexts"), job)
        nodes.kill(trainers.pop())
        nodes.kill(readers.pop())
        readers.append(nodes.add(CPU))
        metrics = job.finish()["metrics"]
        assert set(nodes.places("EncodeTexts")) == {"gpu"}
        assert set(nodes.places("MapBatches(due)")) == {"cpu"}

        if everything:
            packages = json.dumps([{"name": "p", "type": "python_packages", "max_samples": 300}])
            job = start("prepare", "storage.run=p", f"data.sources={packages}")
            job.finish()
            assert "reading installed packages on the job's node only" in job.log.read_text()
            assert set(nodes.places("MapBatches(run)")) == {"head", "cpu"}  # the later stages
    db = lancedb.connect(str(tmp_path / "store" / "lancedb"))
    rows = db.open_table(db.list_tables().tables[0]).to_arrow().to_pylist()
    assert len({row["id"] for row in rows}) == metrics["new"] == metrics["rows"] == len(rows) > 3000
    expected = TextEncoder(Path(trained["paths"]["model"]), 1, "cpu").encode([row["text"] for row in rows], "document")
    np.testing.assert_allclose([row["vector"] for row in rows], expected, atol=1e-5)
