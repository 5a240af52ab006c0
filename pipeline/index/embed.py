"""Updates the vector table on the cluster.

    task per range ──► documents without a row ──► actor pool of encoders ──► tasks write fragments
                                                          driver: commits the fragments in waves

sync.py implements the tasks. A killed job loses the wave that was not committed; the next job embeds what is missing.
"""

from __future__ import annotations

import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.cluster import connected_cluster
from pipeline.core.console import log
from pipeline.core.files import lance_location
from pipeline.core.memory import returning_freed_memory
from pipeline.core.session import Progress
from pipeline.index.chunks import expand_chunks
from pipeline.index.dead_letters import DeadLetters, Refused
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.indexing import finish, missing_index
from pipeline.index.pool import encoded, one_task_per_item, over_cluster, starting
from pipeline.index.sync import Difference, Sync
from pipeline.index.table import Fragment, VectorTable
from pipeline.index.vectors import as_matrix, one_array
from pipeline.index.writer import Writer

# NOTE: encoders' CPU shares have two decimals, so this never equals one. With equal shares, Ray Data would fuse reading
# and encoding: each record file would go to a single actor, and GPUs would idle while it tokenizes (Ray 2.60).
READ_CPUS = 0.251
MAX_FRAGMENT_BYTES = 256 << 20  # of texts, which the writing task holds in memory
MIN_FRAGMENT_ROWS, MAX_FRAGMENT_ROWS = 8_192, 131_072
PHASES = ("read", "encode", "write", "commit")
MIN_WAVE_S = 1.0  # between commits; longer if 50 commits, or 1% of the time so far, take longer
SPREAD_ROWS = 10_000_000  # from this many rows on, all nodes compact files and build the vector index
LOCAL_ROWS = 8_000_000  # up to this many documents, the driver compares ids itself


def fragment_rows(documents: int, mean_bytes: float = 0.0) -> int:
    """Rows per fragment: about 1% of the documents, within the limits above; `mean_bytes` is per document."""
    rows = min(max(MIN_FRAGMENT_ROWS, documents // 100), MAX_FRAGMENT_ROWS)
    return max(1, min(rows, int(MAX_FRAGMENT_BYTES / max(mean_bytes, 1))))


class WaveCommitter:
    """Collects fragments and commits them in waves.

    A kill loses the current wave: at most 1 s or 1% of the time so far, more if commits are slow.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer, self.fragments = writer, list[Fragment]()
        self.began = self.last = time.monotonic()
        self.commits, self.longest_s, self.commit_s = 0, 0.0, 0.0

    def add(self, fragments: Sequence[Fragment]) -> None:
        self.fragments += fragments
        now = time.monotonic()
        if now - self.last > max(MIN_WAVE_S, 50 * self.longest_s, 0.01 * (now - self.began)):
            self.commit()

    def commit(self) -> None:
        if not self.fragments:
            return
        began = time.monotonic()
        self.writer.append(self.fragments)
        self.fragments, self.last = [], time.monotonic()
        self.commits, self.commit_s = self.commits + 1, self.commit_s + self.last - began
        self.longest_s = max(self.longest_s, self.last - began)


@dataclass(frozen=True)
class EmbedStats:
    """Rows written, texts refused, tokens, commits, and seconds by phase, summed over all processes."""

    written: int = 0
    refused: int = 0
    tokens: int = 0
    commits: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def rates(self, seconds: float) -> str:
        """A summary of throughput, for a job that took `seconds`, and of the time spent in each phase."""
        phases = ", ".join(f"{name} {self.seconds.get(name, 0.0):.1f} s" for name in PHASES)
        return (
            f"{self.written:,} vectors in {self.commits:,} commits, {seconds:.1f} s, {self.written / seconds:,.0f} "
            f"vectors/s, {self.tokens / seconds:,.0f} tokens/s; over all processes {phases}"
        )


def embed(
    sync: Sync,
    recipe: EncoderRecipe,
    ranges: Sequence[int],
    documents: int,
    letters: DeadLetters,
    progress: Progress,
    writer: Writer,
) -> EmbedStats:
    """Encode the documents of these ranges that have no row, and append them to the table in waves.

    `documents` is the number of documents to encode.
    """
    handle, table = progress.handle, sync.table

    def due(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for index in batch["id"].tolist():
            began = time.perf_counter()
            for rows in sync.due(ranges[index]):
                handle.post.remote({"spent": {"read": time.perf_counter() - began}})
                yield rows
                began = time.perf_counter()

    def write(rows: pa.Table) -> pa.Table:
        began = time.perf_counter()
        with returning_freed_memory():
            result = write_fragments(table, rows, letters)
        handle.post.remote({"spent": {"write": time.perf_counter() - began}})
        return pa.table({"result": pa.array([pickle.dumps(result)], pa.binary())})

    spent = defaultdict[str, float](float)

    def receive(message: dict[str, Any]) -> None:
        for name, amount in message.get("spent", {}).items():
            spent[name] += amount

    written = refused = 0
    waves = WaveCommitter(writer)
    with progress.stage("embed", documents, "documents", counter="embedded", receive=receive, describe=starting):
        dataset = one_task_per_item(len(ranges)).map_batches(due, batch_size=1, num_cpus=READ_CPUS)
        dataset = encoded(dataset, documents, recipe, progress)
        dataset = dataset.map_batches(
            write, batch_size=fragment_rows(documents, sync.documents.mean_bytes), batch_format="pyarrow", num_cpus=0.5
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for fragments, bad in map(pickle.loads, batch["result"].to_pylist()):
                waves.add(fragments)
                written, refused = written + sum(each.rows for each in fragments), refused + bad
        waves.commit()
    return EmbedStats(written, refused, int(spent["tokens"]), waves.commits, {**spent, "commit": waves.commit_s})


def write_fragments(table: VectorTable, rows: pa.Table, letters: DeadLetters) -> tuple[list[Fragment], int]:
    """Write documents with their vectors, and set aside those with a zero or non-finite vector.

    Returns the fragments, and the number of documents set aside.
    """
    good, bad, reasons = _split_by_validity(expand_chunks(rows) if "vectors" in rows.column_names else rows)
    letters.append(bad, reasons)
    good = table.stored(good).sort_by("id")
    return table.write(good), len(set(bad["parent_id" if table.chunks else "id"].to_pylist()))


def _split_by_validity(rows: pa.Table) -> tuple[pa.Table, pa.Table, list[Refused]]:
    """Rows to write, rows with an invalid vector, and the reasons. One invalid chunk excludes all chunks of a text."""
    lengths = np.linalg.norm(as_matrix(rows["vector"]).astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    bad = rows.filter(pa.array(~good))
    reasons = ["its vector is zero" if length == 0 else "its vector holds NaN or infinity" for length in lengths[~good]]
    refused = [Refused(i, reason, 0) for i, reason in zip(bad["id"].to_pylist(), reasons, strict=True)]
    if "parent_id" in rows.column_names and len(bad):
        good &= pc.invert(pc.is_in(rows["parent_id"], one_array(bad["parent_id"]))).to_numpy()
    return rows.filter(pa.array(good)), bad, refused


def differences(sync: Sync, progress: Callable[[], Progress], title: str = "embed: compare") -> list[Difference]:
    """The difference of each range between documents and table."""
    ranges = range(len(sync.documents))
    if sync.is_new or sync.is_small(LOCAL_ROWS):
        return [sync.difference(index) for index in ranges]
    handle = progress().handle

    def compare(index: int) -> tuple[int, Difference]:
        difference = sync.difference(index)
        handle.add.remote("compared", 1)
        return index, difference

    with progress().stage(title, len(ranges), "ranges", counter="compared"):
        return [difference for _, difference in sorted(over_cluster(compare, ranges), key=itemgetter(0))]


def rewrite(sync: Sync, ranges: Sequence[int], writer: Writer) -> None:
    """Append new versions of rows whose places or metadata changed. The caller deletes the old rows."""

    def write(index: int) -> list[Fragment]:
        return sync.table.write(sync.rewritten(index).sort_by("id"))

    waves = WaveCommitter(writer)
    for fragments in (map if sync.is_small(LOCAL_ROWS) else over_cluster)(write, ranges):
        waves.add(fragments)
    waves.commit()


def finish_on_cluster(table: VectorTable, index: str | None, index_rows: int, labels: dict[str, str]) -> dict[str, Any]:
    """Run `indexing.finish` on a node with these labels, as the driver may lack the CPUs and memory for an index."""
    import ray

    missing = missing_index(table, index, index_rows) if table.count() >= SPREAD_ROWS else None
    if table.count() >= SPREAD_ROWS:
        import lance_ray

        uri, options = lance_location(table.path)
        spread: dict[str, Any] = {"num_workers": int(connected_cluster().capacity().cpus), "storage_options": options}
        log.info("embed: compacting files and building indexes on all nodes")
        lance_ray.compact_files(uri, **spread)
        if missing:
            lance_ray.create_index(uri, **missing, **spread)

    def work() -> dict[str, Any]:
        with returning_freed_memory():
            return finish(table, index, index_rows, is_new=missing is not None)

    return dict(ray.get(ray.remote(num_cpus=1, label_selector=dict(labels))(work).remote()))
