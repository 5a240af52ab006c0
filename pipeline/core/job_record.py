"""Records each job that worked on a run: its command, its hardware, when it began and how long each stage took.

    <run>/jobs/20261201T064200-3f9c2a1b.json
    {"command": "python jobs/run.py storage.run=notes", "began": "2026-12-01T06:42:00+00:00", "seconds": 312.4,
     "stages": {"prepare": 24.1, "train": 210.0}, "status": "ok", "hardware": {"processor": "AMD EPYC", …}}

Each job writes a file of its own, so jobs of one run do not wait for each other. Jobs that found nothing to do, and
readers such as search, write none.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.files import sorted_glob, write_atomically
from pipeline.core.object_store import redacted
from pipeline.core.path import StoragePath

SHOWN_CHARS = 4_000  # of a command


@dataclass
class JobRecord:
    """What a job did so far. `hardware` is set when its Ray session starts; without it nothing is written."""

    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = round(time.monotonic() - started, 1)

    def write(self, run_dir: StoragePath, status: str) -> None:
        if not self.hardware:
            return
        row = {
            "command": command(sys.argv),
            "began": self.began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 1),
            "stages": self.stages,
            "status": status,
            "hardware": self.hardware,
        }
        name = f"{self.began:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.json"
        write_atomically(run_dir / "jobs" / name, json.dumps(row, indent=1).encode())


def read_job_records(run_dir: StoragePath) -> list[dict[str, Any]]:
    """All jobs of a run, the first first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted_glob(run_dir / "jobs", "*.json")]


def command(argv: Sequence[str]) -> str:
    """The command line that started this process, as you would type it, without credentials."""
    program, *arguments = argv
    if program.endswith(".py"):
        inside = Path(program)
        start = ["python", str(inside if not inside.is_absolute() else Path(*inside.parts[-2:]))]
    else:
        start = [os.path.basename(program)]
    return redacted(shlex.join([*start, *arguments]))[:SHOWN_CHARS]


def machine() -> dict[str, Any]:
    """This machine's processor, CPUs and memory."""
    import psutil

    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(aliased=True, terse=True),
    }


def _processor() -> str:
    """Its name, as in /proc/cpuinfo, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
