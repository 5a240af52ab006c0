"""metrics.jsonl: a line a report, on the driver, in order of step however often the run was stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.runtime.files import write_atomically


class History:
    """Keeps the lines up to the step a run goes on from, and appends."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_step]
        write_atomically(path, "".join(kept).encode())

    def write(self, message: dict[str, Any]) -> None:
        """Append a worker's message's `metrics`, if it has some."""
        if "metrics" in message:
            with self.path.open("a") as file:
                file.write(json.dumps(message["metrics"]) + "\n")


def _lines(path: Path) -> list[str]:
    """Whole lines: the last one of a run that was killed may be half."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
