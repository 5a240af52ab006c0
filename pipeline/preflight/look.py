"""The preflight of a job: everything that is looked at before its work is scheduled, in one table.

    look(config, {"prepare", "train"})         # [Finding("cluster", "1 node, 2 CPUs, 0 GPUs"), Finding("data", …), …]

It needs a connected cluster. Nodes other than the driver's are asked by a task each, which reserves nothing. Cost:
milliseconds on one node, about a second where there are more.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.preflight.checks import (
    View,
    check_data,
    check_encoding,
    check_seen,
    check_spilling,
    check_training,
    checkpoint_bytes,
)
from pipeline.runtime.cluster import NODE_ID, Cluster, connected_cluster
from pipeline.runtime.files import scratch
from pipeline.runtime.findings import Finding, room
from pipeline.runtime.job import JobError

ANSWER_S = 60  # for a node to say what it sees


def look(config: Config, needs: Collection[str]) -> list[Finding]:
    """`needs` are the kinds of work ahead: of prepare, train, encode and store those that there will be."""
    cluster = connected_cluster()
    found = [Finding("cluster", str(cluster)), check_data(config, cluster)]
    if "train" in needs:
        found += [*check_training(config, cluster), *_room_for_checkpoints(config)]
    if "encode" in needs:
        found.append(check_encoding(config, cluster))
    found += _paths_and_disks(config, cluster)
    if "store" in needs:
        found.append(_store(config))
    return found


def _paths_and_disks(config: Config, cluster: Cluster) -> Iterator[Finding]:
    with _local_paths(config) as paths:
        try:
            others = _views(cluster.others, list(paths.values()))
        except Exception as error:
            words = f"RAY_ADDRESS: a node did not say in {ANSWER_S} s what it sees ({type(error).__name__})"
            yield Finding("nodes", words, JobError(f"{words}; run the job again once all nodes are well"))
            return
        for key, path in paths.items():
            shown = str(Path(path).parent) if key == "storage.root" else path
            seen = [View(v.host, tuple({shown} if path in v.missing else ()), 0, 1) for v in others]
            yield check_seen(key, shown, seen)
        if "storage.root" not in paths:
            yield Finding("storage.root", str(config.root))
    yield check_spilling([*others, _view(())])


@contextmanager
def _local_paths(config: Config) -> Iterator[dict[str, str]]:
    """What all nodes are to see, by key: a file made for it in storage.root, and what sources are read from."""
    paths = {
        f"data.sources {source.name}": str(Path(source.path).absolute())
        for source in config.data.sources
        if source.path and os.path.exists(source.path) and source.type != "huggingface"
    }
    root = config.root
    if not isinstance(root, Path):
        yield paths
        return
    root.mkdir(parents=True, exist_ok=True)
    probe = root / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield {"storage.root": str(probe), **paths}
    finally:
        probe.unlink()


def _views(node_ids: list[str], paths: list[str]) -> list[View]:
    """What each of these nodes sees."""
    import ray

    if not node_ids:
        return []
    view = ray.remote(num_cpus=0)(_view)
    asked = [view.options(label_selector={NODE_ID: node}).remote(paths) for node in node_ids]
    return list(ray.get(asked, timeout=ANSWER_S))


def _view(paths: Collection[str]) -> View:
    """What the node that this runs on sees."""
    from ray._private.worker import _global_node

    disk = shutil.disk_usage(_global_node.get_session_dir_path())
    return View(socket.gethostname(), tuple(path for path in paths if not os.path.exists(path)), disk.free, disk.total)


def _room_for_checkpoints(config: Config) -> list[Finding]:
    """On the disk of storage.root; where that is in a bucket, on this machine's, where one is put together."""
    if config.model.pretrained:
        return []  # its size is known once it is here; the loop ends with one sentence where a disk is full
    vocab_size = config.tokenizer.vocab_size
    if config.tokenizer.load_path:
        from pipeline.data.vocabulary import load_tokenizer

        vocab_size = load_tokenizer(Path(config.tokenizer.load_path)).get_vocab_size()
    needed = checkpoint_bytes(config, vocab_size)
    if isinstance(config.root, Path):
        return [room("storage.root", config.root, needed, "checkpoints")]
    return [room("TMPDIR", scratch(), 2 * needed / (config.checkpointing.max_checkpoints + 1), "checkpoints")]


def _store(config: Config) -> Finding:
    """Whether vectors can be written where they are to go."""
    from pipeline.embedding.store import reach_store

    try:
        return Finding("store", reach_store(config))
    except ConfigError as error:
        return Finding("store", config.embedding.store, error)
    except JobError as error:
        return Finding("store", config.embedding.store, JobError(f"embedding.store: {error}"))
