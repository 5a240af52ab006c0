"""metrics.jsonl and alerts.jsonl: a line a report, in order of step however often the run was stopped and resumed.

    lines = JsonLines(run_dir / "metrics.jsonl", resumed_step=40, kind=metrics_kind)     # keeps steps up to 40
    lines.write({"step": 50, "loss": 1.9})
    lines.write({"step": 60, "loss": 1.8})
    lines.write({"step": 50, "loss": 1.9})       # workers began again at 40: both lines from 50 on give way to this one

A line costs an append; lines that come a second time cost the file once for each restart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.storage.files import write_atomically
from pipeline.storage.path import StoragePath
from pipeline.training.tracking.tracker import Metrics, Tracker

Row = dict[str, Any]
"""With `step`, an integer."""


class JsonLines:
    """Rows as lines. Of one step there may be several, if they differ in `kind`."""

    def __init__(self, path: Path, resumed_step: int, kind: Callable[[Row], str]) -> None:
        self.path, self.kind = path, kind
        self._rewrite(lambda row: row["step"] <= resumed_step)

    def write(self, row: Row) -> None:
        """Append a row, in place of those that lie after it, and of one of its own step and kind."""
        if row["step"] < self.step or (row["step"] == self.step and self.kind(row) in self.kinds):
            self._rewrite(lambda old: old["step"] < row["step"] or self._is_another_of_its_step(old, row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._note(row)

    def _is_another_of_its_step(self, old: Row, row: Row) -> bool:
        return bool(old["step"] == row["step"] and self.kind(old) != self.kind(row))

    def _rewrite(self, keep: Callable[[Row], bool]) -> None:
        rows = [row for row in read_rows(self.path) if keep(row)]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.step: int = -1
        self.kinds: set[str] = set()
        for row in rows:
            self._note(row)

    def _note(self, row: Row) -> None:
        """The last step there is, and the kinds of its rows."""
        if row["step"] != self.step:
            self.step, self.kinds = row["step"], set()
        self.kinds.add(self.kind(row))


class History(Tracker):
    """metrics.jsonl, and alerts.jsonl beside it."""

    name = "metrics.jsonl"

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self.metrics = JsonLines(run_dir / "metrics.jsonl", resumed_step, metrics_kind)
        self.alerts = JsonLines(run_dir / "alerts.jsonl", resumed_step, lambda row: row["title"])

    def log(self, metrics: Metrics) -> None:
        self.metrics.write(metrics)

    def alert(self, row: Row) -> None:
        self.alerts.write(row)


def metrics_kind(row: Row) -> str:
    """Training rows have a `loss`; others are of validations."""
    return "training" if "loss" in row else "validation"


def read_rows(path: StoragePath) -> list[Row]:
    """All rows of a file, or none without one. What is no row is passed over: a kill may leave half a last line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row for line in lines if (row := _parsed(line)) is not None]


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
