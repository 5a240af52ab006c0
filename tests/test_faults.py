"""Whole jobs as processes: stopped, killed. Run by `make test-slow`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.outcome import JobError
from pipeline.training.fit import own_sentence
from tests.job_process import (
    ROOT,
    TEMPORARY,
    WAIT_S,
    JobProcess,
    environment,
    prepared_bytes,
    rows_and_ids,
    run,
    wait_until,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_ctrl_c_in_each_stage_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """Each job starts a Ray session of its own, which Ctrl-C must end."""
    config, before = write_config(tmp_path), set(TEMPORARY.iterdir())
    stages = [
        "prepare: read and filter: begins",
        "train: step 50:",
        "evaluate: encode held-out: begins",
        "embed: begins",
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
    assert ", from step" in (tmp_path / "store" / "runs" / "r" / "training.log").read_text()
    assert [p.name for p in {*TEMPORARY.iterdir()} - before if p.name != "ray"] == []


PREPARE = """
import sys
from pipeline.core.session import Progress, set_environment
set_environment()
import ray
from pipeline.config import load
from pipeline.data import prepare
from pipeline.data import sources
prepare.SHARD_BYTES, sources.TASK_BYTES = 1 << 17, 1 << 16
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)
prepare.prepare(load(sys.argv[2], sys.argv[3:]), Progress)
"""


@pytest.mark.usefixtures("shared_ray")
def test_the_same_bytes_on_1_and_4_workers_and_killed_in_each_stage(tmp_path: Path) -> None:
    """Kills are SIGKILL, each once the stage has some of its files; the next start does not wait for the dead."""
    option = "data.near_duplicates.threshold=0.8"
    found = []
    for workers in (1, 4):
        config = write_config(tmp_path / str(workers), pairs=12_000)
        command = [sys.executable, "-c", PREPARE, str(workers), str(config), option]
        subprocess.run(command, cwd=ROOT, env=environment(RAY_ADDRESS=""), check=True, timeout=WAIT_S)
        found.append(prepared_bytes(tmp_path / str(workers)))
    assert found[0] == found[1]
    assert sum(name.startswith("train/") for name in found[0]) > 2

    killed = tmp_path / "killed"
    config = write_config(killed, pairs=12_000)
    done: dict[str, int] = {}
    for output in ("*-filter/*.json", "*-duplicates/*.json", "keys/*.parts", "dropped/*.parquet", "*-tokenize/*.json"):
        job = JobProcess("prepare", config, option)
        wait_until(lambda output=output: list(killed.glob(f"store/stages/*/scratch/{output}")), job)
        job.process.kill()
        job.process.wait()
        finished = {str(p): p.stat().st_mtime_ns for p in killed.glob("store/stages/*/manifest.json")}
        assert done.items() <= finished.items()  # nothing that was done is done again
        done = finished
    job = JobProcess("prepare", config, option)
    job.finish()
    assert len(done) == 3
    assert prepared_bytes(killed) == found[0]
    assert job.leftovers() == []


def test_an_error_of_ours_is_found_in_what_ray_data_raises(ray_cluster: str) -> None:
    """As training does with a damaged shard, whose error passes through Ray Data before Ray Train."""
    import ray.data

    def read(batch: Any) -> Any:
        raise JobError("train/00000.parquet is damaged: delete it")

    with pytest.raises(Exception) as caught:  # noqa: PT011 (Ray names no class for it)
        ray.data.range(1).map_batches(read).materialize()
    assert own_sentence(str(caught.value).splitlines()) == "train/00000.parquet is damaged: delete it"
    assert own_sentence(["ValueError: no"]) is None
