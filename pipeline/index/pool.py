"""Distributes work over the cluster: a pool of encoding actors, or one task per item.

dataset = encoded(dataset, 131_698, recipe, progress, "document")       # adds `vector` to rows of `text` or `tokens`
for result in over_cluster(work, items): ...                            # results of work(item), in completion order
"""

from __future__ import annotations

import math
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from pipeline.core.cluster import Cluster, connected_cluster
from pipeline.core.object_store import BucketError
from pipeline.core.outcome import JobError
from pipeline.core.session import Progress
from pipeline.index.encoder import EncoderRecipe, open_encoder, tokenize
from pipeline.index.sync import count_tokens, with_vectors

ROWS = 1024  # texts per batch: seconds of work
REPORT_S = 0.5  # between two reports of an encoder's progress


class EncodeTexts:
    """An actor that adds `vector` to tables of `text` or `tokens`, and drops `tokens`.

    Texts get the prompt of their `source` in `prompts`, else the model's prompt named `prompt`. Tokens are encoded as
    they are; the windows of tables with `spans` are encoded to `vectors` (chunks.py).
    """

    def __init__(
        self, recipe: EncoderRecipe, threads: int, progress: Any, prompt: str, prompts: dict[str, str] | None
    ) -> None:
        self.encoder, self.progress, self.prompts = open_encoder(recipe, threads), progress, prompts or {}
        self.prompt = self.encoder.spec.head.prompt(prompt)

    def __call__(self, rows: pa.Table) -> pa.Table:
        began = time.perf_counter()
        if "tokens" not in rows.column_names:
            sources = rows["source"].to_pylist() if self.prompts else [""] * len(rows)
            prefixes = [self.prompts.get(source, self.prompt) for source in sources]
            texts = [prefix + text for prefix, text in zip(prefixes, rows["text"].to_pylist(), strict=True)]
            rows = rows.append_column("tokens", tokenize(self.encoder.tokenizer, texts))
        count, reported, last = len(rows), 0, began

        def report(share: float) -> None:
            """At most twice a second, because batches may be small."""
            nonlocal reported, last
            if share < 1 and time.perf_counter() - last < REPORT_S:
                return
            self.progress.add.remote("embedded", int(count * share) - reported)
            reported, last = int(count * share), time.perf_counter()

        tokens, rows = count_tokens(rows["tokens"]), with_vectors(rows, self.encoder, report)
        if reported < count:
            report(1.0)
        self.progress.post.remote({"spent": {"encode": time.perf_counter() - began, "tokens": tokens}})
        return rows


@dataclass(frozen=True)
class Pool:
    """Size of a pool of encoding actors: one per GPU, else one per CPU, and at most one per batch of texts."""

    most: int
    """Maximum number of actors, if the cluster scales up."""
    now: int
    """Number of actors that the nodes can run now."""
    cpus: float
    """CPUs reserved per actor."""
    gpus: int
    threads: int
    """Threads per actor."""

    @classmethod
    def of(cls, texts: int, max_workers: int | None, cluster: Cluster, *, on_gpus: bool = True) -> Pool:
        """A pool for `texts` texts on the nodes of `cluster`; `on_gpus` uses their GPUs, if any."""
        capacity = cluster.capacity()
        cpus, gpus = capacity.cpus, int(capacity.gpus) if on_gpus else 0
        most = min(max_workers or gpus or int(cpus), max(1, math.ceil(texts / ROWS)))
        now = max(1, min(most, int(capacity.gpus_now if gpus else capacity.cpus_now)))
        # leaves one CPU for reading and writing; `threads` is set separately
        share = max(0.01, int(100 * (cpus - 1) / most) / 100) if not gpus else min(1.0, cpus / (2 * gpus))
        node = min((int(node.cpus) for node in cluster.alive if node.cpus >= 1), default=1)
        return cls(most, now, min(share, 1.0), min(gpus, 1), max(1, min(int(capacity.cpus_now) // now, node)))


def pool_of(texts: int, recipe: EncoderRecipe) -> Pool:
    """The pool for the connected cluster; token tables do not use GPUs."""
    cluster = connected_cluster().with_labels(recipe.labels)
    return Pool.of(texts, recipe.settings.max_workers, cluster, on_gpus=not recipe.is_table)


def encoded(
    dataset: Dataset,
    texts: int,
    recipe: EncoderRecipe,
    progress: Progress,
    prompt: str = "",
    prompts: dict[str, str] | None = None,
) -> Dataset:
    """Encode a dataset of `texts` rows with a pool of `EncodeTexts`, which explains `prompt` and `prompts`."""
    pool = pool_of(texts, recipe)
    return dataset.map_batches(
        EncodeTexts,
        fn_constructor_args=(recipe, pool.threads, progress.handle, prompt, prompts),
        batch_size=ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=pool.most, initial_size=pool.now),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        label_selector=recipe.labels or None,
    )


def starting(counts: dict[str, int]) -> str:
    """What a stage of `encoded` shows until the first texts are encoded, for up to a minute."""
    return "" if counts.get("embedded") else "starting the encoders"


def one_task_per_item(items: int) -> Dataset:
    """A dataset with `id` 0, 1, …, one row per task."""
    import ray.data

    return ray.data.range(items, override_num_blocks=max(items, 1))


def over_cluster(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield the result of `work` for each item, one task per item, in completion order. Raises JobError."""

    def run(batch: dict[str, Any]) -> pa.Table:
        result = error = None
        try:
            (result,) = (work(items[i]) for i in batch["id"].tolist())
        except Exception as raised:  # returned as data, because Ray's exception would lose the cause
            traceback.print_exc()  # to the log
            explains_itself = isinstance(raised, JobError | OSError | BucketError)
            error = str(raised) if explains_itself else f"{type(raised).__name__}: {raised}"
        return pa.table(
            {"result": pa.array([pickle.dumps(result)], pa.binary()), "error": pa.array([error], pa.string())}
        )

    if items:
        for row in one_task_per_item(len(items)).map_batches(run, batch_size=1, num_cpus=0.5).iter_rows():
            if row["error"] is not None:
                raise JobError(row["error"])
            yield pickle.loads(row["result"])
