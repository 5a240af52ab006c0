"""From raw records to kept and rejected ones: the verdict on each, and what a shard of them becomes.

Every record of the input leaves as one row, kept or rejected with its reason, and every task adds a tally row with the
number it read, so that `rows_in == rows_kept + rejected` is a check and not a definition: tallies are counted where
records are read, verdicts where shards are written, on the far side of the shuffle.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Data, Source
from pipeline.data.manifest import RECORD_SCHEMA, REJECTED_SCHEMA, TEXT_FIELDS
from pipeline.data.sources import RawRecord, ReadTask, read
from pipeline.text.identity import content_id, shard_of
from pipeline.text.rules import normalise, verdict

EXCERPT_CHARS = 200
BATCH_ROWS = 4096
JUDGED_SCHEMA = pa.schema(
    [*RECORD_SCHEMA, ("shard", pa.int32()), ("reason", pa.string()), ("excerpt", pa.string()), ("tally", pa.int64())]
)


def judge_task(task: ReadTask, source: Source, data: Data, shards: int) -> Iterator[pa.Table]:
    """Tables of JUDGED_SCHEMA: the task's records with their verdicts, and one tally row."""
    read_count = 0
    rows: list[dict[str, Any]] = []
    for raw in read(task, source):
        read_count += 1
        rows.append(_judge(raw, source.name, data, shards))
        if len(rows) == BATCH_ROWS:
            yield pa.Table.from_pylist(rows, JUDGED_SCHEMA)
            rows = []
    rows.append({"id": "", "source": source.name, "shard": 0, "tally": read_count})
    yield pa.Table.from_pylist(rows, JUDGED_SCHEMA)


def _judge(raw: RawRecord, source: str, data: Data, shards: int) -> dict[str, Any]:
    row: dict[str, Any] = {"source": source, "source_id": _writable(f"{source}:{raw.native_id}")}
    reason = raw.reason
    for name, text in raw.fields.items():
        reason = reason or verdict(
            text, min_chars=data.min_chars, max_chars=data.max_chars, max_nonprintable=data.max_nonprintable
        )
        row[name] = normalise(text) if reason is None else None
    if reason is None:
        row["id"] = content_id([row[name] for name in TEXT_FIELDS if name in row])
        row["metadata"] = _writable(json.dumps(raw.metadata, ensure_ascii=False, default=str))
    else:
        excerpt = raw.excerpt or " | ".join(text[:EXCERPT_CHARS] for text in raw.fields.values())
        row = {"source": source, "source_id": row["source_id"], "reason": reason}
        row["excerpt"] = _writable(excerpt[:EXCERPT_CHARS])
        row["id"] = content_id([row["source_id"], row["excerpt"]])
    row["shard"] = shard_of(row["id"], shards)
    return row


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def write_shard(judged: pa.Table, folder: Path) -> pa.Table:
    """Drop exact duplicates, write `records/` and `rejected/` files of one shard, return its counts by source.

    Rows are sorted by content alone, and of equal records the one with the least source_id stays, so the files do not
    depend on the order in which rows arrive. Counts are a table of source, outcome (`in`, `kept` or a reason), rows.
    """
    shard = judged["shard"][0].as_py()
    tallies = judged.filter(pc.is_valid(judged["tally"]))
    records = judged.filter(pc.is_null(judged["tally"]))
    keys = ("id", "source_id", "reason", "metadata", "excerpt")
    records = records.sort_by([(key, "ascending") for key in keys])
    kept, rejected = _without_duplicates(records)
    _write(kept.select(RECORD_SCHEMA.names).cast(RECORD_SCHEMA), folder / "records" / f"{shard:05d}.parquet")
    _write(rejected.select(REJECTED_SCHEMA.names).cast(REJECTED_SCHEMA), folder / "rejected" / f"{shard:05d}.parquet")
    counts: Counter[tuple[str, str]] = Counter()
    for source, tally in zip(tallies["source"].to_pylist(), tallies["tally"].to_pylist(), strict=True):
        counts[source, "in"] += tally
    counts.update((source, "kept") for source in kept["source"].to_pylist())
    counts.update(zip(rejected["source"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    return pa.table(
        {
            "source": pa.array([source for source, _ in counts], pa.string()),
            "outcome": pa.array([outcome for _, outcome in counts], pa.string()),
            "rows": pa.array(list(counts.values()), pa.int64()),
        }
    )


def _without_duplicates(records: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows to keep, and rejected ones, duplicates among them; `records` are sorted by id."""
    ids, reasons = records["id"].to_pylist(), records["reason"].to_pylist()
    outcome: list[str | None] = []
    for i, reason in enumerate(reasons):
        repeated = i > 0 and ids[i] == ids[i - 1] and reason is None and reasons[i - 1] is None
        outcome.append("duplicate" if repeated else reason)
    keep = pa.array([reason is None for reason in outcome], pa.bool_())
    rejected = records.filter(pc.invert(keep))
    text = pc.coalesce(rejected["excerpt"], rejected["anchor"], rejected["text"])
    rejected = rejected.set_column(
        rejected.schema.get_field_index("excerpt"), "excerpt", pc.utf8_slice_codeunits(text, 0, EXCERPT_CHARS)
    )
    reason_column = pa.array([reason for reason in outcome if reason is not None], pa.string())
    return records.filter(keep), rejected.set_column(rejected.schema.get_field_index("reason"), "reason", reason_column)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table.combine_chunks(), temporary, compression="zstd", row_group_size=8192)
    temporary.rename(path)


def record_texts(files: Iterable[Path], fields: list[str], max_bytes: int) -> Iterator[str]:
    """Texts of records in canonical order, up to about `max_bytes`: what a vocabulary is trained on."""
    total = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1024, columns=fields):
            for row in batch.to_pylist():
                for text in row.values():
                    total += len(text)
                    yield text
            if total > max_bytes:
                return
