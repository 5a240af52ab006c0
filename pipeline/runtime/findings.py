"""What a check before the start has found: shown as a table, and refused with all that is wrong.

findings = [Finding("training", "2 workers of 4 CPUs", ConfigError("scaling.num_workers: found …"))]
findings_table(findings)
refuse(findings)                             # logs every error but the last, and raises that one
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config import ConfigError
from pipeline.runtime.console import log, table
from pipeline.storage.files import free_bytes
from pipeline.storage.path import StoragePath


@dataclass(frozen=True)
class Finding:
    """`what` was checked, what was `found`, and the error if that is not good enough."""

    what: str
    found: str
    wrong: Exception | None = None


def findings_table(findings: Iterable[Finding]) -> str:
    rows = [(each.what, "no" if each.wrong else "ok", each.found) for each in findings]
    return table(rows, ("preflight", "", "found"))


def refuse(findings: Iterable[Finding]) -> None:
    """Log every error but the last, and raise that one."""
    wrong = [each.wrong for each in findings if each.wrong]
    for error in wrong[:-1]:
        log.error("%s", error)
    if wrong:
        raise wrong[-1]


def room(key: str, folder: StoragePath, needed_bytes: float, what: str) -> Finding:
    """Whether the disk that holds a folder has enough free space; a bucket always has."""
    free = free_bytes(folder)
    if free is None:
        return Finding(f"room, {what}", f"{_gb(needed_bytes)} into a bucket")
    wrong = None
    if free < needed_bytes:
        wrong = ConfigError(
            f"{key}: found {_gb(free)} free on the disk that holds {folder}, where {what} takes about "
            f"{_gb(needed_bytes)}; allowed is a folder with that much room"
        )
    return Finding(f"room, {what}", f"{_gb(needed_bytes)} needed, {_gb(free)} free", wrong)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
