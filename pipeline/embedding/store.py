"""Which store and table a config's vectors are in, and whether they are all there. Imports neither Ray nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.embedding.lancedb_store import LanceStore
from pipeline.runtime.files import write_atomically


def open_store(config: Config, model_fingerprint: str, width: int) -> LanceStore:
    """The table of a run's records under a model: another model's vectors, or another field's, are in another table."""
    uri, field = str(config.root / config.embedding.uri), config.embedding.field
    suffix = "" if field == "auto" else f"-{field}"
    return LanceStore(uri, f"{config.storage.run}-{model_fingerprint[:12]}{suffix}", width)


def is_embedded(config: Config, manifest: Manifest, store: LanceStore) -> bool:
    """Whether an earlier embedding of this data set into this table ran to its end, and the table is as it was then."""
    marker = _marker(config, store)
    return marker.is_file() and store.exists() and json.loads(marker.read_text()) == _complete(manifest, store)


def mark_embedded(config: Config, manifest: Manifest, store: LanceStore) -> None:
    """Note that all of a data set is in the table."""
    write_atomically(_marker(config, store), json.dumps(_complete(manifest, store)).encode())


def _marker(config: Config, store: LanceStore) -> Path:
    return config.run_dir / "embedded" / f"{store.name}.json"


def _complete(manifest: Manifest, store: LanceStore) -> dict[str, Any]:
    return {"data": manifest.fingerprint, "rows": store.count()}
