"""What the nodes of a cluster see: asked of each by a small task that reserves nothing, and here of this one itself.

views_of(["9c1f…"], {"storage.root": "/data/.probe-1"}, key_files=[])      # {"9c1f…": View("node-b", …)}
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.cluster import NODE_ID

ANSWER_S = 60  # for a node to say what it sees


@dataclass(frozen=True)
class View:
    """What a node sees: the keys of paths that it lacks, whether it finds the key of the store, how full the disk is
    that Ray spills objects to.
    """

    host: str
    missing: tuple[str, ...]
    has_key: bool
    spill_free: int
    spill_total: int


def views_of(nodes: Sequence[str], paths: Mapping[str, str], key_files: Sequence[str] | None) -> dict[str, View]:
    """By id, what each of these nodes sees. Raises GetTimeoutError where one does not answer."""
    import ray

    if not nodes:
        return {}
    view = ray.remote(num_cpus=0)(view_here)
    asked = [view.options(label_selector={NODE_ID: node}).remote(paths, key_files) for node in nodes]
    return dict(zip(nodes, ray.get(asked, timeout=ANSWER_S), strict=True))


def view_here(paths: Mapping[str, str], key_files: Sequence[str] | None) -> View:
    """What the node that this runs on sees. `key_files` may hold the store's key; None where there is none to have."""
    import ray

    ray_here = ray.get_runtime_context()
    disk = shutil.disk_usage(Path(ray_here.get_temp_dir(), ray_here.get_session_name()))
    missing = tuple(key for key, path in paths.items() if not os.path.exists(path))
    return View(socket.gethostname(), missing, key_files is None or _has_key(key_files), disk.free, disk.total)


def _has_key(files: Sequence[str]) -> bool:
    from pipeline.embedding.stores.secret import api_key
    from pipeline.embedding.stores.store import StoreError

    try:
        return bool(api_key(files))
    except StoreError:
        return False
