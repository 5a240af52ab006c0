"""Artifacts: folders of files that follow from their inputs, written once by tasks that may be killed at any point.

    records = Artifact(root / "stages", "records", {"sources": …})           # <root>/stages/records-3f9c2a…/
    summary = records.make(lambda: fill(records, progress))                     # returns at once if it exists

    def fill(artifact, progress):
        def work(index: int, output: Output) -> dict[str, int]:
            with output.writing(f"records/{index:05d}.parquet") as file: ...
            return {"rows": 1200}
        return {"rows": sum(each["rows"] for each in artifact.tasks(progress, "prepare: read", sizes, work))}

The folder is named by the hash of its inputs, so it is never stale. A task writes its files, then a note with its
result and the size and hash of each file; a rerun skips tasks that have a note. `manifest.json` is written last: it
holds the summary and lists all files. Reading checks every file's size, and its hash when a process first opens it, so
a flipped bit is detected. Files under `scratch/` are not in the manifest, and are removed at the end.

    <folder>/records/00000.parquet
    <folder>/scratch/prepare-read/000000.json       a task's note
    <folder>/manifest.json                          {…summary, "files": {name: {"bytes": …, "xxh3": …}}}
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.core.cluster import data_on_driver_node
from pipeline.core.console import log
from pipeline.core.files import (
    file_sizes,
    files_below,
    for_each,
    link_or_copy,
    parquet_file,
    remove_folder,
    replacing,
    write_atomically,
    xxh3_of,
)
from pipeline.core.outcome import JobError, error_sentence, job_lock
from pipeline.core.path import StoragePath, stays_below
from pipeline.core.session import Progress

MANIFEST = "manifest.json"
IN_MEMORY_BYTES = 128 << 20  # files up to this size are read once, then hashed and parsed in memory

Files = dict[str, dict[str, Any]]
"""File name → {"bytes": size, "xxh3": hash}; a link also has "from", the folder of the original."""


@dataclass(frozen=True)
class Output:
    """Where a task writes its files and reports progress."""

    folder: StoragePath
    files: Files = field(default_factory=dict)
    send: Callable[[dict[str, int]], object] = lambda counts: None
    size: int = 0
    advanced: Counter[str] = field(default_factory=Counter)

    def report(self, **counts: int) -> None:
        """Report progress: `records` and `rejected` since the last report."""
        self.send(counts)

    def advance(self, share: float) -> None:
        """Report that this share of the task's work is done, before the task ends."""
        done = int(self.size * min(share, 1.0)) - self.advanced["done"]
        if done > 0:
            self.advanced["done"] += done
            self.send({"done": done})

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary file on disk, renamed into place when the block ends."""
        with replacing(self.folder / name) as temporary:
            yield temporary
            if not name.startswith("scratch/"):
                self.files[name] = _entry(temporary)

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as temporary:
            temporary.write_bytes(data)

    def write_table(self, name: str, table: pa.Table) -> None:
        with self.writing(name) as temporary:
            write_parquet(table, temporary)

    def link(self, name: str, source: StoragePath) -> None:
        """Link another artifact's file here (in a bucket: copy it), with the hash from its manifest."""
        link_or_copy(source, self.folder / name)
        home, inside = _home(source)
        if home:
            entry = _files_of(home, (home / MANIFEST).stat())[inside]
            self.files[name] = {**entry, "from": f"{home.parent.name}/{home.name}"}
        else:
            self.files[name] = _entry(source)


class Artifact:
    """The folder `home`/`name`-<hash of `inputs`>; with an empty `name`, only the hash."""

    def __init__(self, home: StoragePath, name: str, inputs: Any) -> None:
        self.name = name
        self.key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = home / "-".join(filter(None, (name, self.key)))
        self.scratch = self.folder / "scratch"
        self.output = Output(self.folder)

    def read(self) -> dict[str, Any] | None:
        """The manifest; None if the artifact is unfinished, or (with a warning) if a file is missing or truncated."""
        manifest = read_manifest(self.folder)
        damage = manifest and _missing(self.folder, manifest["files"])
        if damage:
            log.warning("rebuilding %s: its %s is missing or has the wrong size", self.folder, damage)
        return None if damage else manifest

    def make(self, fill: Callable[[], dict[str, Any]], *, again: bool = False) -> dict[str, Any]:
        """The manifest. Unless the artifact exists, first calls `fill`, which writes the files and returns the summary.

        If another job is making it, waits for that job. `again` rebuilds an existing artifact.
        """
        found = None if again else self.read()
        if found is None:
            with job_lock(self.folder, wait=True):
                found = None if again else self.read()
                if found is None:
                    found = self.finish(fill())
        return found

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, which completes the artifact."""
        manifest = {**summary, "files": dict(sorted(self.output.files.items()))}
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        remove_folder(self.scratch)
        return manifest

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return `work()`, which must be JSON. A restarted job reads the stored result instead."""
        note = self.scratch / f"{name}.json"
        found = _read_note(note)
        if found is None:
            found = {"result": work()}
            write_atomically(note, json.dumps(found).encode())
        return found["result"]

    def tasks(
        self,
        progress: Progress,
        title: str,
        sizes: Sequence[int],
        work: Callable[[int, Output], Any],
        only_here: Container[int] = (),
        options: dict[str, Any] | None = None,
        unit: str = "B",
    ) -> list[Any]:
        """Run `work(index, output)` with Ray Data for each unfinished task. Returns all results in order.

        Results must be JSON. `sizes` of the tasks, in bytes or another `unit`, are for the progress bar. Tasks in
        `only_here` run on the driver's node, after the others. `options` are those of map_batches; with `compute`,
        actors run the tasks.
        """
        notes = self.scratch / re.sub(r"\W+", "-", title)
        names = [notes / f"{index:06d}.json" for index in range(len(sizes))]
        todo = [index for index, size in enumerate(file_sizes(names)) if not size]
        if todo:
            total = sum(sizes[index] for index in todo)
            with progress.stage(title, total, unit, counter="done", describe=_describe):
                run = _Tasks(self.folder, title, names, sizes, work, progress.handle.add_all.remote)
                if anywhere := [index for index in todo if index not in only_here]:
                    run(anywhere, options or {})
                if here := [index for index in todo if index in only_here]:
                    with data_on_driver_node() as options:
                        run(here, options)
        results = []
        for found in for_each(self.scratch, lambda note: json.loads(note.read_text()), names):
            self.output.files.update(found["files"])
            results.append(found["result"])
        return results


@dataclass(frozen=True)
class _Tasks:
    folder: StoragePath
    title: str
    notes: Sequence[StoragePath]
    sizes: Sequence[int]
    work: Callable[[int, Output], Any]
    send: Callable[[dict[str, int]], object]

    def __call__(self, todo: list[int], options: dict[str, Any]) -> None:
        """Run tasks as a dataset; `options` are those of map_batches."""
        import ray.data

        def run(batch: dict[str, Any]) -> dict[str, list[str]]:
            try:
                for position in batch["id"].tolist():
                    self._run(todo[position])
            except Exception as error:  # returned as data, because Ray would lose the error's cause
                traceback.print_exc()  # goes to training.log
                return {"error": [error_sentence(error, self.folder)]}
            return {"error": []}

        indices = ray.data.range(len(todo), override_num_blocks=len(todo))
        options = {"fn_constructor_args": (run,), **options} if "compute" in options else options
        function = _Actor if "compute" in options else run
        for row in indices.map_batches(function, batch_size=1, **options).iter_rows():  # raising cancels the others
            raise JobError(f"{self.title}: {row['error']}")

    def _run(self, index: int) -> None:
        output = Output(self.folder, {}, self.send, self.sizes[index])
        result = self.work(index, output)
        write_atomically(self.notes[index], json.dumps({"result": result, "files": output.files}).encode())
        output.advance(1.0)


class _Actor:
    """Runs tasks in an actor: Ray Data makes a pool only for a class."""

    def __init__(self, run: Callable[[dict[str, Any]], Any]) -> None:
        self.run = run

    def __call__(self, batch: dict[str, Any]) -> Any:
        return self.run(batch)


def read_manifest(folder: StoragePath) -> dict[str, Any] | None:
    """The manifest of a finished artifact; None if it is missing or cannot be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        files = found.get("files") if isinstance(found, dict) else None
        return found if isinstance(files, dict) and all(map(stays_below, files)) else None
    except (OSError, ValueError):
        return None


def checked(path: StoragePath) -> StoragePath:
    """Return the path after verifying the file against its manifest's hash, once per process.

    Files outside an artifact pass. Raises JobError if the file has changed.
    """
    stat = path.stat()
    if (path, stat) not in _checked:
        _check(path, xxh3_of(path))
        _checked.add((path, stat))
    return path


def open_parquet(path: StoragePath) -> pq.ParquetFile:
    """Open an artifact's Parquet file after verifying it like `checked`. Reading also verifies page checksums."""
    stat = path.stat()
    if (path, stat) in _checked or stat.st_size > IN_MEMORY_BYTES:
        return parquet_file(checked(path))
    data = path.read_bytes()
    _check(path, xxhash.xxh3_128_hexdigest(data))
    _checked.add((path, stat))
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table.combine_chunks(), path, compression="zstd", row_group_size=8192, write_page_checksum=True)


_checked: set[tuple[StoragePath, Any]] = set()
"""Files that this process has verified, with size and modification time."""


def _check(path: StoragePath, found: str) -> None:
    """Raise JobError if the hash of a file is not the one in its artifact's manifest."""
    home, name = _home(path)
    entry = _files_of(home, (home / MANIFEST).stat()).get(name) if home else None
    if home and entry and found != entry["xxh3"]:
        folders = [home, *([home.parent.parent / entry["from"]] if "from" in entry else [])]
        raise JobError(
            f"{path} is damaged: its hash does not match the manifest; delete {' and '.join(map(str, folders))} and "
            "run the same command again to rebuild it"
        )


@lru_cache(maxsize=8)
def _files_of(home: StoragePath, changed: Any) -> Files:
    return (read_manifest(home) or {"files": {}})["files"]  # type: ignore[no-any-return]


def _home(path: StoragePath) -> tuple[StoragePath | None, str]:
    """The folder of the artifact that holds a file, directly or in a subfolder, and the file's name there."""
    for home, name in ((path.parent, path.name), (path.parent.parent, f"{path.parent.name}/{path.name}")):
        if (home / MANIFEST).is_file():
            return home, name
    return None, ""


def _missing(folder: StoragePath, files: Files) -> str | None:
    """The first file that is missing or has the wrong size."""
    stats = files_below(folder)
    return next(
        (name for name, each in files.items() if name not in stats or stats[name].st_size != each["bytes"]), None
    )


def entries_of(folder: StoragePath) -> Files:
    """The size and hash of every file below a folder."""
    return {name: _entry(folder / name) for name in files_below(folder)}


def _entry(path: StoragePath) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": xxh3_of(path)}


def _read_note(note: StoragePath) -> Any:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


def _describe(counts: dict[str, int]) -> str:
    records, rejected = counts.get("records", 0), counts.get("rejected")
    share = f", {rejected / records:.1%} rejected" if records and rejected is not None else ""
    return f"{records:,} records{share}" if records else ""
