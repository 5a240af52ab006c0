"""Every prepared record embedded once, through Ray Data.

    a task a record file ──► rows whose id the store lacks ──► actor pool of encoders ──► LanceSink (upsert by id)

A record file holds one range of ids, so what is missing is found file by file and nothing holds all ids. Writes are
upserts and become visible as they are made: a job that is killed and run again embeds the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset, Datasink

from pipeline.config import Config, ConfigError, Embedding
from pipeline.data.manifest import Manifest, parquet_file
from pipeline.embedding.lancedb_store import LanceStore
from pipeline.embedding.store import mark_embedded
from pipeline.runtime.files import matching
from pipeline.runtime.session import Board, cluster_capacity
from pipeline.storage.bucket import AnyPath, as_path

ENCODE_ROWS = 1024  # a call of an encoder: seconds of work
WRITE_ROWS = 8192  # rows a write commits together, and at most lost to a kill


class LanceSink(Datasink[None]):
    """Upserts blocks of encoded records."""

    def __init__(self, store: LanceStore) -> None:
        self.store = store

    @property
    def min_rows_per_write(self) -> int:
        return WRITE_ROWS

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        tables = [pa.table(block) for block in blocks]
        rows = pa.concat_tables(tables) if tables else None
        if rows is not None and len(rows):
            self.store.upsert(rows)


class Encode:
    """An actor that holds a model: adds `vector` to tables of `text`, and of `source` where sources have prompts.

    A text is led by its source's prompt, else by the model's own of that name.
    """

    def __init__(
        self, folder: str, settings: Embedding, threads: int, prompt: str, prompts: dict[str, str], board: Any
    ) -> None:
        import torch

        from pipeline.embedding.encode import TextEncoder

        torch.set_num_threads(threads)
        self.encoder = TextEncoder(as_path(folder), settings.batch_tokens, dimensions=settings.dimensions)
        self.prompt, self.prompts, self.board = prompt, prompts, board

    def __call__(self, rows: pa.Table) -> pa.Table:
        texts = rows["text"].to_pylist()
        if self.prompts:
            own, sources = self.encoder.model.head.prompt(self.prompt), rows["source"].to_pylist()
            texts = [self.prompts.get(source, own) + text for source, text in zip(sources, texts, strict=True)]
        vectors = self.encoder.encode(texts, "" if self.prompts else self.prompt)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        self.board.add.remote("embedded", len(rows))
        return rows.append_column("vector", column)


def encoded(
    dataset: Dataset, model: AnyPath, config: Config, board: Board, prompt: str, prompts: dict[str, str]
) -> Dataset:
    """The dataset's `text`, after its prompt, embedded by a pool of actors: one a GPU, else one a CPU.

    `prompt` names one of the model's own, which yields to the prompt of a text's source.
    """
    capacity = cluster_capacity()
    cpus, gpus = capacity.cpus, int(capacity.gpus)
    most = config.embedding.max_workers or gpus or int(cpus)
    now = max(1, min(most, int(capacity.gpus_there if gpus else capacity.cpus_there)))
    # a CPU is left for reading and writing; an encoder's own threads are set by hand
    share = max(0.01, int(100 * (cpus - 1) / most) / 100) if not gpus else min(1.0, cpus / (2 * gpus))
    threads = max(1, int(capacity.cpus_there) // now)
    return dataset.map_batches(
        Encode,
        fn_constructor_args=(str(model), config.embedding, threads, prompt, prompts, board.handle),
        batch_size=ENCODE_ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=now),
        num_cpus=min(share, 1.0),
        num_gpus=1 if gpus else None,
    )


def embed(config: Config, folder: AnyPath, manifest: Manifest, model: AnyPath, store: LanceStore, board: Board) -> int:
    """Bring the store up to date with the prepared records. Returns how many were embedded."""
    import ray.data

    store.create()
    field = embedded_field(config, manifest)
    files = matching(folder / "records", "*.parquet")
    prompts = {source.name: source.prompts[field] for source in manifest.sources if field in source.prompts}
    before, total = store.count(), sum(source.rows_kept for source in manifest.sources)

    def missing(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for index in batch["id"].tolist():
            yield from missing_rows(files[index], field, store)

    dataset = ray.data.range(len(files), override_num_blocks=len(files)).map_batches(
        missing, batch_size=1, num_cpus=0.5
    )
    with board.stage("embed", max(total - before, 0), "records", counter="embedded") as stage:
        encoded(dataset, model, config, board, prompt_name(field), prompts).write_datasink(
            LanceSink(store), concurrency=1, ray_remote_args={"num_cpus": 0.5}
        )
    store.compact()
    mark_embedded(config, manifest, store)
    return stage.done


def missing_rows(file: AnyPath, field: str, store: LanceStore) -> Iterator[pa.Table]:
    """A record file's rows that the store lacks: id, source, source_id, text, metadata."""
    columns = ["id", "source", "source_id", field, "metadata"]
    for batch in parquet_file(file).iter_batches(ENCODE_ROWS, columns=columns):
        ids = batch["id"].to_pylist()
        there = store.ids_between(ids[0], ids[-1])
        keep = pa.array(np.array([i not in there for i in ids], dtype=bool))
        rows = pa.Table.from_batches([batch]).rename_columns({field: "text"} if field != "text" else columns)
        yield rows.filter(keep)


def prompt_name(field: str) -> str:
    """Anchors are what one looks with, everything else what one finds."""
    return "query" if field == "anchor" else "document"


def embedded_field(config: Config, manifest: Manifest) -> str:
    """The record field that is embedded."""
    wanted, there = config.embedding.field, manifest.text_fields
    field = wanted if wanted != "auto" else ("positive" if "positive" in there else "text")
    if field not in there:
        raise ConfigError(f"embedding.field: found {wanted!r}; allowed here are {', '.join(there)}")
    return field
