"""Which store, and which table of it, a config's vectors are in, and whether they are all there. Imports no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.data.manifest import Manifest
from pipeline.embedding.stores.budget import Budget
from pipeline.embedding.stores.store import Store
from pipeline.runtime.files import write_atomically


def open_store(config: Config, model: Path, budget: Budget | None = None) -> Store:
    """The table of a run's records under the model of a folder; a namespace of Pinecone's index.

    Another model's vectors, another field's, or vectors cut to another size are in another table. `budget` is what all
    processes of a job share of Pinecone's requests.
    """
    from pipeline.model.folder import model_fingerprint, read_card

    wanted, card = config.embedding, read_card(model)
    if wanted.dimensions and wanted.dimensions not in (card.width, *card.head.dimensions):
        allowed = ", ".join(map(str, (card.width, *card.head.dimensions)))
        raise ConfigError(f"embedding.dimensions: found {wanted.dimensions}; allowed with this model are {allowed}")
    parts = [config.storage.run, model_fingerprint(model)[:12]]
    parts += [wanted.field] if wanted.field != "auto" else []
    parts += [str(wanted.dimensions)] if wanted.dimensions else []
    return named_store(config, "-".join(parts), wanted.dimensions or card.width, budget)


def named_store(config: Config, name: str, width: int, budget: Budget | None = None) -> Store:
    """The table of a name in the config's store."""
    wanted = config.embedding
    uri = wanted.uri or wanted.store
    place = uri if "://" in uri else str(config.root / uri)
    if wanted.store == "pinecone":
        from pipeline.embedding.stores.pinecone_store import PineconeStore

        return PineconeStore(config.pinecone, config.pinecone.namespace or name, width, config.secret_files, budget)
    if wanted.store == "parquet":
        from pipeline.embedding.stores.parquet_store import ParquetStore

        if "://" in uri:
            raise ConfigError(f"embedding.uri: found {uri!r}; allowed with embedding.store=parquet is a local folder")
        return ParquetStore(place, name, width)
    from pipeline.embedding.stores.lancedb_store import LanceStore

    return LanceStore(place, name, width, wanted.index, wanted.index_rows)


def is_embedded(config: Config, manifest: Manifest, store: Store) -> bool:
    """Whether an earlier embedding of this data set into this table ran to its end, and the table is as it was then."""
    marker = _marker(config, store)
    return marker.is_file() and store.exists() and json.loads(marker.read_text()) == _complete(manifest, store)


def mark_embedded(config: Config, manifest: Manifest, store: Store) -> None:
    """Note that all of a data set is in the table."""
    write_atomically(_marker(config, store), json.dumps(_complete(manifest, store)).encode())


def _marker(config: Config, store: Store) -> Path:
    return config.run_dir / "embedded" / f"{store.name}.json"


def _complete(manifest: Manifest, store: Store) -> dict[str, Any]:
    return {"data": manifest.fingerprint, "rows": store.count()}
