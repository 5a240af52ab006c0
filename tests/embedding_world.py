"""A corpus as prepared records, a model, and what the table must hold: for tests of embedding."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import Config, load
from pipeline.data.manifest import RECORD_SCHEMA, Manifest, SourceCount
from pipeline.data.partitions import content_id, shard_of
from pipeline.data.tokenizer import train_tokenizer
from pipeline.index.embed import EmbedStats, write_fragments
from pipeline.index.encoder import EncoderRecipe, TextEncoder, open_encoder
from pipeline.index.indexing import finish
from pipeline.index.job import Index
from pipeline.index.published import encoder_recipe, table_of
from pipeline.index.sync import COUNTS, Sync, with_vectors
from pipeline.index.table import VectorTable
from pipeline.index.writer import Writer
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, save_model
from pipeline.model.transformer import Encoder, EncoderShape
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
    """Prepared records under `folder`, and the table of their vectors."""

    folder: Path
    corpus: Corpus
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"
        if not self.model.is_dir():
            save_random_model(self.model)

    @property
    def prepared(self) -> Path:
        """A folder of its own for each state of the corpus, as prepare names them."""
        return self.folder / "data" / content_id([json.dumps(self.corpus)])[:16]

    def write_records(self) -> None:
        """The record files, as prepare leaves them: each a range of ids, sorted."""
        shards: list[list[dict[str, Any]]] = [[] for _ in range(FILES)]
        for source_id, (text, metadata) in self.corpus.items():
            row_id = content_id([text])
            values = {"id": row_id, "source": "s", "source_id": source_id, "text": text}
            shards[shard_of(row_id, FILES)].append(values | {"metadata": json.dumps(metadata)})
        (self.prepared / "records").mkdir(parents=True, exist_ok=True)
        for index, rows in enumerate(shards):
            table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["id"])), schema=RECORD_SCHEMA)
            pq.write_table(table, self.prepared / "records" / f"{index:05d}.parquet")

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
        return encoder_recipe(self.config, self.model)

    @property
    def table(self) -> VectorTable:
        return table_of(self.config, self.recipe)

    def index(self) -> Index:
        self.write_records()
        return Index.of(self.config, self.prepared, self.manifest, self.model)

    def run(self, encoder: TextEncoder | None = None, **options: Any) -> Counter[str]:
        """Bring the table up to date as `jobs/embed.py` does, with all work in this process. Returns the counts."""
        index = self.index()

        def embed(
            sync: Sync, recipe: EncoderRecipe, ranges: Any, documents: int, letters: Any, progress: Any, writer: Any
        ) -> EmbedStats:
            return embed_here(sync, encoder or self.encoder(), ranges, letters, writer)

        def here(table: VectorTable, kind: str | None, rows: int, labels: Any) -> dict[str, Any]:
            return finish(table, kind, rows)

        with patch("pipeline.index.embed.embed", embed), patch("pipeline.index.embed.finish_on_cluster", here):
            metrics = index.bring_up_to_date(lambda: None, **options)  # type: ignore[arg-type, return-value]
        return +Counter({name: metrics.get(name, 0) for name in (*COUNTS, "embedded")})

    def encoder(self) -> TextEncoder:
        return open_encoder(self.recipe, 1, "cpu")

    def expected(self) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """id → source_id, text and metadata of all that a store in step holds."""
        return {content_id([text]): (source_id, text, meta) for source_id, (text, meta) in self.corpus.items()}

    def rows(self) -> list[dict[str, Any]]:
        """All that the table holds."""
        return self.table.read(self.table.schema.names).to_pylist()  # type: ignore[no-any-return]

    def check(self) -> None:
        """The table holds each document once, with its own vector, and nothing else."""
        rows = self.rows()
        found = {row["id"]: (row["source_id"], row["text"], json.loads(row["metadata"])) for row in rows}
        assert len(rows) == len(found)
        assert found == self.expected()
        alone = TextEncoder(self.model, 1, "cpu")  # one text at a time
        vectors = alone.encode([row["text"] for row in rows], "document")
        np.testing.assert_allclose([row["vector"] for row in rows], vectors, atol=1e-5)


def embed_here(sync: Sync, encoder: TextEncoder, ranges: Any, letters: Any, writer: Writer) -> EmbedStats:
    """What `embed` spreads over the cluster, in this process, with a commit for each batch of documents."""
    written = refused = 0
    for index in ranges:
        for batch in sync.due(index):
            rows = with_vectors(batch, encoder)
            fragments, bad = write_fragments(sync.table, rows, letters)
            writer.append(fragments)
            written, refused = written + sum(each.rows for each in fragments), refused + bad
    return EmbedStats(written, refused)
