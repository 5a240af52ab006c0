"""What a task raises on its node is what the job says, in one sentence; and so is a signal, whenever it comes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.core.outcome import Result
from pipeline.core.session import ray_session
from pipeline.index.table import StoreError
from pipeline.job import run_job

WORDS = "Pinecone's index docs is gone; python jobs/embed.py makes it"


def fails(*_: Any) -> Any:
    raise StoreError(WORDS)


def of_a_task() -> None:
    import ray

    ray.get(ray.remote(fails).remote())


def of_a_dataset() -> None:
    import ray.data

    ray.data.range(2).map_batches(fails).materialize()


def of_an_actor() -> None:
    import ray.data

    class Fails:
        __call__ = fails

    ray.data.range(2).map_batches(Fails, compute=ray.data.ActorPoolStrategy(size=1)).materialize()


def of_a_sink() -> None:
    import ray.data

    class Sink(ray.data.Datasink[None]):
        write = fails

    ray.data.range(2).write_datasink(Sink())


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("work", [of_a_task, of_a_dataset, of_an_actor, of_a_sink])
def test_the_words_are_those_of_the_task(work: Callable[[], None]) -> None:
    with pytest.raises(StoreError) as caught, ray_session():
        work()
    assert str(caught.value) == WORDS
    assert "in fails" in str(caught.value.__cause__)  # where, for the log


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_that_is_not_ours_keeps_its_own(tmp_path: Any) -> None:
    import ray

    def reads() -> str:
        return (tmp_path / "nothing").read_text()

    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file .*/nothing'$"), ray_session():
        ray.get(ray.remote(reads).remote())


class Interrupted:
    def __set_name__(self, owner: type, name: str) -> None:
        signal.raise_signal(signal.SIGINT)


def test_a_signal_stops_a_job_that_is_importing(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Python 3.11 makes a RuntimeError of it where a class is under way."""

    def main(config: Config, args: Any) -> Result:
        type("Imported", (), {"attribute": Interrupted()})
        return Result()

    assert run_job("prepare", "", main, None, [f"storage.root={tmp_path}"]) == 130
    assert "prepare: stopped by SIGINT; run the same command to continue" in capsys.readouterr().err


@pytest.mark.slow
def test_a_path_too_long_for_sockets_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 130)
    folder.mkdir()
    job = Path(__file__).parents[1] / "jobs" / "prepare.py"
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    done = subprocess.run(
        [sys.executable, str(job), f"storage.root={tmp_path}", "--local-data-dir", str(job.parent), "--check"],
        env=environment | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("prepare: ")]
    assert f"TMPDIR: found a path of {len(str(folder))} bytes" in said
    assert "at most 107 bytes; set RAY_TMPDIR=/tmp" in said
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_folder_of_a_local_session_is_private() -> None:
    program = (
        "import os, stat, ray\n"
        "from pipeline.core.session import ray_session\n"
        "with ray_session():\n"
        "    folder = os.path.realpath(os.path.join(os.environ['RAY_TMPDIR'], 'ray', 'session_latest'))\n"
        "    print(oct(stat.S_IMODE(os.stat(folder).st_mode)))"
    )
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_TMPDIR": folder},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.splitlines()[-1] == "0o700"
