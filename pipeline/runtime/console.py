"""What a person watching sees: log lines, a bar a stage on a terminal, a line every 30 s elsewhere, and a table.

Everything goes to stderr and to training.log; stdout belongs to a job's result.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from pipeline.storage.mirror import Mirror
from pipeline.storage.path import StoragePath

log = logging.getLogger("pipeline")

LINE_EVERY_S = 30.0
LOG_NAME = "training.log"


class _ConsoleHandler(logging.Handler):
    """Writes above the bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class LogFile(logging.FileHandler):
    """training.log. Ray sets the format of every handler that it finds on its loggers; this one keeps its own."""

    def __init__(self, folder: StoragePath, line_format: str) -> None:
        self.mirror, path = Mirror.of_log(folder, LOG_NAME)
        super().__init__(path, encoding="utf-8", delay=True)
        super().setFormatter(logging.Formatter(line_format))
        self._read_only = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._read_only:
            return
        try:
            if self.stream is None:
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:  # jobs that only read work where nothing can be written
            self._read_only = True

    def close(self) -> None:
        super().close()
        self.mirror.close()

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        return

    def write_traceback(self, error: BaseException) -> None:
        """What a person at the console is spared."""
        trace = (type(error), error, error.__traceback__)
        self.emit(log.makeRecord(log.name, logging.ERROR, __file__, 0, "the job failed", (), trace))


def start_logging(folder: StoragePath, level: str, line_format: str) -> LogFile:
    """Send our own messages to the console and to `folder/training.log`. Returns the file's handler, for Ray's."""
    file = LogFile(folder, line_format)
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    stop_logging()
    log.handlers[:] = [console, file]
    log.setLevel(level)
    log.propagate = False
    return file


def stop_logging() -> None:
    for handler in log.handlers:
        handler.close()
    log.handlers.clear()
    log.propagate = True


class Stage:
    """A named piece of work under way.

    with Stage("prepare: read", total=120, unit="files") as stage:
        stage.advance(1)
    """

    def __init__(self, name: str, total: int | None, unit: str, start: int = 0) -> None:
        self.name, self.unit = name, unit
        self.bar = tqdm(
            total=total,
            initial=start,
            desc=name,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        self.total, self.start, self.done, self.shown = total, start, start, ""
        self.started = self.last_line = time.monotonic()
        self.last_done = start

    def __enter__(self) -> Stage:
        log.debug("%s: begins", self.name)
        return self

    def advance(self, amount: int, shown: str = "") -> None:
        """`amount` more units are done; `shown` is what to print beside the rate."""
        self.done += amount
        self.shown = shown or self.shown
        if not self.bar.disable:
            self.bar.set_postfix_str(self.shown, refresh=False)
            self.bar.update(amount)
        elif time.monotonic() - self.last_line >= LINE_EVERY_S:
            log.info("%s: %s", self.name, self._progress())

    def _progress(self) -> str:
        """What is done, the rate since the last such line, and the time left at that rate."""
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
        """A number of units; bytes in MB."""
        return f"{amount / 1e6:,.1f}" if self.unit == "B" else f"{amount:,.{digits}f}"


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Columns side by side, numbers to the right."""
    columns = [[title, *map(str, cells)] for title, *cells in zip(header, *rows, strict=True)]
    aligned = []
    for cells in columns:
        width = max(map(len, cells))
        numbers = all(cell[:1].isdigit() for cell in cells[1:])
        aligned.append(
            [cell.rjust(width) if numbers else cell.ljust(width) for cell in [*cells[:1], "-" * width, *cells[1:]]]
        )
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))
