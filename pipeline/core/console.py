"""Console output: log lines, tables, and progress as a bar on a terminal or a line every 30 s elsewhere.

    with Stage("prepare: read", total=120, unit="files") as stage:
        stage.advance(1)

Everything goes to stderr and training.log; stdout is only for a job's result.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

from tqdm import tqdm

from pipeline.core import escaping
from pipeline.core.escaping import INDENT, printable
from pipeline.core.mirror import Mirror
from pipeline.core.object_store import redacted
from pipeline.core.path import StoragePath

log = logging.getLogger("pipeline")

LINE_EVERY_S = 30.0
LOG_NAME = "training.log"
DRAIN_S = 5.0  # for a process that outlives the Ray session and still has our stderr


class _Formatter(logging.Formatter):
    """Formats a record as one line of printable characters, without the credentials of URIs.

    The lines of a traceback follow, indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return textwrap.indent("\n".join(map(printable, lines)), INDENT)


class Console(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


class LogFile(logging.FileHandler):
    """training.log, uploaded if its folder is in a bucket."""

    def __init__(self, folder: StoragePath, line_format: str) -> None:
        self.mirror, path = Mirror.of_log(folder, LOG_NAME)
        super().__init__(path, encoding="utf-8", delay=True, errors="backslashreplace")
        self.setFormatter(_Formatter(line_format))
        self._read_only = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._read_only:
            return
        try:
            if self.stream is None:
                self._make_folder()
            super().emit(record)
        except OSError:  # jobs that only read must also work in a read-only folder
            self._read_only = True

    def open_raw(self) -> BinaryIO:
        """The file, for output that is not a log record."""
        self._make_folder()
        return open(self.baseFilename, "ab")

    def _make_folder(self) -> None:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        super().close()
        self.mirror.close()

    def write_lines(self, text: str) -> None:
        """Write a text to the file only, as one record per line."""
        for line in text.split("\n"):
            self.emit(log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None))

    def write_traceback(self, error: BaseException) -> None:
        """Write a traceback to the file only; the console shows one sentence."""
        trace = (type(error), error, error.__traceback__)
        self.emit(log.makeRecord(log.name, logging.ERROR, __file__, 0, "the job failed", (), trace))


def start_logging(folder: StoragePath, level: str, line_format: str) -> LogFile:
    """Log to the console and to `folder/training.log`. Returns the file's handler."""
    file, console = LogFile(folder, line_format), Console()
    console.setFormatter(_Formatter("%(message)s"))
    stop_logging()
    log.handlers[:] = [console, file]
    log.setLevel(level)
    log.propagate = False
    return file


def log_lines(text: str, level: int = logging.INFO) -> None:
    """Log a text of several lines, such as a table, as one record per line."""
    for line in text.split("\n"):
        log.log(level, "%s", line)


def stop_logging() -> None:
    for handler in log.handlers:
        handler.close()
    log.handlers.clear()
    log.propagate = True


@contextmanager
def other_output_to_log() -> Iterator[None]:
    """Redirect stdout and stderr of libraries to training.log, escaped; our log lines still go to the console.

    It redirects file descriptor 2, because Ray's C++ core writes to it. Does nothing before `start_logging`.
    """
    file, console = _handler(LogFile), _handler(Console)
    if file is None or console is None:
        yield
        return
    errors = "backslashreplace"  # as sys.stderr does
    with (
        file.open_raw() as raw,
        os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors=errors) as terminal,
        _escaped(raw) as descriptor,
        redirect_stdout(sys.stderr),
    ):
        stderr = console.setStream(terminal) or terminal
        os.dup2(descriptor, 2)
        try:
            yield
        finally:
            os.dup2(terminal.fileno(), 2)
            console.setStream(stderr)


@contextmanager
def _escaped(file: BinaryIO) -> Iterator[int]:
    """A descriptor whose lines are escaped and appended to `file`.

    By another process, because a crash of this one must not lose its last lines.
    """
    command = [sys.executable, "-I", "-S", escaping.__file__]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, start_new_session=True)
    assert writer.stdin is not None
    try:
        yield writer.stdin.fileno()
    finally:
        writer.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            writer.wait(DRAIN_S)


def _handler(kind: type[Any]) -> Any:
    return next((handler for handler in log.handlers if isinstance(handler, kind)), None)


def process_start_s() -> float:
    """When this process imported `logging`, one of its first modules, in seconds since the epoch."""
    now = logging.makeLogRecord({})
    return now.created - now.relativeCreated / 1000


def log_timeline(event: str, start_s: float | None = None) -> None:
    """Log a start-up event at debug level, with the seconds since `start_s` (default: the start of this process)."""
    log.debug("timeline: %.2f s: %s", time.time() - (start_s or process_start_s()), event)


class Stage:
    """A named piece of work with a progress bar. With the unit "B", amounts are bytes, shown in MB."""

    def __init__(self, name: str, total: int | None, unit: str, start: int = 0) -> None:
        self.name, self.unit = name, unit
        console = _handler(Console)
        stream = console.stream if console else sys.stderr
        self.bar = tqdm(
            total=total,
            initial=start,
            desc=printable(name),
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            file=stream,
            disable=not stream.isatty(),
            leave=False,
        )
        self.total, self.start, self.done, self.shown = total, start, start, ""
        self.started = self.last_line = time.monotonic()
        self.last_done = start

    def __enter__(self) -> Stage:
        log.debug("%s: begins", self.name)
        return self

    def advance(self, amount: int, shown: str | None = None) -> None:
        """Count `amount` more units. `shown` is printed after the rate, until another one is."""
        self.done += amount
        self.shown = self.shown if shown is None else printable(shown)
        if not self.bar.disable:
            self.bar.set_postfix_str(self.shown, refresh=False)
            self.bar.update(amount)
        elif time.monotonic() - self.last_line >= LINE_EVERY_S:
            log.info("%s: %s", self.name, self._progress())

    def _progress(self) -> str:
        """The units done, the rate since the last progress line, and the time left at that rate."""
        now = time.monotonic()
        rate = (self.done - self.last_done) / (now - self.last_line)
        self.last_line, self.last_done = now, self.done
        total = f"/{self._amount(self.total)}" if self.total else ""
        text = f"{self._amount(self.done)}{total} {self._unit}, {self._amount(rate, 1)}/s"
        if self.total and rate:
            text += f", {max(self.total - self.done, 0) / rate:,.0f} s left"
        return f"{text}  {self.shown}".rstrip()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.bar.close()
        if kind is None:
            seconds = time.monotonic() - self.started
            done = self._amount(self.done - self.start)
            log.info("%s: %s %s in %.1f s  %s", self.name, done, self._unit, seconds, self.shown)

    @property
    def _unit(self) -> str:
        return "MB" if self.unit == "B" else self.unit

    def _amount(self, amount: float, digits: int = 0) -> str:
        return f"{amount / 1e6:,.1f}" if self.unit == "B" else f"{amount:,.{digits}f}"


def number(value: float) -> str:
    """A number for people: 4 significant digits, without an exponent."""
    if not math.isfinite(value) or not value:
        return str(value) if value else "0"
    digits = 0 if isinstance(value, int) else max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """`8.4 s`, `12 min`, `3.1 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Format rows in aligned columns, a line each; numbers are right-aligned."""
    columns = [[printable(str(cell)) for cell in column] for column in zip(header, *rows, strict=True)]
    aligned = []
    for cells in columns:
        width = max(map(len, cells))
        numbers = all(cell[:1].isdigit() for cell in cells[1:])
        aligned.append(
            [cell.rjust(width) if numbers else cell.ljust(width) for cell in [*cells[:1], "-" * width, *cells[1:]]]
        )
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))
