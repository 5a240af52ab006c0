"""Which table a config's vectors are in, and which model and table readers use.

    recipe = encoder_recipe(config, model)
    table = table_of(config, recipe)

Each combination of run, model, field and vector settings has its own table. Readers follow `<run>/published.json`,
which names a copy of the model, its table and its settings, once the table is verified. Search keeps using them while a
new model's table is filled. Imports no Ray.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from pipeline.config import Config, ConfigError, Embedding
from pipeline.core.files import fetched, free_bytes, may_write, place, write_atomically
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath, as_path
from pipeline.data.manifest import Manifest
from pipeline.index.backends import make_graph
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.pinecone_client import Budget
from pipeline.index.table import VectorTable
from pipeline.model.folder import model_files, model_fingerprint, read_card

if TYPE_CHECKING:
    from pipeline.index.pinecone_store import PineconeStore


def encoder_recipe(config: Config, model: StoragePath) -> EncoderRecipe:
    """How texts are encoded with a model's folder; for onnxruntime, its graph is made where there is none.

    Raises ConfigError for a size that the model was not trained for, and where a package is missing.
    """
    wanted, card = config.embedding.dimensions, read_card(fetched(model))
    if wanted and wanted not in (card.width, *card.head.dimensions):
        allowed = ", ".join(map(str, (card.width, *card.head.dimensions)))
        raise ConfigError(f"embedding.dimensions: found {wanted}; allowed with this model are {allowed}")
    labels = config.scaling.labels
    recipe = EncoderRecipe(model, config.embedding, config.root / "onnx", labels.encode or labels.data)
    if config.embedding.backend == "onnxruntime":
        make_graph(recipe.local, config.embedding, recipe.graphs)
    return recipe


def table_of(config: Config, recipe: EncoderRecipe) -> VectorTable:
    """The table of a run's documents under a model. Nothing is made."""
    wanted, run = config.embedding, config.storage.run
    key = [run, recipe.space, wanted.field, wanted.vector_type]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run)[-80:]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    uri = (wanted.uri if wanted.store == "lancedb" else None) or "lancedb"
    return VectorTable(
        config.under_root(uri), f"{name}-{digest}", recipe.width, wanted.vector_type, wanted.long_texts == "chunks"
    )


def open_pinecone(config: Config, table: VectorTable, budget: Budget | None = None) -> PineconeStore:
    """The namespace that a table is pushed to. `budget` is what all processes of a job share of requests."""
    from pipeline.index.pinecone_store import PineconeStore

    namespace = config.pinecone.namespace or table.name
    return PineconeStore(config.pinecone, namespace, table.width, config.secret_files, budget)


def reach_store(config: Config) -> str:
    """Where vectors would go. Raises ConfigError or StoreError where they could not; makes nothing there."""
    if config.embedding.store == "pinecone":
        from pipeline.index.pinecone_client import PineconeClient

        index = config.pinecone.index
        if PineconeClient(config.pinecone, config.secret_files).find() is None and not config.pinecone.create:
            raise ConfigError(
                f"pinecone.index: found no index {index} under this key; allowed is one that is there, or "
                "pinecone.create=true"
            )
        return f"Pinecone's index {index}"
    home = config.under_root(config.embedding.uri or config.embedding.store)
    if not may_write(home):
        raise ConfigError(f"embedding.uri: found {home}, where this user may not write; allowed is a folder of its own")
    if free_bytes(home) is None:
        home.exists()  # raises what keeps this machine from a bucket
    return f"{config.embedding.store} in {home}"


def prompt_name(field: str) -> str:
    """Anchors act as queries, all other fields as documents."""
    return "query" if field == "anchor" else "document"


def embedded_field(config: Config, manifest: Manifest) -> str:
    """The record field that is embedded."""
    wanted, there = config.embedding.field, manifest.text_fields
    field = wanted if wanted != "auto" else ("positive" if "positive" in there else "text")
    if field not in there:
        raise ConfigError(f"embedding.field: found {wanted!r}; allowed here are {', '.join(there)}")
    return field


def publish(config: Config, recipe: EncoderRecipe, table: VectorTable) -> None:
    """Let readers use a model and its table from now on."""
    name = f"models/{model_fingerprint(recipe.local)[:16]}"
    for file in model_files(recipe.local):  # each whole or not at all
        if not (config.root / name / file).is_file():
            place(recipe.local / file, config.root / name / file)
    settings = config.embedding.model_dump(mode="json")
    found = json.dumps({"model": name, "table": str(table.path), "embedding": settings}, indent=2).encode()
    if not _published(config).is_file() or _published(config).read_bytes() != found:
        write_atomically(_published(config), found)


def published(config: Config) -> tuple[EncoderRecipe, VectorTable]:
    """The encoder and the table for readers: of the config if it names `embedding.model`, else those published last.

    Raises JobError if nothing was published.
    """
    if config.embedding.model:
        recipe = encoder_recipe(config, as_path(config.embedding.model))
        return recipe, table_of(config, recipe)
    path = _published(config)
    if not path.is_file():
        raise JobError(f"the run {config.storage.run} has embedded nothing yet; python jobs/run.py does the whole job")
    found = json.loads(path.read_text())
    config = config.model_copy(update={"embedding": Embedding.model_validate(found["embedding"])})
    recipe = encoder_recipe(config, config.root / found["model"])
    return recipe, table_of(config, recipe)


def _published(config: Config) -> StoragePath:
    return config.run_dir / "published.json"
