"""Find and delete unused folders under `storage.root`.

    for unused in find_unused(config):               # Unused(kind="prepared", path=…, why="no run names it", …)
        remove(unused)                               # False if another job uses it

    runs ──name──► prepared data ──made of──► stages
         ──published.json──► models, tables

A run refers to folders in run.json, its config and published.json. Folders that any run or a model's name mentions, or
that the given config would prepare, are in use. Folders not named by this project are never touched. Cost: listing the
root's folders, and reading the JSON files of each run and data set.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.core.aliases import read_aliases
from pipeline.core.artifact import read_manifest
from pipeline.core.console import log
from pipeline.core.files import disk_bytes, files_below, remove_folder, sorted_glob
from pipeline.core.lock import NAME as LOCK
from pipeline.core.lock import LockLost, Occupied, locked
from pipeline.core.object_store import BucketError
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath
from pipeline.data.prepare import Inputs

_NAMING = re.compile(r"(.*/)?(run\.json|config\.resolved\.yaml|evaluation\.json|published\.json|journal\.jsonl)")
_RUN = re.compile(r"(.+?)/(run\.json|config\.resolved\.yaml|training\.log(/[^/]+)?)")
_KEY = "[0-9a-f]{16}"
_TABLE = rf".+-{_KEY}\.lance"
_RESULT = re.compile(r"(.*/)?((attempt-\d+|best)/step-\d+/.*|published\.json|evaluation\.json|tune/.*)")


@dataclass(frozen=True)
class Unused:
    kind: str
    path: StoragePath
    why: str
    bytes: float
    """Bytes that its removal frees; a file with several hard links counts in part."""
    age_s: float
    """Seconds since a file in it last changed."""


def find_unused(config: Config) -> Iterator[Unused]:
    """Failed runs, and prepared data, stages, models, graphs and tables that neither a run nor the config names."""
    root, home = config.root, config.root / "runs"
    names = list(files_below(home))
    texts = [(home / name).read_text("utf-8") for name in names if _NAMING.fullmatch(name)]
    texts.append(json.dumps(read_aliases(root)))
    named = {name for text in [*texts, json.dumps(config.dump())] for name in re.findall(r"[\w.-]+", text)}
    for run in sorted({match[1] for name in names if "/tune/" not in name and (match := _RUN.fullmatch(name))}):
        if not any(name.startswith(f"{run}/") and _RESULT.fullmatch(name) for name in names):
            yield _unused("run", home / run, "it failed: no checkpoint, nothing published, no evaluation, no sweep")
    models = _named(root / "models", _KEY)
    used = {folder for folder in models if folder.name in named}
    for folder in models:
        if folder not in used:
            yield _unused("model", folder, "no run's readers use it")
    for folder in _named(root / "onnx", _KEY):
        if root / "models" / _manifest(folder).get("model", "?")[:16] not in used:
            yield _unused("graph", folder, "no run's readers use its model")
    for folder in tables(root):
        if folder.name not in named:
            yield _unused("table", folder, "no run's readers use it")
    try:
        current = kept = _current(config)
    except (ConfigError, JobError, BucketError) as error:
        log.warning("keeping all prepared data and stages, because the config's cannot be determined: %s", error)
        return
    for folder in _named(root / "prepared", _KEY):
        manifest = _manifest(folder)
        if folder in current or folder.name in named or manifest.get("fingerprint", "?") in named:
            kept = (
                kept | {folder} | {root / each["from"] for each in manifest.get("files", {}).values() if "from" in each}
            )
        else:
            yield _unused("prepared", folder, "no run names it" if manifest else "it was not finished")
    for folder in _named(root / "stages", rf"\w+-{_KEY}"):
        if folder not in kept and root / "prepared" / _manifest(folder).get("data", "?") not in kept:
            yield _unused("stage", folder, "no used prepared data was made from it")


def remove(found: Unused) -> bool:
    """Remove a folder, unless another job uses it. Returns whether it was removed."""
    try:
        with locked(found.path):
            remove_folder(found.path)
    except (Occupied, LockLost):
        return False
    (found.path / LOCK).unlink(missing_ok=True)  # in a bucket, releasing the lock writes it again
    return True


def tables(root: StoragePath) -> list[StoragePath]:
    """The folders of all vector tables."""
    return _named(root / "lancedb", _TABLE)


def _named(home: StoragePath, pattern: str) -> list[StoragePath]:
    return [folder for folder in sorted_glob(home, "*") if re.fullmatch(pattern, folder.name)]


def _current(config: Config) -> set[StoragePath]:
    """The folders that the config would prepare. Raises ConfigError, JobError or BucketError for unreadable sources."""
    if config.data.prepared is not None:
        return {config.root / config.data.prepared}
    inputs = Inputs(config)
    return {stage.folder for stage in (inputs.prepared, *inputs.stages)}


def _manifest(folder: StoragePath) -> dict[str, Any]:
    return read_manifest(folder) or {}


def _unused(kind: str, folder: StoragePath, why: str) -> Unused:
    changed_ns = max((stat.st_mtime_ns for name, stat in files_below(folder).items() if name != LOCK), default=0)
    return Unused(kind, folder, why, disk_bytes(folder), time.time() - changed_ns / 1e9)
