"""How a job ends: with a `Result`, or with an error in one sentence; and the `Finding`s of its preflight checks."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.console import log, number, table
from pipeline.core.files import free_bytes
from pipeline.core.lock import LockLost, Occupied, locked
from pipeline.core.object_store import BucketError
from pipeline.core.path import StoragePath


class ConfigError(Exception):
    """A config, an argument or a request is invalid. The job exits with code 2 and this sentence."""


class JobError(Exception):
    """The job failed for a known reason. It exits with code 1 and this sentence."""


def command(name: str, words: Sequence[str] | None = None) -> str:
    """How to start a command in the way this process was started, by default with the same config.

    command("embed")        # "tep embed --config pairs storage.run=b", or "python jobs/embed.py --config …"
    """
    script = Path(sys.argv[0])
    start = ["python", f"jobs/{name}.py"] if script.parent.name == "jobs" else ["tep", name]
    return shlex.join([*start, *(_config_words(sys.argv[1:]) if words is None else words)])


def _config_words(words: Sequence[str]) -> list[str]:
    """The arguments that choose a config: --config, --local-data-dir and section.key=value."""
    options = r"--(config|local[-_]data[-_]dir)"
    follows = [False, *(bool(re.fullmatch(options, word)) for word in words)]
    kept = rf"{options}(=.*)?|[a-z]+(\.\w+)+=\S.*"
    return [word for word, is_value in zip(words, follows, strict=False) if is_value or re.fullmatch(kept, word, re.S)]


@contextmanager
def job_lock(folder: StoragePath, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for this job (see `locked`). If another job holds it, raise JobError, or wait with `wait`."""
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
    """A job's `metrics` and the `paths` it wrote. `reply` replaces the JSON line at the end (search --json).

    `summary` is what a person at a terminal reads instead of the JSON line; by default a table of metrics and paths.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    reply: Any = None
    summary: str | None = None

    def __str__(self) -> str:
        if self.summary is not None:
            return self.summary
        found = flatten(self.metrics).items()
        rows = [(name, number(each) if isinstance(each, int | float) else each) for name, each in found]
        rows += self.paths.items()
        return table(rows, ("result", "")) if rows else ""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


EXPECTED_ERRORS = (ConfigError, JobError, BucketError)  # their messages say what to do


def error_sentence(error: BaseException, folder: object = "storage.root") -> str:
    """An error as one sentence, with what to do if a disk is full or read-only. `folder` is on that disk."""
    number, name = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{name} cannot be read or written ({os.strerror(number)}); change its permissions, or choose another "
            "folder with storage.root=DIR"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):  # Lance gives no number
        return f"the disk that holds {name or folder} is full; free some space and run the same command again"
    return str(error) if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Finding:
    """The result of a check: `what` was checked, what was `found`, and the error if it failed."""

    what: str
    found: str
    error: Exception | None = None


def findings_table(findings: Iterable[Finding]) -> str:
    rows = [(each.what, "no" if each.error else "ok", each.found) for each in findings]
    return table(rows, ("preflight", "", "found"))


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise the last error of the findings, if there is one, after logging the others."""
    wrong = [each.error for each in findings if each.error]
    for error in wrong[:-1]:
        log.error("%s", error)
    if wrong:
        raise wrong[-1]


def check_disk_space(key: str, folder: StoragePath, needed_bytes: float, what: str) -> Finding:
    """Check that the disk that holds a folder has enough free space; a bucket always has."""
    free = free_bytes(folder)
    if free is None:
        return Finding(f"room, {what}", f"{_gb(needed_bytes)} into a bucket")
    wrong = None
    if free < needed_bytes:
        wrong = ConfigError(
            f"{key}: found {_gb(free)} free on the disk that holds {folder}, but {what} takes about "
            f"{_gb(needed_bytes)}; free some space or use a folder on another disk"
        )
    return Finding(f"room, {what}", f"{_gb(needed_bytes)} needed, {_gb(free)} free", wrong)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
