"""A corpus as prepared records, a model, and what a store in step with them must hold: for tests of embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import Config, load
from pipeline.data.manifest import RECORD_SCHEMA, Manifest, SourceCount
from pipeline.data.vocabulary import train_tokenizer
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.store import open_store, open_sync, recipe_of
from pipeline.embedding.stores.store import Store
from pipeline.embedding.sync import Span, Sync, spans
from pipeline.model.card import Head
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import save_model
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.text.identity import content_id, shard_of
from tests.conftest import make_pairs

FILES, MAX_LENGTH = 3, 24
Corpus = dict[str, tuple[str, dict[str, Any]]]
"""source_id → text and metadata."""


def corpus_of(count: int, seed: int = 0) -> Corpus:
    return {str(row["id"]): (str(row["positive"]), {"line": row["line"]}) for row in make_pairs(count, seed)}


def save_random_model(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    texts = [text for text, _ in corpus_of(200).values()]
    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=600, lowercase=False)
    torch.manual_seed(seed)
    encoder = Encoder(EncoderShape(vocab_size=600, d_model=32, num_layers=1, num_heads=2, d_ff=32))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head = Head(dimensions=(16,), prompts=(("query", "find: "), ("document", "text: ")))
    save_model(folder, EmbeddingModel(encoder, head), tokenizer.to_str(), MAX_LENGTH)
    return folder


@dataclass
class World:
    """Prepared records under `folder`, kept in step by `sync`."""

    folder: Path
    corpus: Corpus
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"
        if not self.model.is_dir():
            save_random_model(self.model)

    def write_records(self) -> None:
        """The record files, as prepare leaves them: each a range of ids, sorted."""
        shards: list[list[dict[str, Any]]] = [[] for _ in range(FILES)]
        for source_id, (text, metadata) in self.corpus.items():
            row_id = content_id([text])
            values = {"id": row_id, "source": "s", "source_id": source_id, "text": text}
            shards[shard_of(row_id, FILES)].append(values | {"metadata": json.dumps(metadata)})
        (self.folder / "records").mkdir(exist_ok=True)
        for index, rows in enumerate(shards):
            table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["id"])), schema=RECORD_SCHEMA)
            pq.write_table(table, self.folder / "records" / f"{index:05d}.parquet")

    @property
    def config(self) -> Config:
        (self.folder / "c.yaml").write_text("storage: {run: r}\n")
        return load(self.folder / "c.yaml", [f"storage.root={self.folder}", *self.overrides], environ={})

    @property
    def manifest(self) -> Manifest:
        count = SourceCount("s", len(self.corpus), len(self.corpus), {})
        return Manifest("f", [count], {}, [], {"text": {"mean": 20.0}}, [], {})

    @property
    def recipe(self) -> EncoderRecipe:
        return recipe_of(self.config, self.model)

    @property
    def store(self) -> Store:
        return open_store(self.config, self.recipe)

    @property
    def files(self) -> list[Span]:
        return spans(sorted((self.folder / "records").glob("*.parquet")))

    def sync(self) -> Sync:
        self.write_records()
        return open_sync(self.config, self.manifest, self.recipe, self.store)

    def encoder(self) -> TextEncoder:
        return open_encoder(self.recipe, 1, "cpu")

    def expected(self) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """id → source_id, text and metadata of all that a store in step holds."""
        return {content_id([text]): (source_id, text, meta) for source_id, (text, meta) in self.corpus.items()}

    def rows(self) -> list[dict[str, Any]]:
        """All that the store holds."""
        ids = [row_id for page in self.store.ids() for row_id in page]
        return self.store.fetch(ids).to_pylist()  # type: ignore[no-any-return]

    def check(self) -> None:
        """The store holds each document once, with its own vector, and nothing else."""
        rows = self.rows()
        found = {row["id"]: (row["source_id"], row["text"], json.loads(row["metadata"])) for row in rows}
        assert len(rows) == len(found)
        assert found == self.expected()
        alone = TextEncoder(self.model, 1, "cpu")  # one text at a time
        vectors = alone.encode([row["text"] for row in rows], "document")
        np.testing.assert_allclose([row["vector"] for row in rows], vectors, atol=1e-5)
