"""Turns sources into records: each input record becomes one row, kept or rejected with a reason.

    read + filter ──► shuffle by hash of id ──► exact dedup ──► records/00000.parquet, rejected/00000.parquet
    one task per 4 MB                           one task per shard

Rows are counted before and after the shuffle, so `rows_in == rows_kept + rejected` detects lost rows. Each shard is
sorted by content, and the smallest source_id among equal records stays, so no file depends on the order in which rows
arrive. Cost: that of reading and filtering; every record is written to disk once and read back.
"""

from __future__ import annotations

import itertools
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Data, Source
from pipeline.core.artifact import Artifact, Output, open_parquet
from pipeline.core.cluster import connected_cluster
from pipeline.core.console import log
from pipeline.core.files import file_sizes, parquet_file, sorted_glob
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.fields import LOST_FILES
from pipeline.data.filtering import Filter
from pipeline.data.manifest import RECORD_SCHEMA, SourceCount, count_outcomes, rejections
from pipeline.data.partitions import read_part, shard_of, write_parts
from pipeline.data.sources import ReadTask, SourcePlan, read

FILTERED_SCHEMA = pa.schema([*RECORD_SCHEMA, ("reason", pa.string()), ("excerpt", pa.string())])
PART_CHARS = 8 << 20  # text that a read task buffers before writing it
MAX_PARTS = 5_000  # beyond this, parts grow instead, because every shard's task opens every part
BAD = (
    "broken_",
    "invalid_",
    "missing_",
    "null_",
    "unreadable_",
    "unpacks_",
    "wrong_",
    "file_too_",
    "line_too_",
    "paragraph_too_",
)
"""Prefixes of the reasons for unreadable records, which `data.max_bad_fraction` limits."""
DUPLICATES = ("duplicate", "near_duplicate")
EXAMPLES = 3


def make_records(
    records: Artifact, progress: Progress, plans: Sequence[tuple[Source, SourcePlan]], data: Data, shards: int
) -> list[SourceCount]:
    """Write the artifact's `records/` and `rejected/`. Returns the counts of each source, not yet checked."""
    work = [(source, task) for source, plan in plans for task in plan.tasks]
    task_bytes = [task.bytes for _, task in work]
    part_chars = _part_chars(sum(task_bytes))

    def filter_task(index: int, output: Output) -> dict[str, Any]:
        """Write a task's rows in parts. Returns their number, the names of the parts and of unreadable files."""
        source, task = work[index]
        count, parts, unreadable = 0, list[str](), list[str]()
        for rows in _in_parts(map(Filter(source, data), read(task, source)), part_chars):
            parts.append(f"scratch/filtered/{index:06d}-{len(parts)}.parts")
            table = pa.Table.from_pylist(rows, FILTERED_SCHEMA)
            with output.writing(parts[-1]) as file:
                write_parts(table, [shard_of(row["id"], shards) for row in rows], shards, file)
            count += len(rows)
            found = [row["source_id"] for row in rows if row.get("reason") in LOST_FILES]
            unreadable += [source_id.removeprefix(f"{source.name}:") for source_id in found]
            output.report(records=len(rows), rejected=sum("reason" in row for row in rows))
        return {"rows_in": count, "parts": parts, "unreadable": unreadable}

    done = records.tasks(progress, "prepare: read and filter", task_bytes, filter_task, _only_here(work))
    rows_in, unreadable = Counter[str](), defaultdict[str, set[str]](set)
    for (source, _), task in zip(work, done, strict=True):
        rows_in[source.name] += task["rows_in"]
        unreadable[source.name].update(task["unreadable"])
    parts = [records.folder / name for task in done for name in task["parts"]]
    size = sum(filter(None, file_sizes(parts))) // shards

    def write(shard: int, output: Output) -> dict[str, Counter[str]]:
        return _write_shard(read_part(parts, shard), output, shard) if parts else {}

    outcomes = merge_outcomes(records.tasks(progress, "prepare: remove exact duplicates", [size] * shards, write))
    counts = [
        SourceCount(source.name, rows_in[source.name], 0, {}, lost_fraction=plan.lost_fraction(unreadable[source.name]))
        for source, plan in plans
    ]
    return [after_stage(count, outcomes) for count in counts]


def _part_chars(total_bytes: int) -> int:
    return max(PART_CHARS, total_bytes // MAX_PARTS)


def parts_at_most(total_bytes: int, tasks: int) -> int:
    """About how many parts `tasks` read tasks write for `total_bytes` of input: at least one per task."""
    return tasks + total_bytes // _part_chars(total_bytes)


def _only_here(work: Sequence[tuple[Source, ReadTask]]) -> set[int]:
    """Tasks that read this node's installed packages; other nodes may have different ones."""
    found = {index for index, (source, _) in enumerate(work) if source.type == "python_packages" and not source.path}
    if not found or len(connected_cluster().nodes) == 1:
        return set()
    log.info("prepare: reading installed packages on the job's node only, %s", socket.gethostname())
    return found


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


def _write_shard(filtered: pa.Table, output: Output, shard: int) -> dict[str, Counter[str]]:
    """Drop exact duplicates and write one shard. Returns source → outcome (`kept` or a reason) → rows."""
    keys = ("id", "source_id", "reason", "metadata", "excerpt")
    kept, rejected = _without_duplicates(filtered.sort_by([(key, "ascending") for key in keys]))
    output.write_table(f"records/{shard:05d}.parquet", kept.select(RECORD_SCHEMA.names).cast(RECORD_SCHEMA))
    output.write_table(f"rejected/{shard:05d}.parquet", rejected)
    return count_outcomes(kept, rejected)


def _without_duplicates(filtered: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows to keep, and rejected ones in REJECTED_SCHEMA, including duplicates; `filtered` is sorted by id."""
    ids, reasons = filtered["id"].to_pylist(), filtered["reason"].to_pylist()
    source_ids = filtered["source_id"].to_pylist()
    duplicate_of: list[str | None] = []
    for i, reason in enumerate(reasons):
        repeated = i > 0 and ids[i] == ids[i - 1] and reason is None and reasons[i - 1] is None
        duplicate_of.append((duplicate_of[-1] or source_ids[i - 1]) if repeated else None)
    first = pa.array(duplicate_of, pa.string())
    keep = pc.and_(pc.is_null(filtered["reason"]), pc.is_null(first))
    dropped = filtered.append_column("duplicate_of", first).filter(pc.invert(keep))
    return filtered.filter(keep), rejections(dropped, "duplicate", None)


def merge_outcomes(tasks: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, Counter[str]]:
    """Sum the counts (source → outcome → rows) of all tasks."""
    total: dict[str, Counter[str]] = {}
    for source, outcome in itertools.chain.from_iterable(task.items() for task in tasks):
        total.setdefault(source, Counter()).update(outcome)
    return total


def after_stage(source: SourceCount, outcomes: Mapping[str, Mapping[str, int]]) -> SourceCount:
    """A source's counts after a stage with these outcomes."""
    outcome = Counter(outcomes.get(source.name, {}))
    kept = outcome.pop("kept", 0)
    return replace(source, rows_kept=kept, rejected=dict(sorted((Counter(source.rejected) + outcome).items())))


def check_sources(sources: Sequence[SourceCount], data: Data, folder: StoragePath) -> None:
    """Raise JobError if records got lost, too many are unreadable, or a source, or all of them, lost every record.

    One message names all sources that fail.
    """
    problems = [problem for source in sources if (problem := _problem(source, data.max_bad_fraction, folder))]
    if problems:
        raise JobError(f"{'; '.join(problems)}; see {folder / 'rejected'}")
    if not any(source.rows_kept for source in sources):
        what = "; ".join(f"{source.name}: {_listed(source.rejected) or 'empty'}" for source in sources)
        raise JobError(f"data.sources: all records were rejected ({what})")


def _problem(source: SourceCount, allowed: float, folder: StoragePath) -> str | None:
    """Why the job must stop because of this source, or None."""
    found = source.rows_kept + sum(source.rejected.values())
    if source.rows_in != found:
        return f"source {source.name}: read {source.rows_in} records but wrote {found}; report this bug"
    bad = {reason: rows for reason, rows in source.rejected.items() if reason.startswith(BAD)}
    files = sum(bad.pop(reason, 0) for reason in LOST_FILES)  # nobody knows how many records each of them stands for
    limit = f"more than data.max_bad_fraction={allowed} allows"
    if files and min(1.0, source.lost_fraction + sum(bad.values()) / source.rows_in) > allowed:
        also = f", and {_listed(bad)} of {source.rows_in} records" if bad else ""
        return (
            f"source {source.name}: cannot read {files} file{'s' * (files > 1)} to the end "
            f"({_examples(folder, source.name)}), which may lose {source.lost_fraction:.0%} of the records{also}, "
            f"{limit}; repair or remove what is named, or accept the loss with data.max_bad_fraction=1"
        )
    if sum(bad.values()) > allowed * source.rows_in:
        return f"source {source.name}: {_listed(bad)} of {source.rows_in} records, {limit}"
    duplicates = sum(source.rejected.get(reason, 0) for reason in (*DUPLICATES, "contaminated"))
    nothing_left = source.rows_in and source.rows_kept + duplicates == 0  # all may be duplicates of other sources'
    if nothing_left and allowed < 1:
        if set(source.rejected) <= {"no_heading", "empty_section"}:
            advice = "use pairs: neighbours in data.sources, or leave pairs out"
            return f"source {source.name}: found no heading with text under it; {advice}"
        return (
            f"source {source.name}: all {source.rows_in} records were rejected ({_listed(source.rejected)}); repair or "
            "remove it, or accept the loss with data.max_bad_fraction=1"
        )
    return None


def check_duplicates(sources: Sequence[SourceCount], allowed: float, more: int = 0) -> None:
    """Raise JobError if too many records that passed the rules are duplicates; `more` are not counted yet."""
    duplicates = sum(source.rejected.get(reason, 0) for source in sources for reason in DUPLICATES)
    passed = sum(source.rows_kept for source in sources) + duplicates
    if (duplicates + more) > allowed * passed:
        raise JobError(
            f"{duplicates + more} of {passed} records are duplicates, "
            f"more than data.max_removed_fraction={allowed} allows; check the sources, or raise the limit"
        )


def warn_of_bad_input(sources: Sequence[SourceCount], folder: StoragePath) -> None:
    """Warn about empty sources, and about unreadable records with examples."""
    for source in sources:
        if not source.rows_in:
            log.warning("source %s: empty", source.name)
        for reason, rows in source.rejected.items():
            if reason.startswith(BAD):
                found = itertools.islice(_rejected(folder, source.name, reason), EXAMPLES)
                examples = ", ".join(source_id for source_id, _ in found)
                log.warning(
                    "source %s: %s records rejected as %s, such as %s", source.name, f"{rows:,}", reason, examples
                )


def _examples(folder: StoragePath, source: str) -> str:
    """Some of a source's unreadable files, and why they are."""
    lost = itertools.chain.from_iterable(_rejected(folder, source, reason) for reason in LOST_FILES)
    found = itertools.islice(lost, EXAMPLES)
    return "; ".join(f"{source_id.removeprefix(f'{source}:')}: {excerpt}" for source_id, excerpt in found)


def _rejected(folder: StoragePath, source: str, reason: str) -> Iterator[tuple[str, str]]:
    """The source_id and excerpt of each record that was rejected for a reason."""
    for path in sorted_glob(folder / "rejected", "*.parquet"):
        rows = open_parquet(path).read(columns=["source", "reason", "source_id", "excerpt"])
        rows = rows.filter((pc.field("source") == source) & (pc.field("reason") == reason))
        yield from zip(rows["source_id"].to_pylist(), rows["excerpt"].to_pylist(), strict=True)


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{rows} {reason}" for reason, rows in reasons.items())


def record_texts(files: Iterable[StoragePath], fields: list[str], max_bytes: int) -> Iterator[str]:
    """Texts of records in canonical order, up to about `max_bytes`, to train a tokenizer on."""
    total = 0
    for file in files:
        for batch in open_parquet(file).iter_batches(1024, columns=fields):
            for row in batch.to_pylist():
                for text in itertools.chain.from_iterable(map(_each, row.values())):
                    total += len(text.encode())
                    yield text
            if total > max_bytes:
                return


def text_bytes_of(files: Iterable[StoragePath], fields: list[str]) -> int:
    """About how many bytes of text the fields of record files have, from the files' footers."""
    total = 0
    for file in files:
        metadata = parquet_file(file).metadata
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        columns = (group.column(column) for group in groups for column in range(group.num_columns))
        total += sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in fields)
    return total


def _each(value: str | list[str] | None) -> Sequence[str]:
    """The texts of a field: one, several (negatives), or none."""
    return [value] if isinstance(value, str) else value or []
