"""Training through Ray on machines that cannot be trusted: killed, hung, full, taken away. Run by `make test-slow`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.config import load
from pipeline.data.manifest import read_prepared
from pipeline.training.assembly import train_locally
from tests.job_process import (
    UNDISTURBED,
    WAIT_S,
    JobProcess,
    copy_prepared,
    kill,
    ray_processes,
    run,
    wait_until,
    weights,
    with_prepared,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def steps_saved(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("store/runs/r/attempt-*/step-*")}


def workers() -> list[Any]:
    return ray_processes("RayTrainWorker")


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("every_point", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_killed_anywhere_a_run_ends_with_the_same_bits(every_point: bool, trained_alone: Path, tmp_path: Path) -> None:
    """A worker hangs, both are killed amid a checkpoint's write, the controller is killed, then the driver.

    At every point: one worker is killed as well, both between checkpoints, both as a checkpoint gets its place, and
    the driver a second time.
    """
    config = with_prepared(write_config(tmp_path, **UNDISTURBED))
    arguments = ("scaling.max_failures=8", "scaling.collective_timeout_s=20")

    job = JobProcess("train", config, *arguments)
    steps = iter(f"train: step {step}:" for step in range(50, 301, 50))  # of its validations
    job.wait_for(next(steps))
    if every_point:
        workers()[-1].kill()
        job.wait_for(next(steps))
        kill(workers())
        job.wait_for(next(steps))
    hung = workers()[-1]
    hung.send_signal(signal.SIGSTOP)
    job.wait_for(next(steps))
    assert not hung.is_running()
    found, incoming = workers(), tmp_path / "store/runs/r/incoming"
    wait_until(lambda: list(incoming.glob("*/step-*/model.safetensors")), job)
    kill(found)
    job.wait_for(next(steps))
    kill(ray_processes("TrainController"))
    job.wait_for("Ray Train's controller died")
    job.kill()

    if every_point:
        job = JobProcess("train", config, *arguments)
        job.wait_for("train: begins")
        before = steps_saved(tmp_path)
        wait_until(lambda: steps_saved(tmp_path) - before, job)
        kill(workers())
        newest = max(steps_saved(tmp_path))
        wait_until(
            lambda: max(steps_saved(tmp_path), default="") > newest or "train: step 300:" in job.log.read_text(), job
        )
        job.kill()

    assert run("train", config, *arguments)["metrics"]["step"] == 300
    assert weights(tmp_path) == weights(trained_alone)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("shared_ray")
def test_sigterm_waits_for_a_checkpoint_of_all_workers(tmp_path: Path) -> None:
    """Under fsdp, where each has a part of it; the next start takes it up, and makes it whole at the end."""
    config = with_prepared(write_config(tmp_path, max_steps=100_000, validate_every_steps=100_000, strategy="fsdp"))
    job = JobProcess("train", config)
    job.wait_for("train: begins")
    wait_until(lambda: (tmp_path / "store/runs/r/attempt-001/step-00000025").is_dir(), job)
    job.process.send_signal(signal.SIGTERM)
    code, last = job.end()
    assert (code, last["status"]) == (143, "stopped")
    assert job.leftovers() == []
    newest = int(max(steps_saved(tmp_path)).removeprefix("step-"))
    lines = (tmp_path / "store/runs/r/metrics.jsonl").read_text().splitlines()
    # Not one step is lost: the newest checkpoint is of the very step that training ended at.
    assert newest > max(json.loads(line)["step"] for line in lines) - 1
    assert newest % 25 or newest % 10 == 0
    (state,) = tmp_path.glob(f"store/runs/r/attempt-001/step-{newest:08d}/state.json")
    seconds = json.loads(state.read_text())["train_seconds"]
    last = run("train", config, f"training.max_time_s={seconds + 3}")
    assert last["metrics"]["step"] > newest
    assert Path(last["paths"]["model"], "model.safetensors").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.usefixtures("shared_ray")
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_whole(small_disk: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=200)
    copy_prepared(small_disk / "store")
    arguments = (f"storage.root={small_disk / 'store'}", f"logging.save_dir={tmp_path}", "logging.level=INFO")
    job = JobProcess("train", config, *arguments)
    first = small_disk / "store/runs/r/attempt-001/step-00000025"
    wait_until(first.is_dir, job)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    code, _ = job.end()
    assert code == 1, job.log.read_text()
    assert "is full; free some space" in job.log.read_text()
    assert "the same command" in job.log.read_text()  # Ray's own file or our checkpoint: whichever came first
    filler.unlink()
    assert run("train", config, *arguments)["metrics"]["step"] == 200


def losses(folder: Path) -> dict[int, float]:
    file = folder / "store/runs/r/metrics.jsonl"
    whole = [line for line in file.open() if line.endswith("\n")] if file.exists() else []
    lines = [json.loads(line) for line in whole]
    steps = [line["step"] for line in lines if "loss" in line]
    assert len(steps) == len(set(steps))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def drain(cluster: Cluster, node: Any) -> None:
    """Tell Ray, as an autoscaler does, that a node is about to be taken away."""
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--node-id", node.node_id]
    command += ["--deadline-remaining-seconds", "60"]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)


class ReachedError(Exception): ...


def test_a_node_comes_and_goes_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker, two, and one again train on the batches of a process that was left alone; notice of a node's end
    gives a checkpoint."""
    settings: dict[str, Any] = {"max_steps": 100_000, "validate_every_steps": 100_000, "log_every_steps": 5}
    every = 97
    config = with_prepared(write_config(tmp_path, **settings))
    arguments = ("scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=2", "scaling.resize_every_s=2")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Whatever the number of workers, a CPU is left to Ray Data
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        access = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": cluster.address}
        job = JobProcess("train", config, *arguments, f"checkpointing.every_steps={every}", **access)
        job.wait_for("train: training on 1 worker")
        wait_until(lambda: steps_saved(tmp_path), job)
        second = cluster.add_node(num_cpus=2)
        job.wait_for("train: training on 2 workers")
        saved = steps_saved(tmp_path)
        wait_until(lambda: steps_saved(tmp_path) - saved, job)
        drain(cluster, second)
        wait_until(lambda: any(int(name.removeprefix("step-")) % every for name in steps_saved(tmp_path)), job)
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: job.log.read_text().count("train: training on 1 worker") == 2, job)
        saved = steps_saved(tmp_path)
        wait_until(lambda: steps_saved(tmp_path) - saved, job)
        job.process.send_signal(signal.SIGTERM)
        assert job.end()[0] == 143, job.log.read_text()
    finally:
        cluster.shutdown()
    found = losses(tmp_path)

    expected: dict[int, float] = {}

    def told(metrics: dict[str, float]) -> None:
        expected[int(metrics["step"])] = metrics["loss"]
        if metrics["step"] >= max(found):
            raise ReachedError

    alone = load(config, ["storage.run=alone"], environ={})
    (prepared,) = (tmp_path / "store" / "prepared").iterdir()
    manifest = read_prepared(prepared)
    assert manifest
    with pytest.raises(ReachedError):
        train_locally(alone, prepared, manifest, told)
    assert found.keys() <= expected.keys()
    assert len(found) > 40
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-3, abs=1e-4), step
    for step in range(5, 25, 5):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
