"""Reading sources: a source is cut into tasks that can run anywhere, and a task is read record by record.

    tasks = plan_source(source)                   # [ReadTask(source='packages', paths=(…), …), …]
    for raw in read(tasks[0], source): ...        # RawRecord, or a RawRecord whose `reason` says why it is none

What cannot be read is a record with a reason, not an exception. python_packages reads 2 MB/s a core, all of it `ast`.
"""

from __future__ import annotations

import codecs
import glob
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Source
from pipeline.text import docstrings

TASK_BYTES = 4 << 20  # input a task reads: about a second of work, so that a lost task costs little
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org")


@dataclass(frozen=True)
class ReadTask:
    """Files of a source, or the lines that begin in bytes `start` to `stop` of one file."""

    paths: tuple[str, ...]
    start: int = 0
    stop: int | None = None


@dataclass
class RawRecord:
    """A record as its source has it. `fields` are raw text; `reason` is set where it could not be read."""

    native_id: str
    fields: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    excerpt: str = ""


@dataclass(frozen=True)
class Plan:
    """A source's tasks, and what identifies its input: each file's relative path, size and time of change (ns)."""

    tasks: list[ReadTask]
    inputs: list[tuple[str, int, int]]

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size, _ in self.inputs)


def plan_source(source: Source) -> Plan:
    """List a source's files and cut them into tasks. Raises ConfigError for a path with nothing to read."""
    root = Path(source.path or sysconfig.get_path("purelib"))
    files = _files(source, root)
    sizes = [(path, path.stat()) for path in files]
    base = root if root.is_dir() else root.parent
    inputs = [(_relative(path, base), stat.st_size, stat.st_mtime_ns) for path, stat in sizes]
    if source.max_samples is not None:  # the first so many in the source's order: one reader knows when to stop
        return Plan([ReadTask(tuple(map(str, files)))], inputs)
    if source.type == "json":
        tasks = [
            ReadTask((str(path),), start, min(start + TASK_BYTES, stat.st_size))
            for path, stat in sizes
            for start in range(0, stat.st_size, TASK_BYTES)
        ]
    else:
        tasks = [ReadTask(tuple(group)) for group in _groups([(str(path), stat.st_size) for path, stat in sizes])]
    return Plan(tasks, inputs)


def read(task: ReadTask, source: Source) -> Iterator[RawRecord]:
    """The records of a task, in the source's order."""
    readers: dict[str, Callable[[ReadTask, Source, Path], Iterator[RawRecord]]] = {
        "json": _read_json,
        "text": _read_text,
        "python_packages": _read_python,
    }
    root = Path(source.path or sysconfig.get_path("purelib"))
    records = readers[source.type](task, source, root if root.is_dir() else root.parent)
    return islice(records, source.max_samples)


def text_fields(source: Source) -> list[str]:
    """The record fields a source gives: `["anchor", "positive"]` or `["text"]`."""
    if source.type == "json":
        return [name for name in ("anchor", "positive", "text") if name in source.fields] or ["anchor", "positive"]
    return ["anchor", "positive"]


def check_fields(source: Source) -> None:
    """Raise ConfigError where all of a json source's first records lack a mapped field."""
    if source.type != "json":
        return
    paths = _files(source, Path(source.path or ""))
    first = list(islice(_read_json(ReadTask(tuple(map(str, paths))), source, paths[0].parent), 100))
    lacking = [raw for raw in first if raw.reason == "missing_field"]
    if lacking and not any(raw.reason is None for raw in first):
        raise ConfigError(f"data.sources {source.name}: the first records of {paths[0]} lack {lacking[0].excerpt}")


def _files(source: Source, root: Path) -> list[Path]:
    """The files of a path, a folder or a glob, sorted by name."""
    suffixes = {"json": (".jsonl", ".json", ".ndjson"), "text": TEXT_SUFFIXES, "python_packages": (".py",)}[source.type]
    if root.is_file():
        return [root]
    if root.is_dir():
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        allowed = f"a folder with {', '.join(suffixes)} files in it"
    else:
        files = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
        allowed = "a file, a folder or a glob that matches some"
    if not files:
        raise ConfigError(f"data.sources {source.name}: found nothing to read at {root}; allowed is {allowed}")
    return files


def _groups(files: list[tuple[str, int]]) -> Iterator[list[str]]:
    """Runs of neighbouring files of about TASK_BYTES."""
    group: list[str] = []
    total = 0
    for path, size in files:
        if group and total + size > TASK_BYTES:
            yield group
            group, total = [], 0
        group.append(path)
        total += size
    if group:
        yield group


def _relative(path: Path | str, base: Path) -> str:
    return Path(path).relative_to(base).as_posix() if Path(path).is_relative_to(base) else Path(path).name


def _whole_files(task: ReadTask, base: Path, parse: Callable[[str, str], Iterator[RawRecord]]) -> Iterator[RawRecord]:
    """`parse(name, text)` of each of a task's files; a record with a reason for a file that is no text."""
    for path in task.paths:
        name = _relative(path, base)
        try:
            data = Path(path).read_bytes()
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield RawRecord(name, reason="invalid_utf8", excerpt=data[:200].decode("utf-8", "replace"))
        except OSError as error:
            yield RawRecord(name, reason="unreadable_file", excerpt=str(error.strerror))
        else:
            yield from parse(name, text)


def _read_python(task: ReadTask, source: Source, base: Path) -> Iterator[RawRecord]:
    return _whole_files(task, base, _parse_python)


def _parse_python(name: str, text: str) -> Iterator[RawRecord]:
    try:
        found = list(docstrings.pairs(text.replace("\r\n", "\n").replace("\r", "\n")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield RawRecord(name, reason="broken_python", excerpt=str(error)[:200])
        return
    for pair in found:
        fields = {"anchor": pair.docstring, "positive": pair.code}
        yield RawRecord(f"{name}:{pair.line}:{pair.name}", fields, {"file": name, "line": pair.line, "name": pair.name})


_MARKUP_LINE = re.compile(r"^\s*(\.\. .*|:\w+:.*|<!--.*|[^\w\s]*)\s*$")


def _read_text(task: ReadTask, source: Source, base: Path) -> Iterator[RawRecord]:
    return _whole_files(task, base, _parse_text)


def _parse_text(name: str, text: str) -> Iterator[RawRecord]:
    """One file a record: its title, else its first line → the rest. Comments and underlines are no titles."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if not _MARKUP_LINE.match(line)), None)
    if first is None:
        yield RawRecord(name, reason="empty", excerpt=text[:200])
        return
    title = re.sub(r"^(#+|=+|\*+|title:)\s*", "", lines[first].strip(), flags=re.IGNORECASE)
    fields = {"anchor": title, "positive": "\n".join(lines[first + 1 :])}
    yield RawRecord(name, fields, {"file": name, "line": first + 1})


def _read_json(task: ReadTask, source: Source, base: Path) -> Iterator[RawRecord]:
    for path in task.paths:
        name = _relative(path, base)
        try:
            with open(path, "rb") as file:
                if task.start:  # a line belongs to the task in which it begins
                    file.seek(task.start - 1)
                    file.readline()
                elif file.read(3) != codecs.BOM_UTF8:
                    file.seek(0)
                while (task.stop is None or file.tell() < task.stop) and (line := file.readline()):
                    if line.strip():
                        yield _parse_line(line, f"{name}:{file.tell() - len(line)}", source)
        except OSError as error:
            yield RawRecord(name, reason="unreadable_file", excerpt=str(error.strerror))


def _parse_line(line: bytes, position: str, source: Source) -> RawRecord:
    """`position` (file and byte offset) stands in where the source has no id of its own."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=lambda constant: None)
    except UnicodeDecodeError:
        return RawRecord(position, reason="invalid_utf8", excerpt=line[:200].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return RawRecord(position, reason="broken_json", excerpt=line[:200].decode("utf-8", "replace"))
    if not isinstance(row, dict):
        return RawRecord(position, reason="broken_json", excerpt=f"found a {type(row).__name__}, not an object")
    fields: dict[str, str] = {}
    for record_field in text_fields(source):
        own_field = source.fields.get(record_field, record_field)
        value = _dotted(row, own_field)
        if value is None:
            found = ", ".join(map(str, row)) or "none"
            return RawRecord(position, reason="missing_field", excerpt=f"the field {own_field!r}; it has {found}"[:200])
        if not isinstance(value, str):
            return RawRecord(position, reason="wrong_type", excerpt=f"{own_field} is {value!r}"[:200])
        fields[record_field] = value
    native = _dotted(row, source.fields.get("id", "id"))
    metadata = {name: _dotted(row, name) for name in source.metadata}
    return RawRecord(str(native) if isinstance(native, str | int) else position, fields, metadata)


def _dotted(row: Any, path: str) -> Any:
    if isinstance(row, dict) and path in row:
        return row[path]
    for part in path.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row
