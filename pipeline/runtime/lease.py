"""One job at a time in a folder: a lock of the file system's, and in a bucket, which has none, a sign of life.

    with alone_in(config.run_dir): ...                 # JobError where another job is at work there

A job writes an object of its own name below `.lock/`, again every few seconds, and then looks who else has: both
services list what was written before, so of two that begin at once one at least sees the other. An object that does
not change for a while is of a job that was killed, and is removed. So after a kill the next job waits that long;
nobody's clock is asked but one's own, and by how much time goes by.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from pipeline.storage.bucket import AnyPath, BucketError, BucketPath, Stat

SIGN_EVERY_S = 4.0
DEAD_AFTER_S = 20.0  # without a sign: five were missed. Ours


class Occupied(Exception):  # noqa: N818
    """Another job is at work there."""


@contextmanager
def alone(folder: AnyPath) -> Iterator[None]:
    """Hold a folder. Raises Occupied where another job does; a killed job's hold ends with it, or soon after."""
    if isinstance(folder, BucketPath):
        with _alone_in_bucket(folder / ".lock"):
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Occupied from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _alone_in_bucket(signs: BucketPath) -> Iterator[None]:
    own, ended = signs / f"{socket.gethostname()}-{uuid.uuid4().hex}", threading.Event()

    def sign() -> None:
        count = 0
        while not ended.wait(SIGN_EVERY_S):
            count += 1
            try:
                own.write_bytes(b"." * (count % 60))
            except BucketError as error:
                logging.getLogger("pipeline").debug("no sign of life: %s", error)

    own.write_bytes(b"")
    thread = threading.Thread(target=sign, name="lease", daemon=True)
    thread.start()
    try:
        _outlive_the_others(signs, own)
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(BucketError):
            own.unlink(missing_ok=True)


def _outlive_the_others(signs: BucketPath, own: BucketPath) -> None:
    """Return once nobody else gives a sign; raise Occupied when somebody does."""
    first, deadline = _others(signs, own), time.monotonic() + DEAD_AFTER_S
    if first:
        logging.getLogger("pipeline").info(
            "waiting up to %g s to see whether another job is at work in %s", DEAD_AFTER_S, signs.parent
        )
    while first:
        if time.monotonic() > deadline:
            for path in first:
                path.unlink(missing_ok=True)
            return
        time.sleep(SIGN_EVERY_S / 4)
        now = _others(signs, own)
        if any(first.get(path, said) != said for path, said in now.items()):
            raise Occupied
        first = {path: said for path, said in first.items() if path in now}


def _others(signs: BucketPath, own: BucketPath) -> dict[BucketPath, Stat]:
    """When each of the others has given its last sign, and of what size: times may be whole seconds."""
    return {signs / name: stat for name, stat in signs.files().items() if name != own.name}
