"""How a job ends: with a result, or with an error in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ConfigError
from pipeline.storage.lock import LockLost, Occupied, locked
from pipeline.storage.object_store import BucketError
from pipeline.storage.path import StoragePath


class JobError(Exception):
    """A run failed, for a reason that fits in one sentence; jobs exit 1 with it."""


@contextmanager
def alone_in(folder: StoragePath, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for this job (see `locked`). Raises JobError if another job holds it, or waits for it."""
    try:
        with locked(folder, wait=wait):
            yield
    except Occupied:
        raise JobError(
            f"another job is at work in {folder}; wait until it ends, or use another run with storage.run=NAME"
        ) from None
    except LockLost as error:
        raise JobError(str(error)) from None


@dataclass
class Result:
    """A job's `metrics` and the `paths` it wrote. `reply` replaces the last line (search --json)."""

    metrics: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    reply: Any = None


EXPECTED = (ConfigError, JobError, BucketError)  # their messages say what to do


def sentence_of(error: BaseException, folder: object = "storage.root") -> str:
    """An error in one sentence, with what to do about a disk that is full or read-only. `folder` is on that disk."""
    number, name = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{name} cannot be read or written ({os.strerror(number)}); change its permissions, or choose another "
            "folder with storage.root=DIR"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):  # Lance gives no number
        return f"the disk that holds {name or folder} is full; free some space and run the same command again"
    return str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
