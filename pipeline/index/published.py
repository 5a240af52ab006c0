"""Locates the table of a config's vectors, and the model and table that readers use.

    recipe = encoder_recipe(config, model)
    table = table_of(config, recipe)

Each combination of run, model, field and vector settings has its own table. Once a table is verified,
`<run>/published.json` names it with its settings and a copy of the model. Readers follow that file, so search keeps
using the old table while a new model's table is filled. Does not import Ray.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config, ConfigError, Embedding
from pipeline.core.console import log
from pipeline.core.files import free_bytes, link_or_copy, local_copy, may_write, write_atomically
from pipeline.core.outcome import JobError, command
from pipeline.core.path import StoragePath, as_path
from pipeline.data.manifest import Manifest
from pipeline.index.backends import make_graph
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.pinecone_client import Budget
from pipeline.index.table import VectorTable
from pipeline.model.folder import model_files, model_fingerprint, read_model_spec, runs_padded

if TYPE_CHECKING:
    from pipeline.index.pinecone_store import PineconeStore


def encoder_recipe(config: Config, model: StoragePath) -> EncoderRecipe:
    """The encoder of a model folder with the config's settings; for onnxruntime, exports a missing graph.

    Raises ConfigError for dimensions that the model was not trained for, and if a package is missing.
    """
    dimensions, spec = config.embedding.dimensions, read_model_spec(local_copy(model))
    if dimensions and dimensions not in (spec.width, *spec.head.dimensions):
        allowed = ", ".join(map(str, (spec.width, *spec.head.dimensions)))
        raise ConfigError(f"embedding.dimensions: found {dimensions}; allowed with this model are {allowed}")
    if runs_padded(spec) and config.embedding.backend == "torch":
        log.info("model: %s runs padded, because transformers cannot run it packed", spec.shape["model_type"])
    labels = config.scaling.labels
    recipe = EncoderRecipe(model, config.embedding, config.root / "onnx", labels.encode or labels.data)
    if config.embedding.backend == "onnxruntime":
        make_graph(recipe.local, config.embedding, recipe.graphs)
    return recipe


def table_of(config: Config, recipe: EncoderRecipe) -> VectorTable:
    """The table of a run's documents and a model. Creates nothing."""
    settings, run = config.embedding, config.storage.run
    key = [run, recipe.fingerprint, settings.field, settings.vector_type]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run)[-80:]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    uri = (settings.uri if settings.store == "lancedb" else None) or "lancedb"
    return VectorTable(
        config.under_root(uri), f"{name}-{digest}", recipe.width, settings.vector_type, settings.long_texts == "chunks"
    )


def open_pinecone(config: Config, table: VectorTable, budget: Budget | None = None) -> PineconeStore:
    """The namespace that a table is pushed to. `budget` limits the requests of all processes of a job."""
    from pipeline.index.pinecone_store import PineconeStore

    namespace = config.pinecone.namespace or table.name
    return PineconeStore(config.pinecone, namespace, table.width, config.secret_files, budget)


def check_store(config: Config) -> str:
    """Check that vectors can be stored, and name the store. Creates nothing. Raises ConfigError or StoreError."""
    if config.embedding.store == "pinecone":
        from pipeline.index.pinecone_client import PineconeClient

        index = config.pinecone.index
        if PineconeClient(config.pinecone, config.secret_files).find() is None and not config.pinecone.create:
            raise ConfigError(
                f"pinecone.index: found no index {index} with this API key; name an existing one, or set "
                "pinecone.create=true"
            )
        return f"Pinecone's index {index}"
    home = config.under_root(config.embedding.uri or config.embedding.store)
    if not may_write(home):
        raise ConfigError(f"embedding.uri: found {home}, which you cannot write to; allowed is a writable folder")
    if free_bytes(home) is None:
        home.exists()  # raises an error if the bucket cannot be reached
    return f"{config.embedding.store} in {home}"


def prompt_name(field: str) -> str:
    """Anchors act as queries, all other fields as documents."""
    return "query" if field == "anchor" else "document"


def embedded_field(config: Config, manifest: Manifest) -> str:
    """The record field to embed."""
    setting, fields = config.embedding.field, manifest.text_fields
    field = setting if setting != "auto" else ("positive" if "positive" in fields else "text")
    if field not in fields:
        raise ConfigError(f"embedding.field: found {setting!r}; allowed with this data are {', '.join(fields)}")
    return field


def publish(config: Config, recipe: EncoderRecipe, table: VectorTable) -> None:
    """Make readers use a model and its table."""
    model = copy_model(config, recipe.local)
    settings = config.embedding.model_dump(mode="json")
    content = json.dumps(
        {"model": f"models/{model.name}", "table": str(table.path), "embedding": settings}, indent=2
    ).encode()
    if not _published(config).is_file() or _published(config).read_bytes() != content:
        write_atomically(_published(config), content)


def copy_model(config: Config, folder: Path) -> StoragePath:
    """Copy a model's files below storage.root, unless they are there. Returns their folder."""
    copy = config.root / "models" / model_fingerprint(folder)[:16]
    for file in model_files(folder):  # each copied atomically
        if not (copy / file).is_file():
            link_or_copy(folder / file, copy / file)
    return copy


def published(config: Config) -> tuple[EncoderRecipe, VectorTable]:
    """The encoder and table for readers: those of `embedding.model` if it is set, else the last published ones.

    Raises JobError if nothing was published.
    """
    if config.embedding.model:
        recipe = encoder_recipe(config, as_path(config.embedding.model))
        return recipe, table_of(config, recipe)
    path = _published(config)
    if not path.is_file():
        raise JobError(f"the run {config.storage.run} has no vectors yet; run {command('run')} first")
    content = json.loads(path.read_text())
    config = config.model_copy(update={"embedding": Embedding.model_validate(content["embedding"])})
    recipe = encoder_recipe(config, config.root / content["model"])
    return recipe, table_of(config, recipe)


def _published(config: Config) -> StoragePath:
    return config.run_dir / "published.json"
