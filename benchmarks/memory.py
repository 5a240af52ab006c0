"""Peak memory of jobs/prepare.py's processes, as its input grows tenfold.

  python benchmarks/memory.py --data data                               # 100 MB, then 1 GB
  python benchmarks/memory.py --data data --small 10 --large 40         # to try it

Prints a line a size: the most that any one Ray worker had, the most that the driver had, and the job's seconds; then
how many times as much the large input took. Memory is resident memory less what is shared (`rss - shared` of
/proc/PID/statm): neither Ray's object store nor mapped files count. Every process is looked at five times a second.

The input is JSON Lines: linux-doc's paragraphs and debian's descriptions over and over, each time with another word
after every third of their own, so that no two rounds share five words in a row. What is alike within a round stays so:
near-duplicates are removed at 0.8, and their share is the same at any size.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpora import machine, records
from pipeline.runtime.console import table

EVERY_S = 0.2


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
    """Run a job. Returns its last line, and peaks in MB."""
    peaks: defaultdict[int, int] = defaultdict(int)  # by process id
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        driver = psutil.Process(job.pid)
        while job.poll() is None:
            for process in driver.children(recursive=True):
                name, amount = own_bytes(process)
                if name.startswith("ray::"):
                    peaks[process.pid] = max(peaks[process.pid], amount)
            peaks[job.pid] = max(peaks[job.pid], own_bytes(driver)[1])
            time.sleep(EVERY_S)
        assert job.stdout
        last = dict(json.loads(job.stdout.read().splitlines()[-1]))
    if last["status"] != "ok":
        raise SystemExit(f"the job ended as {last['status']}; its own sentence stands above")
    return {"last": last, "driver": peaks.pop(job.pid) / 1e6, "worker": max(peaks.values()) / 1e6}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian and linux-doc")
    parser.add_argument("--small", type=int, default=100, help="MB")
    parser.add_argument("--large", type=int, default=1000, help="MB")
    args = parser.parse_args()
    found = {size: prepare(args.data, size) for size in (args.small, args.large)}
    lines = []
    for size, one in found.items():
        counts = [f"{one['last']['metrics'][name]:,}" for name in ("rows_in", "rows_kept")]
        lines.append([size, *counts, *(f"{one[of]:.0f}" for of in ("worker", "driver")), one["last"]["seconds"]])
    small, large = found.values()
    times = [f"{large[of] / small[of]:.2f}" for of in ("worker", "driver")]
    seconds = f"{large['last']['seconds'] / small['last']['seconds']:.2f}"
    lines.append([f"{args.large / args.small:g} times", "", "", *times, seconds])
    header = ["input MB", "records", "kept", "peak worker MB", "peak driver MB", "seconds"]
    print(f"\n{machine()}\n\n{table(lines, header)}")


if __name__ == "__main__":
    main()
