"""Every prepared record in the store, once, over the cluster.

    a task a record file ──► rows the ledger lacks, tokenized, known vectors filled in ──► actor pool of encoders
        ──► Sink: cache, ledger, store, ledger           then, file by file, what has vanished is deleted

What a task does is in embedding/sync.py. A job that is killed and run again embeds the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy, Dataset, Datasink
from ray.data.datasource import WriteResult

from pipeline.embedding.columns import as_column
from pipeline.embedding.encode import open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.stores.budget import Allowance
from pipeline.embedding.stores.dead_letters import DeadLetters
from pipeline.embedding.sync import ROWS, Span, Sync
from pipeline.embedding.texts import UPDATE
from pipeline.runtime.cluster import Cluster, connected_cluster, on_own_node
from pipeline.runtime.memory import large_buffers_given_back
from pipeline.runtime.session import Board

# NOTE: never an encoder's share of CPUs, which has two digits, or Ray Data makes one operator of reading and encoding:
# a record file is one actor's from its first row to its last then, and no GPU computes while the next rows are
# tokenized (Ray 2.60).
READ_CPUS = 0.251
WRITE_ROWS = 8192  # rows that a write brings to the store together, and at most lost to a kill; more beyond so many
MOST_WRITES = 10_000  # writes: what a commit costs grows with their number
MOST_WRITE_ROWS = 131_072  # 0.3 GB of vectors of 384 numbers with their texts


def write_rows(records: int) -> int:
    """Rows of a write, where there may be so many records to write."""
    return min(max(WRITE_ROWS, records // MOST_WRITES), MOST_WRITE_ROWS)


class Sink(Datasink[Counter[str]]):
    """Writes blocks of encoded rows; what the store refuses is set aside. `counts` is there once all is written."""

    def __init__(self, sync: Sync, letters: DeadLetters, rows: int) -> None:
        self.sync, self.letters, self.rows = sync, letters, rows
        self.counts: Counter[str] = Counter()

    @property
    def min_rows_per_write(self) -> int:
        return self.rows

    def write(self, blocks: Iterable[Any], ctx: Any) -> Counter[str]:
        counts: Counter[str] = Counter()
        tables = [pa.table(block) for block in blocks]
        if any(len(table) for table in tables):
            rows = pa.concat_tables(table for table in tables if len(table))
            with large_buffers_given_back():
                self.letters.append(rows, self.sync.write(rows, counts))
        return counts

    def on_write_complete(self, write_result: WriteResult[Counter[str]]) -> None:
        for counts in write_result.write_returns:
            self.counts.update(counts)


class EncodeRows:
    """An actor that gives rows that are ready the vectors they lack."""

    def __init__(self, recipe: EncoderRecipe, threads: int, board: Any, sync: Sync) -> None:
        self.encoder, self.board, self.sync = open_encoder(recipe, threads), board, sync

    def __call__(self, rows: pa.Table) -> pa.Table:
        encoded = self.sync.encoded(rows, self.encoder)
        self.board.add.remote("embedded", len(rows))
        return encoded


class EncodeTexts:
    """An actor that adds `vector` to tables of `tokens`, which it takes out, or of `text`.

    A text is led by the prompt of its `source`, else by the model's own of that name. Tokens are encoded as they are.
    """

    def __init__(
        self, recipe: EncoderRecipe, threads: int, board: Any, prompt: str, prompts: dict[str, str] | None
    ) -> None:
        self.encoder, self.board, self.prompt, self.prompts = open_encoder(recipe, threads), board, prompt, prompts

    def __call__(self, rows: pa.Table) -> pa.Table:
        if "tokens" in rows.column_names:
            vectors, rows = self.encoder.encode_tokens(rows["tokens"]), rows.drop_columns(["tokens"])
        else:
            vectors = self._of_texts(rows)
        self.board.add.remote("embedded", len(rows))
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
    board: Board,
    prompt: str,
    prompts: dict[str, str] | None = None,
) -> Dataset:
    """The dataset's `tokens` embedded as they are, or its `text` after a prompt, as `vector`.

    The prompt is that of the text's `source`, else the model's own named `prompt`. `texts` says how many there are.
    """
    return in_pool(dataset, texts, recipe, board, EncodeTexts, prompt, prompts)


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


def in_pool(dataset: Dataset, texts: int, recipe: EncoderRecipe, board: Board, actor: type, *arguments: Any) -> Dataset:
    """The dataset, of so many texts, through a pool of encoding actors that are made with `arguments`."""
    pool = pool_of(texts, recipe)
    return dataset.map_batches(
        actor,
        fn_constructor_args=(recipe, pool.threads, board.handle, *arguments),
        batch_size=ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=pool.most, initial_size=pool.now),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        label_selector=recipe.labels or None,
    )


def embed(
    sync: Sync, recipe: EncoderRecipe, files: list[Span], records: int, letters: DeadLetters, board: Board, writers: int
) -> Counter[str]:
    """Bring the store up to date with the record files of so many records. Returns the counts that `sync` keeps."""
    fresh = sync.ledger.was_empty()
    plans: dict[int, Counter[str]] = {}  # by file: one whose rows were lost with a node is looked at again

    def due(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for index in batch["id"].tolist():
            counts: Counter[str] = Counter()
            for rows in sync.due(files[index], counts):
                yield sync.ready(rows, recipe.tokenizer())
            handle.post.remote({"file": index, "counts": counts})

    def remove(batch: dict[str, Any]) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        for index in batch["id"].tolist():
            sync.remove(files[index], counts)
        return {"deleted": [counts["deleted"]]}

    def receive(message: dict[str, Any]) -> None:
        if "counts" in message:
            plans[message["file"]] = message["counts"]

    handle, sink = board.handle, Sink(sync, letters, write_rows(records))
    with board.stage("embed", None, "records", counter="embedded", receive=receive):
        dataset = _a_task_each(files).map_batches(due, batch_size=1, num_cpus=READ_CPUS)
        in_pool(dataset, records, recipe, board, EncodeRows, sync).write_datasink(
            sink, concurrency=writers, ray_remote_args={"num_cpus": 0.5}
        )
    counts = sum(plans.values(), Counter[str]()) + sink.counts
    if not fresh:
        removed = _a_task_each(files).map_batches(remove, batch_size=1, num_cpus=0.5)
        counts["deleted"] = int(removed.sum("deleted") or 0)
    return counts


def tidy(sync: Sync, cache_bytes: float, labels: Mapping[str, str]) -> dict[str, Any]:
    """`Sync.tidy` on a node with these labels: an index takes CPUs and memory, of which a driver's may have none."""
    import ray

    def tidy() -> dict[str, Any]:
        with large_buffers_given_back():
            return sync.tidy(cache_bytes)

    return dict(ray.get(ray.remote(num_cpus=1, label_selector=dict(labels))(tidy).remote()))


def plan(sync: Sync, recipe: EncoderRecipe, files: list[Span], board: Board) -> Counter[str]:
    """What `embed` would do: the counts, and the tokens that are to be encoded."""
    handle = board.handle
    names = ("new", "changed", "metadata", "untouched", "known", "tokens", "deleted")

    def count(batch: dict[str, Any]) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        for index in batch["id"].tolist():
            for rows in sync.due(files[index], counts):
                tokens = sync.ready(rows, recipe.tokenizer())["tokens"]
                counts["known"] += tokens.null_count - pc.sum(pc.equal(rows["action"], UPDATE)).as_py()
                counts["tokens"] += len(pc.list_flatten(tokens.combine_chunks().drop_null(), recursive=True))
            counts["deleted"] += len(sync.vanished(files[index]))
            handle.add.remote("planned", 1)
        return {name: [counts[name]] for name in names}

    with board.stage("embed: plan", len(files), "files", counter="planned"):
        rows = _a_task_each(files).map_batches(count, batch_size=1, num_cpus=0.5).take_all()
    return Counter({name: sum(row[name] for row in rows) for name in names})


def _a_task_each(files: list[Span]) -> Dataset:
    import ray.data

    return ray.data.range(len(files), override_num_blocks=len(files))


class SharedAccount:
    """An `Allowance` in an actor, which all processes of a job ask."""

    def __init__(self, requests_per_second: float, max_concurrency: int) -> None:
        import ray

        actor = on_own_node(ray.remote(num_cpus=0)(Allowance))
        self.actor = actor.remote(requests_per_second, max_concurrency)

    def ask(self) -> float:
        import ray

        return float(ray.get(self.actor.ask.remote()))

    def give_back(self) -> None:
        self.actor.give_back.remote()

    def hold(self, seconds: float) -> None:
        self.actor.hold.remote(seconds)
