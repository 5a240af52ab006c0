"""Peak memory of jobs/prepare.py's processes, as its input grows tenfold.

  python benchmarks/memory.py --data data                               # 100 MB, then 1 GB
  python benchmarks/memory.py --data data --small 10 --large 40         # to try it

Prints a line a size: the most that any one Ray worker had, the most that the driver had, and the job's seconds; then
how many times as much the large input took, and the peaks by stage (a worker keeps what it had in an earlier one).
Memory is resident memory less what is shared (`rss - shared` of
/proc/PID/statm): neither Ray's object store nor mapped files count. Every process is looked at five times a second.

The input is JSON Lines: linux-doc's paragraphs and debian's descriptions over and over, each time with another word
after every third of their own, so that no two rounds share five words in a row. What is alike within a round stays so:
near-duplicates are removed at 0.8, and their share is the same at any size.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpora import machine, records
from pipeline.core.console import table

EVERY_S = 0.2
MEASURED = ("peak worker MB", "peak driver MB", "seconds")
STAGE_END = re.compile(r"(?:prepare|embed)(?:: (.+?))?: .* in [\d.]+ s\b")


def write_input(data: Path, path: Path, megabytes: int) -> None:
    """Distinct records of about that much JSON."""
    rows = records(data, "linux-doc", paragraphs=True) + records(data, "debian")
    texts = [row.get("text") or row["positive"] for row in rows]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for turn in itertools.count():
            for text in texts:
                words = text.split(" ")
                parts = (" ".join(words[start : start + 3]) for start in range(0, len(words), 3))
                written += file.write(json.dumps({"text": f" turn{turn} ".join(parts)}) + "\n")
                if written > megabytes * 1e6:
                    return


def own_bytes(process: psutil.Process) -> tuple[str, int]:
    """A process's name and its memory that is its own; 0 for one that has just gone."""
    try:
        memory = process.memory_info()
        return (process.cmdline() or [""])[0], memory.rss - memory.shared
    except psutil.Error:
        return "", 0


def watch(command: list[str]) -> dict[str, Any]:
    """Run a job. Returns its last line, and the peaks in MB: the driver's, the largest worker's by stage and work."""
    driver_peak, ends, works = 0, [], Counter[str]()
    samples: list[tuple[float, int]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout
        assert job.stderr
        errors = job.stderr

        def follow() -> None:
            for line in errors:
                sys.stderr.write(line)
                if found := STAGE_END.match(line):
                    ends.append((time.monotonic(), found[1] or found[0].partition(":")[0]))

        thread = threading.Thread(target=follow)
        thread.start()
        driver = psutil.Process(job.pid)
        while job.poll() is None:
            sizes = [own_bytes(process) for process in driver.children(recursive=True)]
            workers = [(name, size) for name, size in sizes if name.startswith("ray::")]
            samples.append((time.monotonic(), max((size for _, size in workers), default=0)))
            for name, size in workers:
                work = name.removeprefix("ray::").partition("(")[0]
                works[work] = max(works[work], size)
            driver_peak = max(driver_peak, own_bytes(driver)[1])
            time.sleep(EVERY_S)
        thread.join()
        last = dict(json.loads(job.stdout.read().splitlines()[-1]))
    if last["status"] != "ok":
        raise SystemExit(f"the job ended as {last['status']}; its own sentence stands above")
    stages: dict[str, float] = {}
    for at, size in samples:
        stage = next((name for end, name in ends if at <= end), ends[-1][1])
        stages[stage] = max(stages.get(stage, 0), size / 1e6)
    peaks = {"driver": driver_peak / 1e6, "worker": max(stages.values())}
    return {"last": last, **peaks, "stages": stages, "works": {work: size / 1e6 for work, size in works.items()}}


def prepare(data: Path, megabytes: int) -> dict[str, Any]:
    """A whole prepare job in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        write_input(data, path, megabytes)
        source = {"name": "text", "type": "json", "path": str(path), "fields": {"text": "text"}}
        return watch(
            [
                sys.executable,
                str(ROOT / "jobs" / "prepare.py"),
                f"storage.root={folder}/storage",
                f"data.sources=[{json.dumps(source)}]",
                "data.near_duplicates.threshold=0.8",
            ]
        )


def compared(found: dict[int, dict[str, Any]], counts: Sequence[str]) -> list[list[object]]:
    """A line a size, smallest first: the size, these counts and what MEASURED names; then how many times as much."""
    lines: list[list[object]] = []
    for size, one in found.items():
        shown = [f"{one['last']['metrics'][name]:,}" for name in counts]
        lines.append([f"{size:,}", *shown, *(f"{one[of]:.0f}" for of in ("worker", "driver")), one["last"]["seconds"]])
    (small_size, small), (large_size, large) = found.items()
    times = [f"{large[of] / small[of]:.2f}" for of in ("worker", "driver")]
    seconds = f"{large['last']['seconds'] / small['last']['seconds']:.2f}"
    return [*lines, [f"{large_size / small_size:g} times", *[""] * len(counts), *times, seconds]]


def by(of: str, found: dict[int, dict[str, Any]], names: Mapping[str, str] | None = None) -> list[list[object]]:
    """A line a stage, or a kind of work, in the words of `names`: its largest worker's peak for each size."""
    small, large = found.values()
    shown = names or {name: name for name in large[of]}
    return [[words, *(f"{one[of].get(name, 0):.0f}" for one in (small, large))] for name, words in shown.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian and linux-doc")
    parser.add_argument("--small", type=int, default=100, help="MB")
    parser.add_argument("--large", type=int, default=1000, help="MB")
    args = parser.parse_args()
    found = {size: prepare(args.data, size) for size in (args.small, args.large)}
    header = ["input MB", "records", "kept", *MEASURED]
    by_stage = table(by("stages", found), ["peak worker MB by stage", *(f"{size} MB" for size in found)])
    print(f"\n{machine()}\n\n{table(compared(found, ('rows_in', 'rows_kept')), header)}\n\n{by_stage}")


if __name__ == "__main__":
    main()
