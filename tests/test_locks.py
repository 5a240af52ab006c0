"""Locks of folders: one holder at a time, on disk and in buckets, after kills and after pauses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.core import lock
from pipeline.core.lock import LockLost, Occupied, holder_of, locked
from pipeline.core.object_store import BucketError
from pipeline.core.outcome import JobError, job_lock
from pipeline.core.path import BucketPath, as_path
from tests.bucket_servers import Served, serving

HOLDER = """
import sys, time
from pipeline.core import lock
from pipeline.core.path import as_path
lock.RENEW_EVERY_S, lock.LIMIT_S = 0.1, float(sys.argv[2])
folder = as_path(sys.argv[1])
with lock.locked(folder):
    print("in", flush=True)
    count = 0
    while True:
        count += 1
        (folder / "written").write_bytes(str(count).encode())
"""


@pytest.fixture(scope="module", params=["s3", "gs", "az"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(request.param, "store", tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def root(served: Served, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    """A folder of the test's own. Renewals are frequent, and the limit is long, unless a test says otherwise."""
    monkeypatch.setattr(lock, "RENEW_EVERY_S", 0.05)
    monkeypatch.setattr(lock, "LIMIT_S", 60)
    found = as_path(served.uri(request.node.name.partition("[")[0]))
    assert isinstance(found, BucketPath)
    return found


def holder(folder: str, limit_s: float) -> subprocess.Popen[str]:
    """A process that holds a folder and writes to it without end."""
    command = [sys.executable, "-c", HOLDER, folder, str(limit_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "in\n", process.stderr and process.stderr.read()
    return process


def test_one_holder_at_a_time(root: BucketPath) -> None:
    with job_lock(root):
        with pytest.raises(JobError, match=r"^another job is at work in (s3|gs|az)://store/"), job_lock(root):
            pytest.fail("two at once")
        assert holder_of(root)
    assert holder_of(root) == ""
    with job_lock(root):  # at once: the other has left
        pass


def test_of_many_that_begin_together_no_two_are_in(root: BucketPath) -> None:
    busy, barrier = threading.Lock(), threading.Barrier(6)

    def is_alone(_: int) -> bool:
        barrier.wait()
        with suppress(JobError), job_lock(root):
            if not busy.acquire(blocking=False):
                return False
            time.sleep(0.2)
            busy.release()
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(is_alone, range(6)))


def test_a_killed_holder_is_outlived(root: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LIMIT_S", 0.2)
    (root / ".lock").write_bytes(b'{"holder": "killed", "renewals": 7}')
    with locked(root):
        assert holder_of(root) not in ("", "killed")


def test_a_holder_that_was_paused_past_its_limit_writes_no_more(
    root: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LIMIT_S", 1.0)
    process = holder(str(root), 1.0)
    try:
        while not (root / "written").is_file():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)  # what was on its way has arrived
        with locked(root):
            before = int((root / "written").read_bytes())
            os.kill(process.pid, signal.SIGCONT)
            _, errors = process.communicate(timeout=60)
            # the write that was under way may still arrive, the next one may not
            assert int((root / "written").read_bytes()) <= before + 1
            assert holder_of(root) not in ("", "killed")
    finally:
        process.kill()
    assert process.returncode != 0
    assert "LockLost: the lock of " in errors
    assert "could not be renewed for 1 s" in errors


def test_a_holder_that_the_bucket_does_not_answer_writes_no_more(
    root: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LIMIT_S", 0.3)
    write = lock._Lease._write

    def lost(self: object, condition: object) -> bool:
        if isinstance(condition, dict):
            raise BucketError("lost")
        return write(self, condition)  # type: ignore[arg-type]

    monkeypatch.setattr(lock._Lease, "_write", lost)
    with pytest.raises(LockLost), locked(root):  # noqa: PT012
        (root / "before").write_bytes(b"")
        with suppress(KeyboardInterrupt):  # by which it stops what waits
            time.sleep(10)
        for write_to in (root / "x", root / "deep" / "y"):
            with pytest.raises(LockLost):
                write_to.write_bytes(b"")
        (root.parent / "elsewhere").write_bytes(b"")  # which is none of the lock's
    assert not (root / "x").exists()


def test_a_renewal_whose_answer_is_lost_is_still_ones_own(root: BucketPath) -> None:
    lease = lock._Lease(root)
    lease.acquire()
    version, lease.renewals = lease.version, 1
    assert lease._write(version)
    assert lease._write(version)  # tried again by the library, after the first one had arrived
    assert json.loads((root / ".lock").read_bytes())["holder"] == lease.holder
    assert not lock._Lease(root)._write(version)
    assert holder_of(root) == lease.holder


def test_a_second_job_waits_where_it_is_told_to(root: BucketPath) -> None:
    entered = threading.Event()

    def second() -> None:
        with locked(root, wait=True):
            entered.set()

    with locked(root):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.5)
    assert entered.wait(30)
    thread.join()


def test_on_disk_a_kill_frees_the_folder_at_once(tmp_path: Path) -> None:
    process = holder(str(tmp_path), 60)
    with pytest.raises(Occupied), locked(tmp_path):
        pytest.fail("two at once")
    process.kill()
    process.communicate()
    with locked(tmp_path):
        assert holder_of(tmp_path) == ""
