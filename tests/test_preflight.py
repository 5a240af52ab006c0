"""What a cluster must have before a job is let loose on it; and `--check`, which looks and does no more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, ConfigError, load
from pipeline.core.cluster import NODE_ID, Cluster, Node
from pipeline.core.outcome import Finding, check_disk_space, findings_table, raise_findings
from pipeline.preflight import (
    View,
    check_data,
    check_encoding,
    check_key,
    check_seen,
    check_spilling,
    check_training,
    checkpoint_bytes,
)
from tests.test_jobs import Job


def cluster(*nodes: tuple[float, float, dict[str, str] | None]) -> Cluster:
    """Nodes of CPUs, GPUs and labels; those without any, None, may be added."""
    return Cluster(tuple(Node(*node) for node in nodes), "")


def config(tmp_path: Path, **scaling: Any) -> Config:
    (tmp_path / "c.yaml").write_text(json.dumps({"scaling": scaling, "training": {"global_batch_size": 64}}))
    return load(tmp_path / "c.yaml", environ={})


def wrong(findings: Iterable[Finding]) -> list[str]:
    return [str(each.error) for each in findings if each.error]


CPU, GPU = {"pool": "cpu"}, {"pool": "gpu"}
PLAIN: dict[str, str] = {}
APART = {"data": CPU, "train": GPU}

FITS = [
    ({}, [(2, 0, PLAIN)]),
    ({"cpus_per_worker": 1}, [(2, 0, PLAIN), (1, 0, PLAIN)]),  # and one CPU is left, though not on its own node
    ({"cpus_per_worker": 1}, [(1, 0, PLAIN), (2, 0, None)]),  # once it has grown
    ({"num_workers": [1, 8], "cpus_per_worker": 1}, [(2, 0, PLAIN)]),  # the fewest count
    ({"gpus_per_worker": 1, "num_workers": 2}, [(4, 1, PLAIN), (4, 1, PLAIN)]),
    ({"gpus_per_worker": 0.5, "num_workers": 4}, [(8, 2, PLAIN)]),
    ({"num_workers": 4, "cpus_per_worker": 4}, [(16, 0, GPU), (1, 0, CPU)], APART),  # training's nodes may be full
]
LACKS = [
    ({"cpus_per_worker": 1}, [(2, 0, PLAIN)], "allowed are 1 workers of 1, or scaling.cpus_per_worker=0.5"),
    ({"num_workers": 1, "cpus_per_worker": 1}, [(1, 0, PLAIN)], "allowed is a cluster with more CPUs"),
    ({"cpus_per_worker": 2}, [(3, 0, PLAIN), (1, 0, PLAIN), (1, 0, PLAIN)], "but the nodes hold only 1"),
    (
        {"gpus_per_worker": 1, "num_workers": 2},
        [(8, 1, PLAIN)],
        "found 2 workers of 1 GPUs each, but the cluster has or can add only 1 GPUs",
    ),
    ({"gpus_per_worker": 2, "num_workers": 1}, [(8, 1, PLAIN), (8, 1, None)], "the largest node has 8 CPUs and 1 GPUs"),
    ({"num_workers": 4, "cpus_per_worker": 4}, [(16, 0, CPU), (9, 0, GPU)], "allowed are 2 workers of 4", APART),
    ({}, [(8, 0, CPU)], "scaling.labels.train: found no node with pool=gpu", {"train": GPU}),
    ({}, [(8, 0, GPU)], "scaling.labels.data: found no node with pool=cpu", APART),
]


@pytest.mark.parametrize("case", FITS, ids=str)
def test_training_that_fits(case: Any, tmp_path: Path) -> None:
    wanted, nodes, labels = (*case, {})[:3]
    assert wrong(check_training(config(tmp_path, **wanted, labels=labels), cluster(*nodes))) == []


@pytest.mark.parametrize("case", LACKS, ids=str)
def test_training_that_does_not_fit(case: Any, tmp_path: Path) -> None:
    wanted, nodes, words, labels = (*case, {})[:4]
    (found,) = wrong(check_training(config(tmp_path, **wanted, labels=labels), cluster(*nodes)))
    assert words in found
    assert found.startswith("scaling")


def test_what_is_said_to_fit_fits(tmp_path: Path) -> None:
    """The largest share that a refusal allows is one that passes, and a little more does not."""
    for cpus, workers in [(2, 2), (4, 3), (7.5, 4), (16, 5)]:
        nodes = cluster((cpus, 0, PLAIN))
        (found,) = wrong(check_training(config(tmp_path, num_workers=workers, cpus_per_worker=cpus), nodes))
        share = float(found.rpartition("=")[2])
        assert not wrong(check_training(config(tmp_path, num_workers=workers, cpus_per_worker=share), nodes))
        assert wrong(check_training(config(tmp_path, num_workers=workers, cpus_per_worker=share * 1.01), nodes))


def test_data_and_encoders_need_a_node_of_their_labels(tmp_path: Path) -> None:
    split = config(tmp_path, labels={"data": CPU, "encode": GPU})
    assert not wrong([check_data(split, cluster((1, 0, CPU))), check_encoding(split, cluster((1, 1, GPU)))])
    assert "pool=cpu" in wrong([check_data(split, cluster((1, 0, GPU)))])[0]
    assert "no node with a CPU" in wrong([check_data(split, cluster((0.5, 0, CPU), (0.5, 0, CPU)))])[0]
    assert "pool=gpu" in wrong([check_encoding(split, cluster((1, 0, CPU)))])[0]
    with pytest.raises(ConfigError, match="an encode that also has a value for pool"):
        config(tmp_path, labels={"data": CPU, "encode": {"kind": "gpu"}})


def test_what_other_nodes_do_not_see_is_refused() -> None:
    views = [View("a", (), True, 1, 1), View("b", ("storage.root",), False, 1, 1)]
    assert wrong([check_seen("storage.root", "/data", [])]) == []
    assert wrong([check_seen("storage.root", "/data", views[:1])]) == []
    (found,) = wrong([check_seen("storage.root", "/data", views)])
    assert found.startswith("storage.root: found /data, which b does not see; allowed with more than one node is")
    assert wrong([check_key(views[:1])]) == []
    assert wrong([check_key(views)])[0].startswith("embedding.store: found no PINECONE_API_KEY on b; set it where")


def test_disks_have_room(tmp_path: Path) -> None:
    assert wrong([check_disk_space("storage.root", tmp_path / "new" / "deep", 1, "prepare")]) == []
    (found,) = wrong([check_disk_space("storage.root", tmp_path, 1e18, "prepare")])
    assert "1,000,000,000.00 GB; free some space or use a folder on another disk" in found
    assert wrong([check_spilling([View("a", (), True, 6, 100), View("b", (), True, 50, 100)])]) == []
    (found,) = wrong([check_spilling([View("a", (), True, 4, 100), View("b", (), True, 50, 100)])])
    assert "more than 95% full on a, so Ray cannot" in found


def test_the_estimate_of_checkpoints_is_near_what_torch_writes(tmp_path: Path) -> None:
    from pipeline.model.transformer import Encoder, EncoderShape, parameter_count

    small = config(tmp_path)
    encoder = Encoder(EncoderShape(vocab_size=16_000, **small.model.dimensions()))
    written = parameter_count(encoder) * (12 * 3 + 4)  # two kept and one under way, with moments; the best without
    assert checkpoint_bytes(small, 16_000) == pytest.approx(written, rel=0.2)


def test_all_that_is_wrong_is_said(caplog: pytest.LogCaptureFixture) -> None:
    findings = [Finding("a", "1"), Finding("b", "2", ConfigError("first")), Finding("c", "3", ConfigError("second"))]
    with caplog.at_level("ERROR", "pipeline"), pytest.raises(ConfigError, match="second"):
        raise_findings(findings)
    assert [record.getMessage() for record in caplog.records] == ["first"]
    raise_findings(findings[:1])
    table = [line.split() for line in findings_table(findings).splitlines()[2:]]
    assert table == [["a", "ok", "1"], ["b", "no", "2"], ["c", "no", "3"]]


def test_the_driver_s_node_is_not_among_the_others() -> None:
    nodes = (Node(1, 0, {NODE_ID: "x"}), Node(1, 0, {NODE_ID: "y"}), Node(1, 0, None))
    assert Cluster(nodes, "x").others == ["y"]


@pytest.mark.usefixtures("ray_cluster")
def test_check_looks_and_does_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path)
    code, last, _, err = job(capsys, "run", "--check")
    assert code == 0, err
    assert last["metrics"]["cluster"] == "1 node, 2 CPUs, 0 GPUs"
    assert {"training", "encoding", "store", "spilling", "storage.root", "room, prepare"} <= last["metrics"].keys()
    assert "preflight" in err
    left = {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert left == {"training.log"}
    wanted = ["scaling.cpus_per_worker=4", "scaling.labels.encode={pool: gpu}", "training.global_batch_size=32"]
    wanted += ["embedding.store=pinecone", "pinecone.host=http://127.0.0.1:9", "pinecone.max_attempts=1"]
    code, last, _, err = job(capsys, "run", "--check", *wanted)
    assert (code, last["status"]) == (1, "failed")
    for words in ("scaling: found 2 workers of 4 CPUs", "scaling.labels.encode: found no", "embedding.store: found no"):
        assert words in err
    assert job(capsys, "prepare", "--check", "scaling.cpus_per_worker=4")[0] == 0  # of no matter there
