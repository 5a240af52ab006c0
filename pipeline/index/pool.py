"""Work spread over the cluster: a pool of encoding actors, or a task for each item.

dataset = encoded(dataset, 131_698, recipe, progress, "document")       # adds `vector` to rows of `text` or `tokens`
for answer in over_cluster(work, items): ...                         # what work(item) returns, as it comes in
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

ROWS = 1024  # texts encoded together: seconds of work


class EncodeTexts:
    """An actor that gives tables of `text`, or of `tokens`, which it takes out, their `vector`.

    A text is led by the prompt of its `source`, else by the model's own of that name. Tokens are encoded as they are,
    and windows with `spans` to `vectors`, as chunks.py has them.
    """

    def __init__(
        self, recipe: EncoderRecipe, threads: int, progress: Any, prompt: str, prompts: dict[str, str] | None
    ) -> None:
        self.encoder, self.progress, self.prompts = open_encoder(recipe, threads), progress, prompts or {}
        self.prompt = self.encoder.card.head.prompt(prompt)

    def __call__(self, rows: pa.Table) -> pa.Table:
        began = time.perf_counter()
        if "tokens" not in rows.column_names:
            sources = rows["source"].to_pylist() if self.prompts else [""] * len(rows)
            leads = [self.prompts.get(source, self.prompt) for source in sources]
            texts = [lead + text for lead, text in zip(leads, rows["text"].to_pylist(), strict=True)]
            rows = rows.append_column("tokens", tokenize(self.encoder.tokenizer, texts))
        tokens, rows = count_tokens(rows["tokens"]), with_vectors(rows, self.encoder)
        self.progress.add.remote("embedded", len(rows))
        self.progress.post.remote({"spent": {"encode": time.perf_counter() - began, "tokens": tokens}})
        return rows


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
        now = max(1, min(most, int(capacity.gpus_now if gpus else capacity.cpus_now)))
        # a CPU is left for reading and writing; an encoder's own threads are set by hand
        share = max(0.01, int(100 * (cpus - 1) / most) / 100) if not gpus else min(1.0, cpus / (2 * gpus))
        node = min((int(node.cpus) for node in cluster.alive if node.cpus >= 1), default=1)
        return cls(most, now, min(share, 1.0), min(gpus, 1), max(1, min(int(capacity.cpus_now) // now, node)))


def pool_of(texts: int, recipe: EncoderRecipe) -> Pool:
    """The pool on the connected cluster; a token table leaves GPUs alone."""
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
    """The dataset, of so many texts, through a pool of `EncodeTexts`.

    The prompt is that of the text's `source` in `prompts`, else the model's own named `prompt`.
    """
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


def a_task_each(items: int) -> Dataset:
    """A dataset of `id` from 0 on, whose rows go to a task each."""
    import ray.data

    return ray.data.range(items, override_num_blocks=max(items, 1))


def over_cluster(work: Callable[[Any], Any], items: Sequence[Any], num_cpus: float = 0.5) -> Iterator[Any]:
    """What `work` returns for each item, in a task each, in the order in which they end. Raises JobError."""

    def run(batch: dict[str, Any]) -> pa.Table:
        found = error = None
        try:
            (found,) = (work(items[i]) for i in batch["id"].tolist())
        except Exception as raised:  # returned as data: Ray would raise an error that has lost the cause
            traceback.print_exc()  # to the log
            says_all = isinstance(raised, JobError | OSError | BucketError)
            error = str(raised) if says_all else f"{type(raised).__name__}: {raised}"
        return pa.table(
            {"found": pa.array([pickle.dumps(found)], pa.binary()), "error": pa.array([error], pa.string())}
        )

    if items:
        for row in a_task_each(len(items)).map_batches(run, batch_size=1, num_cpus=num_cpus).iter_rows():
            if row["error"] is not None:
                raise JobError(row["error"])
            yield pickle.loads(row["found"])
