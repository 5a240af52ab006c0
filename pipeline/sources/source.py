"""Reading sources: a source is cut into tasks that can run anywhere, and a task is read record by record.

    plan = plan_source(source)                    # lists files, reads none but the footers of large Parquet files
    plan.tasks[0]                                 # ReadTask(base='/data', paths=('a.jsonl',), start=0, stop=4194304, …)
    for raw in read(plan.tasks[0], source): ...   # RawRecord, or a RawRecord whose `reason` says why it is none

What cannot be read is a record with a reason, not an exception; a bucket or hub that fails on the way is a JobError,
for the next try may read what this one could not. Whatever the tasks' size, they give the same records.
"""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError, Source
from pipeline.runtime.outcome import JobError
from pipeline.sources import hub
from pipeline.sources.fields import FieldMap, RawRecord, Row, broken, has, own_fields, required_fields, text_fields
from pipeline.sources.filesystem import (
    File,
    is_compressed,
    list_files,
    may_pass,
    open_random,
    open_stream,
    refusal,
)
from pipeline.sources.readers import csv_rows, json_rows, package_rows, table_rows, text_rows
from pipeline.storage.object_store import BucketError, cause

__all__ = ["Plan", "RawRecord", "ReadTask", "check_fields", "plan_source", "read", "text_fields"]

TASK_BYTES = 4 << 20  # input a task reads: about a second of work, so that a lost task costs little
MAX_TASKS = 2_000  # of a source: Ray's scheduler and the driver's list of tasks stay small at 10 TB
CHECKED_ROWS = 100
PLANNING_THREADS = 16  # that wait for footers of files in a bucket

SUFFIXES = {
    "json": json_rows.SUFFIXES,
    "csv": csv_rows.SUFFIXES,
    "parquet": table_rows.PARQUET_SUFFIXES,
    "arrow": table_rows.ARROW_SUFFIXES,
    "text": text_rows.SUFFIXES,
    "python_packages": package_rows.SUFFIXES,
}
_WITH_COLUMNS = ("csv", "parquet", "arrow", "huggingface")
_DAMAGED = (pa.ArrowException, MemoryError, UnicodeDecodeError)  # the last two: lengths and names of damaged columns
_UNREADABLE = (OSError, EOFError, zlib.error, BucketError, *_DAMAGED)


@dataclass(frozen=True)
class ReadTask:
    """Files of a source, by names relative to `base`; or of one file the lines that begin in bytes `start` to `stop`,
    or those row groups of a Parquet file; or those shards of a Hugging Face data set. `bytes`: of input, for progress.
    """

    base: str
    paths: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A source's tasks; what identifies its input, each file's relative path, size and time of change (ns); and an
    estimate of its text in bytes, decompressed.
    """

    tasks: list[ReadTask]
    inputs: list[tuple[str, int, int]]
    text_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size, _ in self.inputs)


def plan_source(source: Source) -> Plan:
    """List a source's files and cut them into tasks. Raises ConfigError where there is nothing to read, or no way."""
    if source.type == "huggingface":
        return _plan_hub(source)
    base, files = _files(source)
    total = sum(file.size for file in files)
    if source.max_samples is not None:  # the first so many in the source's order: one reader knows when to stop
        tasks = [ReadTask(base, tuple(file.name for file in files), bytes=total)]
    else:
        tasks = list(_tasks(source, base, files, max(TASK_BYTES, total // MAX_TASKS)))
    inputs = [(file.name, file.size, file.mtime_ns) for file in files]
    return Plan(tasks, inputs, sum(text_bytes(file.name, file.size) for file in files))


def _plan_hub(source: Source) -> Plan:
    found = hub.find(source)
    total = sum(found.sizes.values())
    step = found.shards if source.max_samples is not None else math.ceil(found.shards / MAX_TASKS)
    tasks = [
        ReadTask(found.path, (found.revision,), start, stop, total * (stop - start) // found.shards)
        for start in range(0, found.shards, step)
        for stop in [min(start + step, found.shards)]
    ]
    return Plan(tasks, found.inputs, sum(text_bytes(name, size) for name, size in found.sizes.items()))


def read(task: ReadTask, source: Source) -> Iterator[RawRecord]:
    """The records of a task, in the source's order."""
    return islice(map(FieldMap(source), _rows(task, source)), source.max_samples)


def check_fields(source: Source) -> None:
    """Raise ConfigError where all of a source's first rows lack a mapped field, or its header is ambiguous."""
    required = required_fields(source) + (source.metadata if source.type in _WITH_COLUMNS else [])
    fixed = {"text": text_rows.NAMES[source.record], "python_packages": package_rows.NAMES}.get(source.type)
    rows = [Row("", dict.fromkeys(fixed, ""))] if fixed else _first_rows(source)
    if source.type == "csv" and rows and (problem := csv_rows.header_problem(rows[0].names)):
        raise ConfigError(f"data.sources {source.name}: found {problem}; allowed is a header of distinct names")
    lacking = [path for path in required if rows and not any(has(row.values, path) for row in rows)]
    if lacking:
        there = ", ".join(dict.fromkeys(name for row in rows for name in _names(row))) or "none"
        raise ConfigError(
            f"data.sources {source.name}: found no field {', '.join(map(repr, lacking))} in its first {len(rows)} "
            f"records; it has {there[:1000]}; allowed is a map of `fields` onto those"
        )


def text_bytes(name: str, size: int) -> int:
    """About how much text a file holds: gzip and zstd make a fourth of it, Parquet a third (ours)."""
    return size * (4 if is_compressed(name) else 3 if name.lower().endswith(table_rows.PARQUET_SUFFIXES) else 1)


def _files(source: Source) -> tuple[str, list[File]]:
    return list_files(source.name, source.path or sysconfig.get_path("purelib"), SUFFIXES[source.type])


def _tasks(source: Source, base: str, files: list[File], task_bytes: int) -> Iterator[ReadTask]:
    """Large files in pieces where that is possible, runs of neighbouring small ones together."""
    large = [file for file in files if file.size > task_bytes and not is_compressed(file.name)]
    with ThreadPoolExecutor(PLANNING_THREADS) as pool:
        pieces = dict(zip(large, pool.map(lambda file: _pieces(source, base, file, task_bytes), large), strict=True))
    group: list[File] = []
    size = 0
    for file in files:
        if group and (file in pieces or size + file.size > task_bytes):
            yield _whole(base, group)
            group, size = [], 0
        if pieces.get(file):
            yield from pieces[file]
        else:
            group.append(file)
            size += file.size
    if group:
        yield _whole(base, group)


def _whole(base: str, files: Iterable[File]) -> ReadTask:
    return ReadTask(base, tuple(file.name for file in files), bytes=sum(file.size for file in files))


def _pieces(source: Source, base: str, file: File, task_bytes: int) -> list[ReadTask]:
    """Tasks of about `task_bytes` that make up a file; none where it has to be read from its beginning."""
    try:
        if source.type == "parquet":
            with open_random(base, file.name) as opened:
                return list(_runs(base, file.name, table_rows.row_group_bytes(opened), task_bytes))
        if not _is_lines(source, base, file.name):
            return []
    except _UNREADABLE as error:
        if may_pass(error):
            raise ConfigError(refusal(source.name, base, error)) from None
        return []  # whoever reads it finds the same, and counts it
    return [
        ReadTask(base, (file.name,), start, stop, stop - start)
        for start in range(0, file.size, task_bytes)
        for stop in [min(start + task_bytes, file.size)]
    ]


def _is_lines(source: Source, base: str, name: str) -> bool:
    if source.type == "json" and not name.lower().endswith(json_rows.LINE_SUFFIXES):
        with open_stream(base, name) as opened:
            return json_rows.shape(opened, name) == "lines"
    return source.type == "json" or (source.type == "text" and source.record == "line")


def _runs(base: str, name: str, group_bytes: list[int], task_bytes: int) -> Iterator[ReadTask]:
    """Runs of row groups of about `task_bytes`, at least one each."""
    start = size = 0
    for group, more in enumerate(group_bytes):
        if group > start and size + more > task_bytes:
            yield ReadTask(base, (name,), start, group, size)
            start, size = group, 0
        size += more
    if group_bytes:
        yield ReadTask(base, (name,), start, len(group_bytes), size)


def _rows(task: ReadTask, source: Source) -> Iterator[Row]:
    columns = own_fields(source)
    if source.type == "huggingface":
        yield from hub.rows(source, task.base, task.paths[0], columns, task.start, task.stop or 0)
        return
    for name in task.paths:
        try:
            with (open_random if source.type == "parquet" else open_stream)(task.base, name) as file:
                yield from _rows_of(file, name, task, source, columns)
        except _UNREADABLE as error:
            if may_pass(error):
                raise JobError(f"source {source.name}: {name} could not be read: {cause(error)}") from None
            yield broken(f"{name}:{task.start}" if task.start else name, "unreadable_file", cause(error))


def _rows_of(file: Any, name: str, task: ReadTask, source: Source, columns: list[str]) -> Iterator[Row]:
    match source.type:
        case "json":
            return json_rows.rows(file, name, task.start, task.stop)
        case "csv":
            return csv_rows.rows(file, name, source.delimiter)
        case "parquet":
            return table_rows.parquet_rows(file, name, columns, task.start, task.stop)
        case "arrow":
            return table_rows.arrow_rows(file, name, columns)
        case "text":
            return text_rows.rows(file, name, source.record, task.start, task.stop)
        case _:
            return package_rows.rows(file, name)


def _first_rows(source: Source) -> list[Row]:
    """The first rows that can be read."""
    task = _plan_hub(source).tasks[0] if source.type == "huggingface" else _whole(*_files(source))
    rows = _rows(task, source)
    try:
        return [row for row in islice(rows, CHECKED_ROWS) if row.reason is None]
    except JobError as error:
        found = str(error).partition(": ")[2]
        raise ConfigError(f"data.sources {source.name}: found that {found}; allowed is data that can be read") from None


def _names(row: Row) -> Iterator[str]:
    """Names of a row's fields, those one level down with dots."""
    for name in row.names or row.values:
        value = row.values.get(name)
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) and value else [name]
