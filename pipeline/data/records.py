"""From sources to records: every record of the input leaves as one row, kept or rejected with its reason.

    read + judge ──► exchange by hash of id ──► exact dedup ──► records/00000.parquet, rejected/00000.parquet
    a task a few MB                             a task a shard

Rows are counted twice, where they are read and where they are written, on either side of the exchange: that
`rows_in == rows_kept + rejected` is a check and not a definition. A shard's rows are sorted by content, and of equal
records the one with the least source_id stays, so no file depends on the order in which rows arrive.
"""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Data, Source
from pipeline.data.exchange import read_part, write_parts
from pipeline.data.judging import JUDGED_SCHEMA, Judge
from pipeline.data.manifest import RECORD_SCHEMA, SourceCount, rejections
from pipeline.runtime.artifact import Artifact, Output, open_parquet
from pipeline.runtime.cluster import connected_cluster
from pipeline.runtime.console import log
from pipeline.runtime.session import Progress
from pipeline.sources.source import ReadTask, read
from pipeline.storage.files import sizes
from pipeline.storage.path import StoragePath
from pipeline.text.identity import shard_of

PART_CHARS = 8 << 20  # of text that a read task holds before it writes it out
MAX_PARTS = 5_000  # beyond that, parts are larger: each is opened by every task on the other side


def make_records(
    records: Artifact, progress: Progress, work: Sequence[tuple[Source, ReadTask]], data: Data, shards: int
) -> list[SourceCount]:
    """Fill the artifact's `records/` and `rejected/`. Returns what became of each source's records, not yet checked."""
    task_bytes = [task.bytes for _, task in work]
    part_chars = _part_chars(sum(task_bytes))

    def judge(index: int, output: Output) -> dict[str, Any]:
        source, task = work[index]
        return _judge_task(index, task, source, data, shards, part_chars, output)

    tallies = records.tasks(progress, "prepare: read and judge", task_bytes, judge, _only_here(work))
    read_in: Counter[str] = Counter(dict.fromkeys((source.name for source, _ in work), 0))
    parts: list[StoragePath] = []
    for (source, _), tally in zip(work, tallies, strict=True):
        read_in[source.name] += tally["rows_in"]
        parts += [records.folder / name for name in tally["parts"]]
    size = sum(filter(None, sizes(parts))) // shards

    def write(shard: int, output: Output) -> dict[str, dict[str, int]]:
        return _write_shard(read_part(parts, shard), output, shard) if parts else {}

    counts = records.tasks(progress, "prepare: remove exact duplicates", [size] * shards, write)
    return _merge(read_in, counts)


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
    index: int, task: ReadTask, source: Source, data: Data, shards: int, part_chars: int, output: Output
) -> dict[str, Any]:
    """Write the task's judged rows in parts. Returns how many rows were read, and the names of the parts."""
    judge, count = Judge(source, data), 0
    parts: list[str] = []
    for rows in _in_parts(map(judge, read(task, source)), part_chars):
        parts.append(f"scratch/judged/{index:06d}-{len(parts)}.parts")
        table, shard = pa.Table.from_pylist(rows, JUDGED_SCHEMA), [shard_of(row["id"], shards) for row in rows]
        with output.writing(parts[-1]) as file:
            write_parts(table, shard, shards, file)
        count += len(rows)
        output.report(records=len(rows), rejected=sum("reason" in row for row in rows))
    return {"rows_in": count, "parts": parts}


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


def _write_shard(judged: pa.Table, output: Output, shard: int) -> dict[str, dict[str, int]]:
    """Drop exact duplicates and write one shard. Returns source → outcome (`kept` or a reason) → rows."""
    keys = ("id", "source_id", "reason", "metadata", "excerpt")
    judged = judged.sort_by([(key, "ascending") for key in keys])
    kept, rejected = _without_duplicates(judged)
    output.write_table(f"records/{shard:05d}.parquet", kept.select(RECORD_SCHEMA.names).cast(RECORD_SCHEMA))
    output.write_table(f"rejected/{shard:05d}.parquet", rejected)
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


def record_texts(files: Iterable[StoragePath], fields: list[str], max_bytes: int) -> Iterator[str]:
    """Texts of records in canonical order, up to about `max_bytes`: what a vocabulary is trained on."""
    total = 0
    for file in files:
        for batch in open_parquet(file).iter_batches(1024, columns=fields):
            for row in batch.to_pylist():
                for text in itertools.chain.from_iterable(map(_each, row.values())):
                    total += len(text.encode())
                    yield text
            if total > max_bytes:
                return


def _each(value: str | list[str] | None) -> Sequence[str]:
    """The texts of a field: one, several negatives, or none."""
    return [value] if isinstance(value, str) else value or []
