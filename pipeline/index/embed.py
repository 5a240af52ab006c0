"""The vector table brought up to date over the cluster.

    a task a range ──► documents that are due ──► actor pool of encoders ──► tasks write fragments
                                                          driver: a commit for each wave of them, as they come in

What a task does is in sync.py. A job that is killed loses the wave under way, and the next one embeds what is missing.
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
from pipeline.index.chunks import expanded
from pipeline.index.dead_letters import DeadLetters, Refused
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.indexing import finish, missing_index
from pipeline.index.pool import a_task_each, encoded, over_cluster
from pipeline.index.sync import Difference, Sync
from pipeline.index.table import Fragment, VectorTable
from pipeline.index.vectors import as_matrix, one_array
from pipeline.index.writer import Writer

# NOTE: never an encoder's share of CPUs, which has two digits, or Ray Data makes one operator of reading and encoding:
# a record file is one actor's from its first row to its last then, and no GPU computes while the next rows are
# tokenized (Ray 2.60).
READ_CPUS = 0.251
MOST_WRITE_BYTES = 256 << 20  # of texts in a fragment, which its task holds
WRITE_ROWS, MOST_WRITE_ROWS = 8_192, 131_072  # of a fragment: about a hundredth of what there is to write
PARTS = ("read", "encode", "write", "commit")  # of an embedding's time
SHORTEST_WAVE_S = 1.0  # between two commits; more if that is less than 50 commits take, or 1% of the time so far
SPREAD_ROWS = 10_000_000  # from here on the whole cluster joins files and builds the index of vectors
LOCAL_ROWS = 8_000_000  # up to so many documents, ids are compared in the driver, without tasks


def write_rows(documents: int, mean_bytes: float = 0.0) -> int:
    """Rows of a fragment, of so many documents of so many bytes that may have to be written."""
    rows = min(max(WRITE_ROWS, documents // 100), MOST_WRITE_ROWS)
    return max(1, min(rows, int(MOST_WRITE_BYTES / max(mean_bytes, 1))))


class WaveCommitter:
    """Collects fragments and commits them in waves.

    A kill loses the wave under way: at most 1 s or 1% of the time so far, and more where commits are slow.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer, self.fragments = writer, list[Fragment]()
        self.began = self.last = time.monotonic()
        self.commits, self.longest_s, self.commit_s = 0, 0.0, 0.0

    def add(self, fragments: Sequence[Fragment]) -> None:
        self.fragments += fragments
        now = time.monotonic()
        if now - self.last > max(SHORTEST_WAVE_S, 50 * self.longest_s, 0.01 * (now - self.began)):
            self.commit()

    def commit(self) -> None:
        """Append what there is, by rising id, so that the zone map tells fragments apart."""
        if not self.fragments:
            return
        began = time.monotonic()
        self.writer.append(sorted(self.fragments))
        self.fragments, self.last = [], time.monotonic()
        self.commits, self.commit_s = self.commits + 1, self.commit_s + self.last - began
        self.longest_s = max(self.longest_s, self.last - began)


@dataclass(frozen=True)
class Spent:
    """What an embedding did: rows written, texts refused, tokens, commits, and seconds of all processes by what for."""

    written: int = 0
    refused: int = 0
    tokens: int = 0
    commits: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def rates(self, seconds: float) -> str:
        """How fast a job of so many seconds was, and what the time of all processes went to."""
        parts = ", ".join(f"{name} {self.seconds.get(name, 0.0):.1f} s" for name in PARTS)
        return (
            f"{self.written:,} vectors in {self.commits:,} commits, {seconds:.1f} s, {self.written / seconds:,.0f} a "
            f"second, {self.tokens / seconds:,.0f} tokens a second; of all processes {parts}"
        )


def embed(
    sync: Sync,
    recipe: EncoderRecipe,
    ranges: Sequence[int],
    documents: int,
    letters: DeadLetters,
    progress: Progress,
    writer: Writer,
) -> Spent:
    """Encode the documents that are due in these ranges, so many in all, and append them to the table, wave by wave."""
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
            found = write_fragments(table, rows, letters)
        handle.post.remote({"spent": {"write": time.perf_counter() - began}})
        return pa.table({"found": pa.array([pickle.dumps(found)], pa.binary())})

    spent = defaultdict[str, float](float)

    def receive(message: dict[str, Any]) -> None:
        for name, amount in message.get("spent", {}).items():
            spent[name] += amount

    written = refused = 0
    waves = WaveCommitter(writer)
    with progress.stage("embed", documents, "documents", counter="embedded", receive=receive):
        dataset = a_task_each(len(ranges)).map_batches(due, batch_size=1, num_cpus=READ_CPUS)
        dataset = encoded(dataset, documents, recipe, progress)
        dataset = dataset.map_batches(
            write, batch_size=write_rows(documents, sync.documents.mean_bytes), batch_format="pyarrow", num_cpus=0.5
        )
        for found in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for fragments, bad in map(pickle.loads, found["found"].to_pylist()):
                waves.add(fragments)
                written, refused = written + sum(each.rows for each in fragments), refused + bad
        waves.commit()
    return Spent(written, refused, int(spent["tokens"]), waves.commits, {**spent, "commit": waves.commit_s})


def write_fragments(table: VectorTable, rows: pa.Table, letters: DeadLetters) -> tuple[list[Fragment], int]:
    """Write documents with their vectors, and set aside those whose vectors cannot be compared, which it counts."""
    good, bad, reasons = _without_direction(expanded(rows) if "vectors" in rows.column_names else rows)
    letters.append(bad, reasons)
    good = table.stored(good).sort_by("id")
    return table.write(good), len(set(bad["parent_id" if table.chunks else "id"].to_pylist()))


def _without_direction(rows: pa.Table) -> tuple[pa.Table, pa.Table, list[Refused]]:
    """Rows whose vectors can be compared, the others, and what is wrong with those; of a text all chunks or none."""
    lengths = np.linalg.norm(as_matrix(rows["vector"]).astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    bad = rows.filter(pa.array(~good))
    reasons = ["its vector is zero" if length == 0 else "its vector holds NaN or infinity" for length in lengths[~good]]
    refused = [Refused(i, reason, 0) for i, reason in zip(bad["id"].to_pylist(), reasons, strict=True)]
    if "parent_id" in rows.column_names and len(bad):
        good &= pc.invert(pc.is_in(rows["parent_id"], one_array(bad["parent_id"]))).to_numpy()
    return rows.filter(pa.array(good)), bad, refused


def differences(sync: Sync, progress: Callable[[], Progress], title: str = "embed: compare") -> list[Difference]:
    """How each range of the table differs from the documents."""
    ranges = range(len(sync.documents))
    if sync.is_new or sync.is_small(LOCAL_ROWS):
        return [sync.difference(index) for index in ranges]
    handle = progress().handle

    def compare(index: int) -> tuple[int, Difference]:
        found = sync.difference(index)
        handle.add.remote("compared", 1)
        return index, found

    with progress().stage(title, len(ranges), "ranges", counter="compared"):
        return [found for _, found in sorted(over_cluster(compare, ranges), key=itemgetter(0))]


def rewrite(sync: Sync, ranges: Sequence[int], writer: Writer) -> None:
    """Append rows in place of those whose documents have other places or metadata; the old ones are still there."""

    def write(index: int) -> list[Fragment]:
        return sync.table.write(sync.rewritten(index).sort_by("id"))

    waves = WaveCommitter(writer)
    for fragments in (map if sync.is_small(LOCAL_ROWS) else over_cluster)(write, ranges):
        waves.add(fragments)
    waves.commit()


def finish_on_cluster(table: VectorTable, index: str | None, index_rows: int, labels: dict[str, str]) -> dict[str, Any]:
    """`indexing.finish` on a node with these labels: an index takes CPUs and memory, which a driver's may lack."""
    import ray

    wanted = missing_index(table, index, index_rows) if table.count() >= SPREAD_ROWS else None
    if table.count() >= SPREAD_ROWS:
        import lance_ray

        uri, options = lance_location(table.path)
        spread: dict[str, Any] = {"num_workers": int(connected_cluster().capacity().cpus), "storage_options": options}
        log.info("embed: compacting files and building indexes on all nodes")
        lance_ray.compact_files(uri, **spread)
        if wanted:
            lance_ray.create_index(uri, **wanted, **spread)

    def work() -> dict[str, Any]:
        with returning_freed_memory():
            return finish(table, index, index_rows, is_new=wanted is not None)

    return dict(ray.get(ray.remote(num_cpus=1, label_selector=dict(labels))(work).remote()))
