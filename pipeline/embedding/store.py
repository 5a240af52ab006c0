"""Which store, table, ledger and cache a config's vectors are in, whether they are all there, and which readers use.

    store = open_store(config, recipe)
    sync = open_sync(config, manifest, recipe, store)

Another model's vectors, another field's, or vectors made in another way are in another table. Readers go by
`<run>/embedded/alias.json`, which names a copy of the model whose table was last brought up to date and found to be
right: search goes on with both while a new model's table is filled. Imports no Ray.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.data.manifest import Manifest
from pipeline.embedding.backends import check_backend, make_graph
from pipeline.embedding.cache import VectorCache
from pipeline.embedding.lance import connect
from pipeline.embedding.ledger import Ledger
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.stores.budget import Budget
from pipeline.embedding.stores.store import Store
from pipeline.embedding.sync import Sync
from pipeline.embedding.texts import Reading
from pipeline.model.reading import model_files, model_fingerprint, read_card
from pipeline.storage.files import fetched, free_bytes, may_write, place, write_atomically
from pipeline.storage.path import StoragePath, on_disk


def recipe_of(config: Config, model: StoragePath) -> EncoderRecipe:
    """How texts are encoded with a model's folder; for onnxruntime, its graph is made where there is none.

    Raises ConfigError for a size that the model was not trained for, and where a package is missing.
    """
    check_backend(config.embedding)
    wanted, card = config.embedding.dimensions, read_card(fetched(model))
    if wanted and wanted not in (card.width, *card.head.dimensions):
        allowed = ", ".join(map(str, (card.width, *card.head.dimensions)))
        raise ConfigError(f"embedding.dimensions: found {wanted}; allowed with this model are {allowed}")
    labels = config.scaling.labels
    recipe = EncoderRecipe(model, config.embedding, config.root / "onnx", labels.encode or labels.data)
    if config.embedding.backend == "onnxruntime":
        make_graph(recipe.local, config.embedding, recipe.graphs)
    return recipe


def open_store(config: Config, recipe: EncoderRecipe, budget: Budget | None = None) -> Store:
    """The table of a run's records under a model; a namespace of Pinecone's index.

    `budget` is what all processes of a job share of Pinecone's requests.
    """
    parts = [config.storage.run.replace("/", "."), recipe.space]
    parts += [config.embedding.field] if config.embedding.field != "auto" else []
    return named_store(config, "-".join(parts), recipe.width, budget)


def named_store(config: Config, name: str, width: int, budget: Budget | None = None) -> Store:
    """The table of a name in the config's store."""
    wanted, home = config.embedding, _home(config)
    if wanted.store == "pinecone":
        from pipeline.embedding.stores.pinecone_store import PineconeStore

        return PineconeStore(config.pinecone, config.pinecone.namespace or name, width, config.secret_files, budget)
    if wanted.store == "parquet":
        from pipeline.embedding.stores.parquet_store import ParquetStore

        if on_disk(home) is None:
            raise ConfigError(f"embedding.uri: found {home}; allowed with embedding.store=parquet is a folder on disk")
        return ParquetStore(str(home), name, width)
    from pipeline.embedding.stores.lancedb_store import LanceStore

    return LanceStore(home, name, width, wanted.index, wanted.index_rows)


def _home(config: Config) -> StoragePath:
    """The folder of the tables of LanceDB, or of Parquet's folders."""
    uri = config.embedding.uri or config.embedding.store
    return config.under_root(uri)


def reach_store(config: Config) -> str:
    """Where vectors would go. Raises ConfigError or StoreError where they could not; makes nothing there."""
    if config.embedding.store == "pinecone":
        from pipeline.embedding.stores.pinecone_service import PineconeService

        index = config.pinecone.index
        if PineconeService(config.pinecone, config.secret_files).find() is None and not config.pinecone.create:
            raise ConfigError(
                f"pinecone.index: found no index {index} under this key; allowed is one that is there, or "
                "pinecone.create=true"
            )
        return f"Pinecone's index {index}"
    home = _home(config)
    if not may_write(home):
        raise ConfigError(f"embedding.uri: found {home}, where this user may not write; allowed is a folder of its own")
    if free_bytes(home) is None:
        try:
            connect(home).list_tables(limit=1)
        except Exception as error:  # LanceDB's own come as RuntimeError, ValueError and OSError
            words = " ".join(str(error).split())[:200]
            raise ConfigError(f"embedding.uri: {home} cannot be reached: {words}") from None
    return f"{config.embedding.store} in {home}"


def open_sync(config: Config, manifest: Manifest, recipe: EncoderRecipe, store: Store, *, make: bool = True) -> Sync:
    """A job that brings the store up to date, by a ledger that is true of it; `make` the store where there is none."""
    field = embedded_field(config, manifest)
    head = read_card(recipe.local).head
    prompts = {source.name: source.prompts[field] for source in manifest.sources if field in source.prompts}
    reading = Reading(head.prompt(prompt_name(field)), prompts, config.embedding.long_texts == "chunks")
    cache = open_cache(config, recipe) if config.embedding.cache_gb else None
    if make or store.exists():
        store.create()
    ledger = Ledger(config.root / "ledgers", file_name(store))
    ledger.begin()
    there, sending = ledger.counts()
    if not there <= (store.count() if store.exists() else 0) <= there + sending:
        ledger.rebuild(store)
    if cache is not None:
        cache.freeze()
    return Sync(field, reading, store, ledger, cache)


def open_cache(config: Config, recipe: EncoderRecipe) -> VectorCache:
    """The vectors that all jobs of a storage.root have made with a model, by text."""
    cache = VectorCache(config.root / "cache", recipe.space, recipe.width)
    cache.create()
    return cache


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


def is_embedded(config: Config, prepared: StoragePath, store: Store) -> bool:
    """Whether an earlier embedding of this data set into this table ran to its end, and the table is as it was then."""
    return is_complete(config, store) and _note(config, store)["data"] == prepared.name


def is_complete(config: Config, store: Store) -> bool:
    """Whether an embedding of whatever data set ran to its end, and the table is as it was then."""
    return _marker(config, store).is_file() and store.exists() and _note(config, store)["rows"] == store.count()


def mark_embedded(config: Config, prepared: StoragePath, store: Store) -> None:
    """Note that all of a data set is in the table."""
    # The folder's name follows from the inputs, metadata among them; the fingerprint of token shards does not see that.
    note = {"data": prepared.name, "rows": store.count()}
    write_atomically(_marker(config, store), json.dumps(note).encode())


def _note(config: Config, store: Store) -> dict[str, Any]:
    return json.loads(_marker(config, store).read_text())  # type: ignore[no-any-return]


def file_name(store: Store) -> str:
    """A store's name as one of a file or a table."""
    return re.sub(r"[^\w.-]", "-", store.name, flags=re.ASCII)


def _marker(config: Config, store: Store) -> StoragePath:
    return config.run_dir / "embedded" / f"{file_name(store)}.json"


def publish(config: Config, recipe: EncoderRecipe, store: Store) -> None:
    """Let readers use a model and its table from now on."""
    name = f"models/{model_fingerprint(recipe.local)[:16]}"
    for file in model_files(recipe.local):  # each whole or not at all
        if not (config.root / name / file).is_file():
            place(recipe.folder / file, config.root / name / file)
    write_atomically(_alias(config), json.dumps({"model": name, "store": store.name}).encode())


def published_model(config: Config) -> StoragePath | None:
    """The model that readers are to use; None where none was published, or the config names one of its own."""
    path = _alias(config)
    if config.embedding.model or not path.is_file():
        return None
    return config.root / json.loads(path.read_text())["model"]  # type: ignore[no-any-return]


def _alias(config: Config) -> StoragePath:
    return config.run_dir / "embedded" / "alias.json"
