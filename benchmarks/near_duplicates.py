"""How fast near-duplicate removal is, with datatrove's on the same texts and cores beside it.

examples:
  python benchmarks/near_duplicates.py --data data                                     # ours alone
  python benchmarks/near_duplicates.py --data data --peer-python peer/bin/python       # one that has datatrove

Prints a line a corpus and system: linux-doc, then all corpora with each text `--copies` times, slightly edited. Ours
is timed from record files to record files, the Ray session up and its workers cold; datatrove from JSON Lines files to
JSON Lines files, uncompressed and of equal size, with as many workers as there are cores, from the start of its first
stage. Writing the input counts for neither.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.core.artifact import Artifact

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import ray_session, set_environment

set_environment()

from benchmarks.corpora import CORPORA, Record, machine, records, text_bytes, text_of, with_copies, write_records
from pipeline.config import Data, NearDuplicates
from pipeline.core.console import table
from pipeline.data import near_duplicates

CORES = max(2, os.cpu_count() or 2)  # as ray_session has it
PEERS = {"datatrove": "spacy", "datatrove, words by \\w+": "regex"}


def ours(rows: list[Record], folder: Path, threshold: float) -> dict[str, Any]:
    """Seconds and records kept."""
    files = write_records(rows, folder / "input")
    stage, data = Artifact(folder, "distinct", []), Data(near_duplicates=NearDuplicates(threshold=threshold))
    with ray_session() as progress:
        began = time.perf_counter()
        near_duplicates.find_duplicates(stage, progress, files, data)
        counts = near_duplicates.write_distinct(stage, progress, files)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "kept": sum(count["kept"] for count in counts.values())}


def peer(rows: list[Record], folder: Path, python: str, words: str) -> dict[str, Any]:
    """The same of datatrove, as PYTHON runs it."""
    share = -(-len(rows) // (4 * CORES))  # four files a core, so that all cores are busy to the end
    (folder / "input").mkdir(parents=True)
    for number, start in enumerate(range(0, len(rows), share)):
        lines = [json.dumps({"id": row["id"], "text": text_of(row)}) + "\n" for row in rows[start : start + share]]
        (folder / "input" / f"{number:03d}.jsonl").write_text("".join(lines))
    script = str(Path(__file__).with_name("near_duplicates_peer.py"))
    done = subprocess.run(
        [python, script, str(folder), "--workers", str(CORES), "--words", words], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"datatrove failed under {python}:\n{done.stderr[-2000:]}")
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    print(f"{words}: {found['stages']}", file=sys.stderr)
    return found


def measure(name: str, rows: list[Record], args: argparse.Namespace) -> list[list[str]]:
    """The lines of one corpus."""
    systems = {"ours": None, **(PEERS if args.peer_python else {})}
    megabytes, baseline, lines = text_bytes(rows) / 1e6, 0.0, []
    for system, words in systems.items():
        with tempfile.TemporaryDirectory() as folder:
            if words is None:
                found = ours(rows, Path(folder), args.threshold)
                baseline = found["seconds"]
            else:
                found = peer(rows, Path(folder), args.peer_python, words)
        seconds = found["seconds"]
        line = [name, f"{len(rows):,}", f"{megabytes:.1f}", system, f"{seconds:.1f}"]
        line += [f"{megabytes / seconds / CORES:.2f}", f"{len(rows) - found['kept']:,}", f"{seconds / baseline:.1f}"]
        lines.append(line)
        print(*line, sep="  ", file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian, wordnet and linux-doc")
    parser.add_argument("--peer-python", help="an interpreter that has datatrove[io,processing] and spacy")
    parser.add_argument("--copies", type=int, default=5, help="of each text in the larger corpus; 0 leaves it out")
    parser.add_argument("--threshold", type=float, default=0.8, help="ours; datatrove's is about 0.75 by its bands")
    args = parser.parse_args()
    lines = measure("linux-doc", records(args.data, "linux-doc"), args)
    if args.copies:
        every = [row for name in CORPORA for row in records(args.data, name)]
        lines += measure(f"all three, {args.copies} times", with_copies(every, args.copies), args)
    header = ["corpus", "records", "MB", "system", "seconds", "MB/s a core", "removed", "times ours"]
    print(f"\n{machine()}\n\n{table(lines, header)}")


if __name__ == "__main__":
    main()
