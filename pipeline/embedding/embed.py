"""The vector table brought up to date over the cluster.

    a task a range ──► documents that are due ──► actor pool of encoders ──► tasks write fragments
                                                          driver: a commit for each wave of them, as they come in

What a task does is in embedding/sync.py. A job that is killed loses the wave under way, and the next one embeds what
is missing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy, Dataset

from pipeline.embedding.chunks import expanded
from pipeline.embedding.columns import as_column, as_matrix, one_array
from pipeline.embedding.encode import open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.stores.dead_letters import DeadLetters
from pipeline.embedding.stores.store import Refused
from pipeline.embedding.sync import DIFFERENCE, Difference, Sync, count_tokens, with_vectors
from pipeline.embedding.table import VectorTable, Writer
from pipeline.runtime.cluster import Cluster, connected_cluster
from pipeline.runtime.console import log
from pipeline.runtime.memory import large_buffers_given_back
from pipeline.runtime.session import Progress
from pipeline.storage.files import lance_location

ROWS = 1024  # texts encoded together: seconds of work
# NOTE: never an encoder's share of CPUs, which has two digits, or Ray Data makes one operator of reading and encoding:
# a record file is one actor's from its first row to its last then, and no GPU computes while the next rows are
# tokenized (Ray 2.60).
READ_CPUS = 0.251
MOST_WRITE_BYTES = 256 << 20  # of texts in a fragment, which its task holds
WRITE_ROWS, MOST_WRITE_ROWS = 8_192, 131_072  # of a fragment: about a hundredth of what there is to write
SHORTEST_WAVE_S = 1.0  # between two commits; more if that is less than 50 commits take, or 1% of the time so far
SPREAD_ROWS = 10_000_000  # from here on the whole cluster joins files and builds the index of vectors
LOCAL_ROWS = 8_000_000  # up to so many documents, ids are compared in the driver, without tasks


def write_rows(documents: int, mean_bytes: float = 0.0) -> int:
    """Rows of a fragment, of so many documents of so many bytes that may have to be written."""
    rows = min(max(WRITE_ROWS, documents // 100), MOST_WRITE_ROWS)
    return max(1, min(rows, int(MOST_WRITE_BYTES / max(mean_bytes, 1))))


class EncodeDocuments:
    """An actor that gives documents with `tokens` their `vector`, or, where they have chunks, their `vectors`."""

    def __init__(self, recipe: EncoderRecipe, threads: int, progress: Any) -> None:
        self.encoder, self.progress = open_encoder(recipe, threads), progress

    def __call__(self, documents: pa.Table) -> pa.Table:
        began, tokens = time.perf_counter(), count_tokens(documents["tokens"])
        rows = with_vectors(documents, self.encoder)
        self.progress.add.remote("embedded", len(rows))
        self.progress.post.remote({"seconds": {"encode": time.perf_counter() - began}, "tokens": tokens})
        return rows


class EncodeTexts:
    """An actor that adds `vector` to tables of `tokens`, which it takes out, or of `text`.

    A text is led by the prompt of its `source`, else by the model's own of that name. Tokens are encoded as they are.
    """

    def __init__(
        self, recipe: EncoderRecipe, threads: int, progress: Any, prompt: str, prompts: dict[str, str] | None
    ) -> None:
        self.encoder, self.progress, self.prompt, self.prompts = (
            open_encoder(recipe, threads),
            progress,
            prompt,
            prompts,
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        if "tokens" in rows.column_names:
            vectors, rows = self.encoder.encode_tokens(rows["tokens"]), rows.drop_columns(["tokens"])
        else:
            vectors = self._of_texts(rows)
        self.progress.add.remote("embedded", len(rows))
        return rows.append_column("vector", as_column(vectors))

    def _of_texts(self, rows: pa.Table) -> np.ndarray:
        texts = rows["text"].to_pylist()
        if not self.prompts:
            return self.encoder.encode(texts, self.prompt)
        own, sources = self.encoder.card.head.prompt(self.prompt), rows["source"].to_pylist()
        return self.encoder.encode(
            [self.prompts.get(source, own) + text for source, text in zip(sources, texts, strict=True)]
        )


def encoded(
    dataset: Dataset,
    texts: int,
    recipe: EncoderRecipe,
    progress: Progress,
    prompt: str,
    prompts: dict[str, str] | None = None,
) -> Dataset:
    """The dataset's `tokens` embedded as they are, or its `text` after a prompt, as `vector`.

    The prompt is that of the text's `source`, else the model's own named `prompt`. `texts` says how many there are.
    """
    return in_pool(dataset, texts, recipe, progress, EncodeTexts, prompt, prompts)


@dataclass(frozen=True)
class Pool:
    """Encoding actors: one a GPU, else one a CPU, and no more than there are batches of texts.

    At most, at once, each one's share of CPUs, and its threads.
    """

    most: int
    now: int
    cpus: float
    gpus: int
    threads: int

    @classmethod
    def of(cls, texts: int, max_workers: int | None, cluster: Cluster, *, on_gpus: bool = True) -> Pool:
        """For so many texts, on that part of a cluster where encoders go; `on_gpus` where it has some."""
        capacity = cluster.capacity()
        cpus, gpus = capacity.cpus, int(capacity.gpus) if on_gpus else 0
        most = min(max_workers or gpus or int(cpus), max(1, math.ceil(texts / ROWS)))
        now = max(1, min(most, int(capacity.gpus_there if gpus else capacity.cpus_there)))
        # a CPU is left for reading and writing; an encoder's own threads are set by hand
        share = max(0.01, int(100 * (cpus - 1) / most) / 100) if not gpus else min(1.0, cpus / (2 * gpus))
        node = min((int(node.cpus) for node in cluster.there if node.cpus >= 1), default=1)
        return cls(most, now, min(share, 1.0), min(gpus, 1), max(1, min(int(capacity.cpus_there) // now, node)))


def pool_of(texts: int, recipe: EncoderRecipe) -> Pool:
    """The pool on the connected cluster; a token table leaves GPUs alone."""
    cluster = connected_cluster().with_labels(recipe.labels)
    return Pool.of(texts, recipe.settings.max_workers, cluster, on_gpus=not recipe.is_table)


def in_pool(
    dataset: Dataset, texts: int, recipe: EncoderRecipe, progress: Progress, actor: type, *arguments: Any
) -> Dataset:
    """The dataset, of so many texts, through a pool of encoding actors that are made with `arguments`."""
    pool = pool_of(texts, recipe)
    return dataset.map_batches(
        actor,
        fn_constructor_args=(recipe, pool.threads, progress.handle, *arguments),
        batch_size=ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=pool.most, initial_size=pool.now),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        label_selector=recipe.labels or None,
    )


class Waves:
    """Collects fragments and commits them in waves.

    A kill loses the wave under way: at most 1 s or 1% of the time so far, and more where commits are slow.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer, self.fragments = writer, list[tuple[str, str]]()
        self.began = self.last = time.monotonic()
        self.commits, self.longest_s, self.commit_s = 0, 0.0, 0.0

    def add(self, first_id: str, fragment: str) -> None:
        self.fragments.append((first_id, fragment))
        now = time.monotonic()
        if now - self.last > max(SHORTEST_WAVE_S, 50 * self.longest_s, 0.01 * (now - self.began)):
            self.commit()

    def commit(self) -> None:
        """Append what there is, by rising id, so that the zone map tells fragments apart."""
        if not self.fragments:
            return
        began = time.monotonic()
        self.writer.append([fragment for _, fragment in sorted(self.fragments)])
        self.fragments, self.last = [], time.monotonic()
        self.commits, self.commit_s = self.commits + 1, self.commit_s + self.last - began
        self.longest_s = max(self.longest_s, self.last - began)


@dataclass(frozen=True)
class Spent:
    """What an embedding did: rows written and refused, tokens, commits, and seconds of all processes by what for."""

    written: int
    refused: int
    tokens: int
    commits: int
    seconds: dict[str, float]


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
                handle.post.remote({"seconds": {"read": time.perf_counter() - began}})
                yield rows
                began = time.perf_counter()

    def write(rows: pa.Table) -> pa.Table:
        began = time.perf_counter()
        with large_buffers_given_back():
            fragments, refused = write_fragments(table, rows, letters)
        handle.post.remote({"seconds": {"write": time.perf_counter() - began}})
        found = [*fragments, ("", None, -refused)]
        return pa.table([pa.array(column) for column in zip(*found, strict=True)], schema=FRAGMENTS)

    seconds, tokens = dict[str, float](), Counter[str]()

    def receive(message: dict[str, Any]) -> None:
        for name, spent in message.get("seconds", {}).items():
            seconds[name] = seconds.get(name, 0.0) + spent
        tokens["tokens"] += message.get("tokens", 0)

    written = refused = 0
    waves = Waves(writer)
    with progress.stage("embed", documents, "documents", counter="embedded", receive=receive):
        dataset = _a_task_each(len(ranges)).map_batches(due, batch_size=1, num_cpus=READ_CPUS)
        dataset = in_pool(dataset, documents, recipe, progress, EncodeDocuments)
        dataset = dataset.map_batches(
            write, batch_size=write_rows(documents, sync.documents.mean_bytes), batch_format="pyarrow", num_cpus=0.5
        )
        for found in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in found.to_pylist():
                if row["fragment"] is None:
                    refused -= row["rows"]
                else:
                    written += row["rows"]
                    waves.add(row["first_id"], row["fragment"])
        waves.commit()
    return Spent(written, refused, tokens["tokens"], waves.commits, {**seconds, "commit": waves.commit_s})


FRAGMENTS = pa.schema([("first_id", pa.string()), ("fragment", pa.string()), ("rows", pa.int64())])


def write_fragments(table: VectorTable, rows: pa.Table, letters: DeadLetters) -> tuple[list[tuple[str, str, int]], int]:
    """Write documents with their vectors as fragments, and set those aside whose vectors cannot be compared.

    Returns the first id, the fragment and the rows of each, and how many texts were set aside.
    """
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
    if sync.empty or sum(sync.documents.rows) <= LOCAL_ROWS:
        return [sync.difference(index) for index in ranges]
    handle = progress().handle

    def compare(batch: dict[str, Any]) -> pa.Table:
        found = [(index, sync.difference(index)) for index in batch["id"].tolist()]
        handle.add.remote("compared", len(found))
        return pa.Table.from_pylist([{"range": index, **each.to_row()} for index, each in found], DIFFERENCE)

    with progress().stage(title, len(ranges), "ranges", counter="compared"):
        rows = _a_task_each(len(ranges)).map_batches(compare, batch_size=1, num_cpus=0.5).take_all()
    return [Difference.from_row(row) for row in sorted(rows, key=lambda row: row["range"])]


def rewrite(sync: Sync, ranges: Sequence[int], writer: Writer) -> None:
    """Append rows in place of those whose documents have other places or metadata; the old ones are still there."""
    waves, table = Waves(writer), sync.table

    def write(rows: pa.Table) -> pa.Table:
        found = table.write(table.typed(rows.sort_by("id")))
        return pa.table([pa.array(column) for column in zip(*found, strict=True)], schema=FRAGMENTS)

    def rewritten(batch: dict[str, Any]) -> Iterator[pa.Table]:
        yield from (sync.rewritten(ranges[index]) for index in batch["id"].tolist())

    if not ranges:
        return
    if sum(sync.documents.rows) <= LOCAL_ROWS:
        found = (write(rows) for rows in _grouped(map(sync.rewritten, ranges)))
    else:
        dataset = _a_task_each(len(ranges)).map_batches(rewritten, batch_size=1, num_cpus=READ_CPUS)
        dataset = dataset.map_batches(write, batch_size=WRITE_ROWS, batch_format="pyarrow", num_cpus=0.5)
        found = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for fragments in found:
        for row in fragments.to_pylist():
            waves.add(row["first_id"], row["fragment"])
    waves.commit()


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables joined to some of WRITE_ROWS rows or more, and the rest."""
    group: list[pa.Table] = []
    for table in tables:
        group += [table] if len(table) else []
        if sum(map(len, group)) >= WRITE_ROWS:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def finish_somewhere(table: VectorTable, index: str | None, index_rows: int, labels: dict[str, str]) -> dict[str, Any]:
    """`indexing.finish` on a node with these labels: an index takes CPUs and memory, which a driver's may lack."""
    import ray

    from pipeline.embedding.indexing import finish, missing_index

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
        with large_buffers_given_back():
            return finish(table, index, index_rows, is_new=wanted is not None)

    return dict(ray.get(ray.remote(num_cpus=1, label_selector=dict(labels))(work).remote()))


def _a_task_each(ranges: int) -> Dataset:
    import ray.data

    return ray.data.range(ranges, override_num_blocks=max(ranges, 1))
