"""Stages of work that can be killed anywhere: a folder named by what goes into it, a file a task, a marker last.

    stage = Stage(root, "records", {"sources": …})            # <root>/records-3f9c2a…/
    if stage.summary is None:
        with stage.open():
            run_tasks(board, "prepare: read", tasks, …)        # only those whose output is not there yet
            stage.finish({"rows": 1200})

Whatever changes the result is in the name, so a folder with a marker is never stale, and a task's file, which appears
whole or not at all, is never done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.runtime.cluster import data_on_own_node
from pipeline.runtime.files import SUFFIX, remove_folder, sizes, write_atomically
from pipeline.runtime.job import JobError, alone_in
from pipeline.runtime.session import Board
from pipeline.storage.bucket import AnyPath, BucketError


class Stage:
    """One stage's folder: results, `scratch/` while it is under way, and `done.json` at its end."""

    def __init__(self, root: AnyPath, name: str, inputs: Any) -> None:
        self.name = name
        self.key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / f"{name}-{self.key}"
        self.scratch = self.folder / "scratch"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` was told; None while the stage is not done."""
        try:
            return dict(json.loads((self.folder / "done.json").read_text()))
        except (OSError, ValueError):
            return None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder while working in it. Raises JobError where another job does."""
        with alone_in(self.folder):
            self._began = time.monotonic()
            yield

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage as done, with what is known about it and the seconds that the last start of it took."""
        seconds = round(time.monotonic() - self._began, 1)
        write_atomically(self.folder / "done.json", json.dumps({**summary, "seconds": seconds}).encode())
        remove_folder(self.scratch)
        if not isinstance(self.folder, Path):
            return
        for left_by_a_kill in self.folder.rglob(f"*{SUFFIX}"):
            left_by_a_kill.unlink(missing_ok=True)


@dataclass(frozen=True)
class Task:
    """A part of a stage: the bytes of input it stands for, and the file that is there when it is done."""

    bytes: int
    output: AnyPath


Report = Callable[[dict[str, int]], object]


def run_tasks(
    board: Board,
    name: str,
    tasks: Sequence[Task],
    work: Callable[[int, Report], None],
    only_here: Container[int] = (),
) -> None:
    """Run `work(index, report)` through Ray Data for each task whose output is missing.

    `work` reports amounts of `bytes` (in all those of the task), `records` and `rejected` as it goes. Tasks in
    `only_here` run on the node that the job is on, after the others.
    """
    todo = [index for index, size in enumerate(sizes([task.output for task in tasks])) if size is None]
    if not todo:
        return
    anywhere, here = ([i for i in todo if (i in only_here) is near] for near in (False, True))
    total = sum(tasks[index].bytes for index in todo)
    with board.stage(name, total, "B", counter="bytes", describe=_describe):
        if anywhere:
            _run(board, name, tasks, work, anywhere, {})
        if here:
            with data_on_own_node() as how:
                _run(board, name, tasks, work, here, how)


def _run(
    board: Board,
    name: str,
    tasks: Sequence[Task],
    work: Callable[[int, Report], None],
    todo: list[int],
    how: dict[str, Any],
) -> None:
    """Run tasks as a dataset; `how` are options of map_batches."""
    import ray.data

    handle, folder = board.handle, str(tasks[0].output.parent)

    def run(batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            for place in batch["id"].tolist():
                work(todo[place], handle.add_all.remote)
        except Exception as error:  # as data: what Ray would raise in its place has lost the cause
            traceback.print_exc()  # to the log
            return {"error": [_sentence(error, folder)]}
        return {"error": []}

    indices = ray.data.range(len(todo), override_num_blocks=len(todo))
    for row in indices.map_batches(run, batch_size=1, **how).iter_rows():  # leaving it ends what is still under way
        raise JobError(f"{name}: {row['error']}")


def _sentence(error: Exception, folder: str) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk that holds {folder} is full; free some space and run the same command again"
    says_all = isinstance(error, OSError | JobError | ConfigError | BucketError)
    return str(error) if says_all else f"{type(error).__name__}: {error}"


def _describe(counts: dict[str, int]) -> str:
    records, rejected = counts.get("records", 0), counts.get("rejected")
    share = f", {rejected / records:.1%} rejected" if records and rejected is not None else ""
    return f"{records:,} records{share}" if records else ""
