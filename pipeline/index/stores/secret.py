"""The Pinecone key, read where it is used and kept nowhere else."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dotenv import dotenv_values

from pipeline.index.stores.store import StoreError

VARIABLE = "PINECONE_API_KEY"


def api_key(files: Sequence[str]) -> str:
    """The environment's, else that of the first of these dotenv files that has one. Raises StoreError without one."""
    key = os.environ.get(VARIABLE, "").strip()
    for file in files:
        key = key or (dotenv_values(file).get(VARIABLE) or "").strip()
    if not key:
        raise StoreError(f"found no Pinecone key; set {VARIABLE} on each node, or write {VARIABLE}=… into {files[0]}")
    return key
