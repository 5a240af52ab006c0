"""Folder locks, for one job at a time in a folder: flock on disk, a renewed lease object in a bucket.

    with locked(config.run_dir): ...                   # raises Occupied if another job holds the folder

On disk, the kernel holds the lock and releases it when the process ends. In a bucket, the lock is the object `.lock`,
which names its holder and counts renewals. Conditional writes create and replace it, so only one job can get it. A job
that sees it unchanged for LIMIT_S takes it over, so after a kill the next job waits that long. A holder that could not
renew it for LIMIT_S (paused, or cut off from the bucket) has lost it: every later write of its process below the folder
raises LockLost. A write that was already in flight may still arrive. Each job uses only its own clock.

    holder   create ── renew ── renew ── (paused) ─────────────────── its next write: LockLost
    other               sees renewal 2 ──────── LIMIT_S unchanged ──► replaces it, on condition that it is renewal 2
"""

from __future__ import annotations

import _thread
import json
import logging
import math
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.core.object_store import BucketError, bucket_errors
from pipeline.core.path import BucketPath, StoragePath, guarded

RENEW_EVERY_S = 4.0
LIMIT_S = 20.0  # five missed renewals. Ours
WAIT_LINE_EVERY_S = 60.0
NAME = ".lock"

log = logging.getLogger("pipeline")


class Occupied(Exception):  # noqa: N818
    """Another job holds the folder."""


class LockLost(RuntimeError):  # noqa: N818
    """This job may no longer write to the folder."""


@contextmanager
def locked(folder: StoragePath, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder within the block.

    If another job holds it, raises Occupied, or waits with `wait`. Once the lock is lost, every write in the block and
    its end raise LockLost.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / NAME)
        _until_free(lambda: lock.acquire(timeout=0), folder, wait)
        try:
            yield
        finally:
            lock.release()
        return
    lease = _Lease(folder)
    _until_free(lease.acquire, folder, wait)
    with guarded(folder, lease.check), lease.renewing():
        yield


def holder_of(folder: StoragePath) -> str:
    """The holder of a folder's lease; "" if there is none, or on disk. Shows workers that their driver lost it."""
    return "" if isinstance(folder, Path) else _Lease(folder).read()[0]


def _until_free(acquire: Any, folder: StoragePath, wait: bool) -> None:
    logged = -math.inf
    while True:
        try:
            acquire()
            return
        except (Timeout, Occupied):
            if not wait:
                raise Occupied from None
        if time.monotonic() > logged + WAIT_LINE_EVERY_S:
            logged = time.monotonic()
            log.info("waiting for another job at work in %s", folder)
        time.sleep(RENEW_EVERY_S / 4)


def _now() -> float:
    """Monotonic seconds, including the time that the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Lease:
    """A folder's lease object, `{"holder": …, "renewals": 7}`; the holder is "" after release."""

    def __init__(self, folder: BucketPath) -> None:
        self.folder, self.path = folder, folder / NAME
        self.holder = f"{socket.gethostname()}-{uuid.uuid4().hex}"
        self.renewals, self.renewed = 0, 0.0
        self.version: Any = None
        self.lost = self._waiting = False
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Create the lease, or take it over if it is not renewed for LIMIT_S. Raises Occupied if it is."""
        if self._write("create"):
            return
        holder, version = self.read()
        if holder:
            if not self._waiting:
                log.info("waiting up to %g s to see whether another job is at work in %s", LIMIT_S, self.folder)
            self._waiting = True
            deadline = _now() + LIMIT_S
            while holder and _now() < deadline:
                time.sleep(RENEW_EVERY_S / 4)
                holder, now = self.read()
                if holder and now != version:
                    raise Occupied
                version = now
        if not self._write(version or "create"):
            raise Occupied

    def check(self) -> None:
        """Raise LockLost if the lock was not renewed in time."""
        if self.lost or _now() - self.renewed > LIMIT_S:
            self.lost = True
            raise LockLost(
                f"the lock of {self.folder} could not be renewed for {LIMIT_S:g} s and another job may have taken it; "
                "run the same command again to continue"
            )

    @contextmanager
    def renewing(self) -> Iterator[None]:
        thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.check()
            with suppress(BucketError):
                self.holder, self.renewals = "", 0
                self._write(self.version)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_EVERY_S):
            self.renewals += 1
            try:
                self.check()
                self.lost = not self._write(self.version)
                self.check()
            except BucketError as error:
                log.debug("the lock could not be renewed: %s", error)
            except LockLost:
                self.lost = True
                _thread.interrupt_main()  # stop the job, even if it is waiting
                return

    def read(self) -> tuple[str, Any]:
        """The holder ("" if there is none) and the object's version for a conditional write."""
        import obstore

        try:
            with bucket_errors(self.path.store, self.path.key):
                found = obstore.get(self.path.store.connect(patient=False), self.path.key)
                return json.loads(bytes(found.bytes()))["holder"], _version(found.meta)
        except FileNotFoundError:
            return "", None

    def _write(self, condition: Any) -> bool:
        """Write the object if it has that version, or for "create" if it is missing. Returns whether we hold it."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        began, content = _now(), json.dumps({"holder": self.holder, "renewals": self.renewals}).encode()
        store = self.path.store.connect(patient=False)
        with bucket_errors(self.path.store, self.path.key):
            try:
                self.version = _version(obstore.put(store, self.path.key, content, mode=condition, use_multipart=False))
            except (AlreadyExistsError, PreconditionError):  # perhaps our own write, whose response was lost
                holder, version = self.read()
                if not self.holder or holder != self.holder:
                    return False
                self.version = version
        self.renewed = began
        return True


def _version(found: Any) -> dict[str, str]:
    return {name: found[name] for name in ("e_tag", "version") if found.get(name)}
