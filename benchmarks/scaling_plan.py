"""The plans of prepare, train and embed for a data set that is not there: real planning over files without content.

  python benchmarks/scaling_plan.py                       # a billion records: counts, memory, and all tasks run empty
  python benchmarks/scaling_plan.py --records 1000000

The input is sparse files, which have a size and take no disk; `Inputs` plans over them as over any others. Then the
tasks that read, and one for each record file, as embedding and prepare's later stages have them, go through Ray Data on
this machine and do nothing: what the driver holds and how long scheduling takes is all that is left. Prints the counts,
the driver's peak memory and the tasks a second; three minutes for a billion records.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.artifact import Artifact, Output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import Progress, ray_session, set_environment

set_environment()

from benchmarks.corpora import machine
from pipeline.config import Config, Data, Source
from pipeline.config.tree import Storage
from pipeline.core.console import table
from pipeline.data.feed import training_plan
from pipeline.data.manifest import SPLITS, Manifest, Shard, SourceCount
from pipeline.data.plan import BatchPlan
from pipeline.data.prepare import Inputs
from pipeline.data.records import parts_at_most
from pipeline.data.sources import CHECKED_ROWS
from pipeline.data.tokenizing import ROW_GROUP_ROWS
from pipeline.index.documents import Documents
from pipeline.index.pool import over_cluster

RECORD_BYTES = 500  # of text: the mean of Debian's descriptions and of paragraphs of kernel documentation
FILE_BYTES = 1 << 30
VALIDATION = 0.02


def sparse_source(folder: Path, records: int) -> Source:
    """A source of JSON Lines whose files have their sizes, and a few records each: those that are looked at."""
    left, rows = records * RECORD_BYTES, (json.dumps({"text": "x" * 100}) + "\n") * CHECKED_ROWS
    for number in range(-(-left // FILE_BYTES)):
        path = folder / f"{number:06d}.jsonl"
        path.write_text(rows)
        os.truncate(path, max(path.stat().st_size, min(FILE_BYTES, left - number * FILE_BYTES)))
    return Source(name="all", type="json", path=str(folder), fields={"text": "text"})


def inputs_of(folder: Path, records: int) -> Inputs:
    """What jobs/prepare.py would do."""
    (folder / "in").mkdir()
    source = sparse_source(folder / "in", records)
    return Inputs(Config(storage=Storage(root=str(folder / "store")), data=Data(sources=[source])))


def manifest_of(records: int, shards: int) -> Manifest:
    """That of a data set of so many records, evenly dealt."""
    described = []
    for split, share in zip(SPLITS, (1 - VALIDATION, VALIDATION), strict=True):
        rows = int(records * share) // shards
        groups = [ROW_GROUP_ROWS] * (rows // ROW_GROUP_ROWS) + [rows % ROW_GROUP_ROWS] * bool(rows % ROW_GROUP_ROWS)
        of: list[str | None] = ["all" if split == "train" else None] * len(groups)
        described += [Shard(f"{split}/{i:05d}.parquet", split, rows, groups, of, "0" * 64) for i in range(shards)]
    splits = {
        split: sum(shard.rows for shard in described if shard.split == split) for split in ("train", "validation")
    }
    return Manifest("0" * 64, [SourceCount("all", records, records, {})], splits, described, {"text": {}}, [], {}, {})


def documents_of(folder: Path, ranges: int) -> Documents:
    """The documents of so many record files of text alone, as embedding knows them."""
    records = [folder / "records" / f"{i:05d}.parquet" for i in range(ranges)]
    return Documents(records, "text", {}, True, folder, Artifact(folder, "documents", []), True)


def counted(inputs: Inputs, records: int) -> dict[str, int]:
    """Tasks by stage, and the largest lists that the driver holds meanwhile."""
    text_bytes = sum(plan.text_bytes for _, plan in inputs.plans)
    plan = plan_of(records, inputs.shards)
    return {
        "read tasks": len(inputs.work),
        "MB a read task": max(task.bytes for _, task in inputs.work) >> 20,
        "shards": inputs.shards,
        "KB of text a shard": (text_bytes // inputs.shards) >> 10,
        "parts of the exchange": parts_at_most(sum(task.bytes for _, task in inputs.work), len(inputs.work)),
        "row groups to train on": len(plan.row_groups),
    }


def plan_of(records: int, shards: int) -> BatchPlan:
    return training_plan(Path("prepared"), manifest_of(records, shards), 512, 0)


def read_empty(inputs: Inputs, folder: Path, progress: Progress) -> int:
    """Send prepare's first tasks through Ray, as `make_records` does. Returns their number."""

    def nothing(index: int, output: Output) -> None:
        return

    task_bytes = [task.bytes for _, task in inputs.work]
    return len(Artifact(folder, "empty", []).tasks(progress, "prepare: read and filter", task_bytes, nothing))


def look_empty(inputs: Inputs, folder: Path) -> int:
    """Send embedding's tasks, one a range, through Ray; prepare's later stages have as many. Returns their number."""
    documents = documents_of(folder, inputs.shards)

    return len({first for first, _ in over_cluster(documents.bounds, range(len(documents)))})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10**9)
    records = parser.parse_args().records
    with tempfile.TemporaryDirectory() as name, ray_session() as progress:
        folder, before = Path(name), peak_mb()
        planning, inputs = timed(lambda: inputs_of(folder, records))
        lines: list[tuple[str, str]] = [(name, f"{count:,}") for name, count in counted(inputs, records).items()]
        after_plans = peak_mb()
        ran = {
            "read tasks run, a second": timed(lambda: read_empty(inputs, folder, progress)),
            "a task a record file, a second": timed(lambda: look_empty(inputs, folder)),
        }
        lines += [
            ("seconds to plan prepare", f"{planning:.1f}"),
            ("driver MB before, with all plans, at the end", f"{before:.0f}, {after_plans:.0f}, {peak_mb():.0f}"),
            *((what, f"{tasks:,}, {tasks / seconds:.0f}") for what, (seconds, tasks) in ran.items()),
        ]
    print(f"\n{machine()}\n\n{table(lines, (f'{records:,} records', ''))}")


if __name__ == "__main__":
    main()
