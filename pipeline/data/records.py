"""From sources to records: every record of the input leaves as one row, kept or rejected with its reason.

    read + judge ──► exchange by hash of id ──► exact dedup ──► records/00000.parquet, rejected/00000.parquet
    a task a few MB                             a task a shard

Rows are counted twice, where they are read and where they are written, on either side of the exchange: that
`rows_in == rows_kept + rejected` is a check and not a definition. A shard's rows are sorted by content, and of equal
records the one with the least source_id stays, so no file depends on the order in which rows arrive.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Data, Source
from pipeline.data.exchange import read_part, write_parts
from pipeline.data.judging import JUDGED_SCHEMA, Judge
from pipeline.data.manifest import RECORD_SCHEMA, SourceCount, parquet_file, rejections, write_table
from pipeline.data.work import Report, Stage, Task, run_tasks
from pipeline.runtime.cluster import connected_cluster
from pipeline.runtime.console import log
from pipeline.runtime.files import for_each, sizes, write_atomically
from pipeline.runtime.session import Board
from pipeline.sources.source import ReadTask, read
from pipeline.storage.bucket import AnyPath
from pipeline.text.identity import shard_of

PART_CHARS = 8 << 20  # of text that a read task holds before it writes it out
MAX_PARTS = 5_000  # beyond that, parts are larger: each is opened by every task on the other side


def make_records(
    stage: Stage, board: Board, work: Sequence[tuple[Source, ReadTask]], data: Data, shards: int
) -> list[SourceCount]:
    """Fill the stage's `records/` and `rejected/`. Returns what became of each source's records, not yet checked."""
    scratch, tallies = stage.scratch, [stage.scratch / "judged" / f"{i:06d}.json" for i in range(len(work))]

    part_chars = _part_chars(sum(task.bytes for _, task in work))

    def judge(index: int, report: Report) -> None:
        source, task = work[index]
        _judge_task(task, source, data, shards, part_chars, tallies[index], report)

    tasks = [Task(task.bytes, tally) for (_, task), tally in zip(work, tallies, strict=True)]
    run_tasks(board, "prepare: read and judge", tasks, judge, _only_here(work))

    read_in: Counter[str] = Counter()
    parts: list[AnyPath] = []
    for (source, _), tally in zip(work, for_each(scratch, _read_json, tallies), strict=True):
        read_in[source.name] += tally["rows_in"]
        parts += [scratch / "judged" / name for name in tally["parts"]]
    counts = [scratch / "counts" / f"{shard:05d}.json" for shard in range(shards)]
    size = sum(filter(None, sizes(parts))) // shards

    def write(shard: int, report: Report) -> None:
        outcome = _write_shard(read_part(parts, shard), stage.folder, shard) if parts else {}
        write_atomically(counts[shard], json.dumps(outcome).encode())
        report({"bytes": size})

    run_tasks(board, "prepare: remove exact duplicates", [Task(size, path) for path in counts], write)
    rows_in = dict.fromkeys((source.name for source, _ in work), 0) | read_in
    return _merge(rows_in, for_each(scratch, _read_json, counts))


def _part_chars(total_bytes: int) -> int:
    return max(PART_CHARS, total_bytes // MAX_PARTS)


def parts_at_most(total_bytes: int, tasks: int) -> int:
    """About how many parts so many read tasks write of so much input: one a task at least."""
    return tasks + total_bytes // _part_chars(total_bytes)


def _only_here(work: Sequence[tuple[Source, ReadTask]]) -> set[int]:
    """Reading of installed packages, which were listed on this node and may be others elsewhere."""
    found = {index for index, (source, _) in enumerate(work) if source.type == "python_packages" and not source.path}
    if not found or len(connected_cluster().nodes) == 1:
        return set()
    log.info("prepare: installed packages are read on one node, %s, where the job runs", socket.gethostname())
    return found


def _judge_task(
    task: ReadTask, source: Source, data: Data, shards: int, part_chars: int, tally: AnyPath, report: Report
) -> None:
    """Write the task's judged rows in parts, then what was read and written."""
    judge, count = Judge(source, data), 0
    parts: list[str] = []
    for rows in _in_parts(map(judge, read(task, source)), part_chars):
        path = tally.parent / f"{tally.stem}-{len(parts)}.parts"
        write_parts(
            pa.Table.from_pylist(rows, JUDGED_SCHEMA), [shard_of(row["id"], shards) for row in rows], shards, path
        )
        parts.append(path.name)
        count += len(rows)
        report({"records": len(rows), "rejected": sum("reason" in row for row in rows)})
    write_atomically(tally, json.dumps({"rows_in": count, "parts": parts}).encode())
    report({"bytes": task.bytes})


def _in_parts(rows: Iterable[dict[str, Any]], part_chars: int) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    chars = 0
    for row in rows:
        part.append(row)
        chars += 100 + sum(len(text) for value in row.values() for text in _each(value))
        if chars >= part_chars:
            yield part
            part, chars = [], 0
    if part:
        yield part


def _write_shard(judged: pa.Table, folder: AnyPath, shard: int) -> dict[str, dict[str, int]]:
    """Drop exact duplicates and write one shard. Returns source → outcome (`kept` or a reason) → rows."""
    keys = ("id", "source_id", "reason", "metadata", "excerpt")
    judged = judged.sort_by([(key, "ascending") for key in keys])
    kept, rejected = _without_duplicates(judged)
    write_table(kept.select(RECORD_SCHEMA.names).cast(RECORD_SCHEMA), folder / "records" / f"{shard:05d}.parquet")
    write_table(rejected, folder / "rejected" / f"{shard:05d}.parquet")
    counts: dict[str, Counter[str]] = {source: Counter() for source in judged["source"].unique().to_pylist()}
    for source in kept["source"].to_pylist():
        counts[source]["kept"] += 1
    for source, reason in zip(rejected["source"].to_pylist(), rejected["reason"].to_pylist(), strict=True):
        counts[source][reason] += 1
    return {source: dict(found) for source, found in counts.items()}


def _without_duplicates(judged: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows to keep, and rejected ones in REJECTED_SCHEMA, duplicates among them; `judged` is sorted by id."""
    ids, reasons = judged["id"].to_pylist(), judged["reason"].to_pylist()
    source_ids = judged["source_id"].to_pylist()
    stands_for: list[str | None] = []
    for i, reason in enumerate(reasons):
        repeated = i > 0 and ids[i] == ids[i - 1] and reason is None and reasons[i - 1] is None
        stands_for.append((stands_for[-1] or source_ids[i - 1]) if repeated else None)
    survivor = pa.array(stands_for, pa.string())
    keep = pc.and_(pc.is_null(judged["reason"]), pc.is_null(survivor))
    gone = judged.append_column("duplicate_of", survivor).filter(pc.invert(keep))
    return judged.filter(keep), rejections(gone, "duplicate", None)


def _merge(read_in: dict[str, int], counts: Iterable[dict[str, dict[str, int]]]) -> list[SourceCount]:
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in read_in}
    for shard in counts:
        for name, outcome in shard.items():
            outcomes[name].update(outcome)
    return [
        SourceCount(name, rows, outcomes[name].pop("kept", 0), dict(sorted(outcomes[name].items())))
        for name, rows in read_in.items()
    ]


def _read_json(path: AnyPath) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def record_texts(files: Iterable[AnyPath], fields: list[str], max_bytes: int) -> Iterator[str]:
    """Texts of records in canonical order, up to about `max_bytes`: what a vocabulary is trained on."""
    total = 0
    for file in files:
        for batch in parquet_file(file).iter_batches(1024, columns=fields):
            for row in batch.to_pylist():
                for text in itertools.chain.from_iterable(map(_each, row.values())):
                    total += len(text.encode())
                    yield text
            if total > max_bytes:
                return


def _each(value: str | list[str] | None) -> Sequence[str]:
    """The texts of a field: one, several negatives, or none."""
    return [value] if isinstance(value, str) else value or []
