"""The preflight of a job: everything that is looked at before its work is scheduled, in one table.

    look(config, {"prepare", "train"})         # [Finding("cluster", "1 node, 2 CPUs, 0 GPUs"), Finding("data", …), …]

It needs a connected cluster. Nodes other than the driver's are asked by a task each, which reserves nothing. Cost:
milliseconds on one node, about a second where there are more.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.preflight.checks import (
    check_data,
    check_encoding,
    check_key,
    check_seen,
    check_spilling,
    check_training,
    check_tuning,
    checkpoint_bytes,
)
from pipeline.preflight.views import ANSWER_S, view_here, views_of
from pipeline.runtime.cluster import Cluster, connected_cluster
from pipeline.runtime.findings import Finding, room
from pipeline.runtime.job import JobError
from pipeline.storage.files import free_bytes, scratch, write_atomically
from pipeline.storage.path import as_path, on_disk


def look(config: Config, needs: Collection[str]) -> list[Finding]:
    """`needs` are the kinds of work ahead: of prepare, train, tune, encode and store those that there will be."""
    cluster = connected_cluster()
    found = [Finding("cluster", str(cluster)), check_data(config, cluster)]
    if "train" in needs:
        found += [*check_training(config, cluster), *_room_for_checkpoints(config)]
    if "tune" in needs:
        found += [check_tuning(config, cluster), *_room_for_checkpoints(config)]
    if "encode" in needs:
        found.append(check_encoding(config, cluster))
    if "store" in needs:
        found.append(_store(config))
    with _local_paths(config) as paths:
        return found + _on_nodes(config, cluster, paths, "store" in needs and config.embedding.store == "pinecone")


def _on_nodes(config: Config, cluster: Cluster, paths: dict[str, str], keyed: bool) -> list[Finding]:
    """What the nodes say that they see; with `keyed`, those that write must have the store's key."""
    from ray.exceptions import RayError

    key_files = config.secret_files if keyed else None
    try:
        views = views_of(cluster.others, paths, key_files)
    except RayError as error:
        words = f"no answer in {ANSWER_S} s from all of {len(cluster.others)} other nodes ({type(error).__name__})"
        return [Finding("nodes", words, JobError(f"RAY_ADDRESS: found {words}; run it again once they are well"))]
    shown = paths | ({"storage.root": str(config.root)} if "storage.root" in paths else {})
    found = [check_seen(key, path, list(views.values())) for key, path in shown.items()]
    if "storage.root" not in paths:
        found.append(Finding("storage.root", f"{config.root}, a bucket"))
    if keyed:
        writers = cluster.with_labels(config.scaling.labels.data).others
        found.append(check_key([views[node] for node in writers]))
    return [*found, check_spilling([*views.values(), view_here({}, None)])]


@contextmanager
def _local_paths(config: Config) -> Iterator[dict[str, str]]:
    """What all nodes are to see, by key: a file made for it in storage.root, and what sources are read from."""
    paths = {
        f"data.sources {source.name}": str(Path(source.path).absolute())
        for source in config.data.sources
        if source.path and os.path.exists(source.path) and source.type != "huggingface"
    }
    root = on_disk(config.root)
    if root is None:
        yield paths
        return
    probe = root / f".probe-{uuid.uuid4().hex}"
    write_atomically(probe, b"")
    try:
        yield {"storage.root": str(probe), **paths}
    finally:
        probe.unlink()


def _room_for_checkpoints(config: Config) -> list[Finding]:
    """On the disk of storage.root; where that is in a bucket, on this machine's, where one is put together."""
    if config.model.pretrained:
        return []  # its size is known once it is here; the loop ends with one sentence where a disk is full
    vocab_size = config.tokenizer.vocab_size
    if config.tokenizer.load_path:
        from pipeline.data.tokenizer import load_tokenizer

        vocab_size = load_tokenizer(as_path(config.tokenizer.load_path)).get_vocab_size()
    needed = checkpoint_bytes(config, vocab_size)
    one = 2 * needed / (config.checkpointing.max_checkpoints + 1)
    found = [room("storage.root", config.root, needed, "checkpoints")]
    return found if free_bytes(config.root) is not None else [room("TMPDIR", scratch(), one, "checkpoints")]


def _store(config: Config) -> Finding:
    """Whether vectors can be written where they are to go."""
    from pipeline.embedding.store import reach_store

    try:
        return Finding("store", reach_store(config))
    except ConfigError as error:
        return Finding("store", config.embedding.store, error)
    except JobError as error:
        return Finding("store", config.embedding.store, JobError(f"embedding.store: {error}"))
