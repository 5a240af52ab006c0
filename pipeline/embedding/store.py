"""Which store and table a config's vectors are in, and whether they are all there. Imports no Ray."""

from __future__ import annotations

import json
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.data.manifest import Manifest
from pipeline.embedding.lancedb_store import LanceStore
from pipeline.runtime.files import fetched, write_atomically
from pipeline.storage.bucket import AnyPath


def open_store(config: Config, model: AnyPath) -> LanceStore:
    """The table of a run's records under the model of a folder.

    Another model's vectors, another field's, or vectors cut to another size are in another table.
    """
    from pipeline.model.folder import model_fingerprint, read_card

    folder, wanted = fetched(model), config.embedding
    card = read_card(folder)
    if wanted.dimensions and wanted.dimensions not in (card.width, *card.head.dimensions):
        allowed = ", ".join(map(str, (card.width, *card.head.dimensions)))
        raise ConfigError(f"embedding.dimensions: found {wanted.dimensions}; allowed with this model are {allowed}")
    parts = [config.storage.run, model_fingerprint(folder)[:12]]
    parts += [wanted.field] if wanted.field != "auto" else []
    parts += [str(wanted.dimensions)] if wanted.dimensions else []
    return LanceStore(config.under_root(wanted.uri), "-".join(parts), wanted.dimensions or card.width)


def is_embedded(config: Config, manifest: Manifest, store: LanceStore) -> bool:
    """Whether an earlier embedding of this data set into this table ran to its end, and the table is as it was then."""
    marker = _marker(config, store)
    return marker.is_file() and store.exists() and json.loads(marker.read_text()) == _complete(manifest, store)


def mark_embedded(config: Config, manifest: Manifest, store: LanceStore) -> None:
    """Note that all of a data set is in the table."""
    write_atomically(_marker(config, store), json.dumps(_complete(manifest, store)).encode())


def _marker(config: Config, store: LanceStore) -> AnyPath:
    return config.run_dir / "embedded" / f"{store.name}.json"


def _complete(manifest: Manifest, store: LanceStore) -> dict[str, Any]:
    return {"data": manifest.fingerprint, "rows": store.count()}
