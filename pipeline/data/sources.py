"""Reads sources: splits each into tasks that can run on any node, and reads a task record by record.

    plan = plan_source(source)                    # lists files; reads the footers of large Parquet files
    plan.tasks[0]                                 # ReadTask(base='/data', paths=('a.jsonl',), start=0, stop=4194304, …)
    for raw in read(plan.tasks[0], source): ...   # RawRecord; `reason` is set if it could not be read

Damaged input becomes a record with a reason, not an exception. A file that cannot be read to its end becomes one record
with a reason of LOST_FILES and the file's name as its id; `lost_fraction` estimates what it cost. A failing bucket
or hub raises JobError, because a retry may succeed. Task size does not affect the records. Cost: planning lists the
files; reading costs what the readers say.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import xxhash

from pipeline.config import ConfigError, Source
from pipeline.core.escaping import printable
from pipeline.core.object_store import BucketError, cause
from pipeline.core.outcome import JobError
from pipeline.data import hub, read_arrow, read_json, read_tables, read_text
from pipeline.data.fields import (
    UNPACKS_TOO_MUCH,
    UNREADABLE_FILE,
    FieldMap,
    RawRecord,
    Row,
    broken,
    has,
    own_fields,
    required_fields,
)
from pipeline.data.input_files import (
    File,
    UnpackingError,
    is_compressed,
    list_files,
    may_pass,
    open_messages,
    open_random,
    open_stream,
    open_text,
    refusal,
    wide_encoding,
)

TASK_BYTES = 4 << 20  # input per task: about a second of work, so a lost task is cheap to repeat
MAX_TASKS = 2_000  # per source: keeps Ray's scheduler and the driver's task list small at 10 TB
CHECKED_ROWS = 100
THREADS = 16  # they wait for a bucket or hash, and both release the interpreter lock

SUFFIXES = {
    "json": read_json.JSON_SUFFIXES,
    "csv": read_tables.CSV_SUFFIXES,
    "parquet": read_tables.PARQUET_SUFFIXES,
    "arrow": read_arrow.ARROW_SUFFIXES,
    "text": read_text.TEXT_SUFFIXES,
    "python_packages": read_text.PYTHON_SUFFIXES,
}
_OPEN: dict[str, Callable[[str, str], IO[bytes]]] = {"parquet": open_random, "arrow": open_messages}
_WITH_COLUMNS = ("csv", "parquet", "arrow", "huggingface")
_DAMAGED = (pa.ArrowException, MemoryError, UnicodeDecodeError)  # damaged lengths and column names raise the last two
_UNREADABLE = (OSError, EOFError, zlib.error, BucketError, *_DAMAGED)


@dataclass(frozen=True)
class ReadTask:
    """What one task reads: whole files (names relative to `base`), or a range of one file or data set.

    `start` and `stop` count bytes of a text file (the lines that begin there), row groups of a Parquet file, or shards
    of a Hugging Face data set. `bytes` is the size of the input, for progress.
    """

    base: str
    paths: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    bytes: int = 0


@dataclass(frozen=True)
class SourcePlan:
    """A source's read tasks, the identity of its input files, and its estimated size."""

    tasks: list[ReadTask]
    inputs: list[tuple[str, int, int]]
    """Relative path, size and modification time (ns) of each file."""
    sizes: dict[str, int]
    """Bytes of each file, or of each shard of a Hugging Face data set."""
    text_bytes: int
    """Estimated size of the text, decompressed."""

    def lost_fraction(self, unreadable: Collection[str]) -> float:
        """Estimated share of the rows in unreadable files: their share of the files or of the bytes, if that is larger.

        Bytes alone would not do, because a file that was cut is small.
        """
        sizes = [self.sizes[name] for name in unreadable]
        return max(len(sizes) / len(self.sizes), sum(sizes) / max(1, sum(self.sizes.values()))) if sizes else 0.0


def plan_source(source: Source) -> SourcePlan:
    """List a source's files and split them into tasks. Raises ConfigError if there are none or listing fails."""
    if source.type == "huggingface":
        return _plan_hub(source)
    base, files = _files(source)
    total = sum(file.size for file in files)
    if source.max_samples is not None:  # one task, because only a single reader knows when to stop
        tasks = [_whole(base, files)]
    else:
        tasks = list(_tasks(source, base, files, max(TASK_BYTES, total // MAX_TASKS)))
    inputs = [(file.name, file.size, file.mtime_ns) for file in files]
    sizes = {file.name: file.size for file in files}
    return SourcePlan(tasks, inputs, sizes, sum(text_bytes(name, size) for name, size in sizes.items()))


def _plan_hub(source: Source) -> SourcePlan:
    found = hub.find_dataset(source)
    total, shards = sum(found.sizes.values()), len(found.shards)
    step = shards if source.max_samples is not None else math.ceil(shards / MAX_TASKS)
    tasks = [
        ReadTask(found.path, (found.revision,), start, stop, total * (stop - start) // shards)
        for start in range(0, shards, step)
        for stop in [min(start + step, shards)]
    ]
    sizes = {name: found.sizes.get(name, total // shards) for name in found.shards}
    return SourcePlan(tasks, found.inputs, sizes, sum(text_bytes(name, size) for name, size in found.sizes.items()))


def inputs_by_content(source: Source, plan: SourcePlan) -> list[tuple[str, int, int | str]]:
    """The plan's inputs, with a hash of each file's decompressed bytes instead of its modification time.

    For copies and fresh checkouts, where modification times mean nothing. Hub data sets already have a commit. Cost:
    reads everything once, on this machine.
    """
    base = plan.tasks[0].base if plan.tasks else ""
    if source.type == "huggingface" and not os.path.isdir(base):
        return list(plan.inputs)
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(partial(_content_hash, base), [name for name, _, _ in plan.inputs])
    return [(name, size, found) for (name, size, _), found in zip(plan.inputs, hashes, strict=True)]


def _content_hash(base: str, name: str) -> str:
    digest = xxhash.xxh3_128()
    try:
        with open_stream(base, name) as file:
            while data := file.read(1 << 20):
                digest.update(data)
    except (OSError, EOFError, UnpackingError, pa.ArrowException) as error:  # the reader counts the file as unreadable
        digest.update(type(error).__name__.encode())
    return digest.hexdigest()


def read(task: ReadTask, source: Source) -> Iterator[RawRecord]:
    """The records of a task, in the source's order."""
    return islice(map(FieldMap(source), _rows(task, source)), source.max_samples)


def check_fields(source: Source) -> None:
    """Raise ConfigError if all of a source's first rows lack a mapped field, or its CSV header is ambiguous."""
    required = required_fields(source) + (source.metadata if source.type in _WITH_COLUMNS else [])
    of_text = read_text.PAIR_FIELDS if source.pairs else read_text.TEXT_FIELDS[source.record]
    fixed = {"text": of_text, "python_packages": read_text.PYTHON_FIELDS}.get(source.type)
    rows = [Row("", dict.fromkeys(fixed, ""))] if fixed else _first_rows(source)
    if source.type == "csv" and rows and (problem := read_tables.header_problem(rows[0].names)):
        raise ConfigError(f"data.sources {source.name}: found {problem} in the CSV header; make all names distinct")
    missing = [path for path in required if rows and not any(has(row.values, path) for row in rows)]
    if missing:
        names = dict.fromkeys(name for row in rows for name in _names(row))
        available = ", ".join(map(printable, names)) or "none"  # escaped here, because an error's blanks are collapsed
        raise ConfigError(
            f"data.sources {source.name}: found no field {', '.join(map(repr, missing))} in the first {len(rows)} "
            f"records; set `fields` to map onto the available ones: {available[:1000]}"
        )


def text_bytes(name: str, size: int) -> int:
    """Estimated text in a file, decompressed. Ours, measured: gzip and zstd shrink text to 1/4, Parquet to 1/3."""
    return size * (4 if is_compressed(name) else 3 if name.lower().endswith(read_tables.PARQUET_SUFFIXES) else 1)


def _files(source: Source) -> tuple[str, list[File]]:
    skip = {"skip": read_text.is_test} if source.type == "python_packages" else {}
    return list_files(source, SUFFIXES[source.type], **skip)


def _tasks(source: Source, base: str, files: list[File], task_bytes: int) -> Iterator[ReadTask]:
    """Split large files where possible, and group small neighbouring ones."""
    large = [file for file in files if file.size > task_bytes and not is_compressed(file.name)]
    with ThreadPoolExecutor(THREADS) as pool:
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


def _whole(base: str, files: list[File]) -> ReadTask:
    return ReadTask(base, tuple(file.name for file in files), bytes=sum(file.size for file in files))


def _pieces(source: Source, base: str, file: File, task_bytes: int) -> list[ReadTask]:
    """Split a file into tasks of about `task_bytes`. Empty if the file can only be read from its beginning."""
    try:
        if source.type == "parquet":
            with open_random(base, file.name) as opened:
                return list(_runs(base, file.name, read_tables.row_group_bytes(opened), task_bytes))
        if not _is_lines(source, base, file.name):
            return []
    except _UNREADABLE as error:
        if may_pass(error):
            raise ConfigError(refusal(source.name, base, error)) from None
        return []  # the task that reads the file counts it as unreadable
    return [
        ReadTask(base, (file.name,), start, stop, stop - start)
        for start in range(0, file.size, task_bytes)
        for stop in [min(start + task_bytes, file.size)]
    ]


def _is_lines(source: Source, base: str, name: str) -> bool:
    """Whether a file is read line by line, and its offsets are those of the lines that a reader sees."""
    if source.type != "json" and (source.type, source.record) != ("text", "line"):
        return False
    with open_stream(base, name) as opened:
        if wide_encoding(opened):
            return False
        return source.type == "text" or read_json.json_shape(opened, name) == "lines"


def _runs(base: str, name: str, group_bytes: list[int], task_bytes: int) -> Iterator[ReadTask]:
    """Tasks of consecutive row groups, about `task_bytes` and at least one row group each."""
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
        yield from hub.dataset_rows(source, task.base, task.paths[0], columns, task.start, task.stop or 0)
        return
    for name in task.paths:
        try:
            with _OPEN.get(source.type, open_text)(task.base, name) as file:
                yield from _rows_of(file, name, task, source, columns)
        except _UNREADABLE as error:
            if may_pass(error):
                raise JobError(f"source {source.name}: cannot read {name}: {cause(error)}; run the job again") from None
            yield broken(name, UNREADABLE_FILE, cause(error))
        except UnpackingError as error:
            yield broken(name, UNPACKS_TOO_MUCH, str(error))


def _rows_of(file: Any, name: str, task: ReadTask, source: Source, columns: list[str]) -> Iterator[Row]:
    match source.type:
        case "json":
            return read_json.json_rows(file, name, task.start, task.stop)
        case "csv":
            return read_tables.csv_rows(file, name, source.delimiter)
        case "parquet":
            return read_tables.parquet_rows(file, name, columns, task.start, task.stop)
        case "arrow":
            return read_arrow.arrow_rows(file, name, columns)
        case "text" if source.pairs == "heading":
            return read_text.heading_rows(file, name)
        case "text" if source.pairs == "neighbours":
            return read_text.neighbour_rows(file, name)
        case "text":
            return read_text.text_rows(file, name, source.record, task.start, task.stop)
        case _:
            return read_text.python_rows(file, name)


def _first_rows(source: Source) -> list[Row]:
    """The readable ones among the first rows."""
    task = _plan_hub(source).tasks[0] if source.type == "huggingface" else _whole(*_files(source))
    try:
        return [row for row in islice(_rows(task, source), CHECKED_ROWS) if row.reason is None]
    except JobError as error:
        raise ConfigError(f"data.sources {source.name}: {str(error).partition(': ')[2]}") from None


def _names(row: Row) -> Iterator[str]:
    """Names of a row's fields; fields nested one level down are dotted."""
    for name in row.names or row.values:
        value = row.values.get(name)
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) and value else [name]
