"""Preflight: check that the cluster has what a config needs, before any work is scheduled.

    preflight(config, {"prepare", "train"})      # [Finding("cluster", "1 node, 2 CPUs, 0 GPUs"), Finding("data", …), …]

It needs a connected cluster, and runs a small task without reservations on every node but the driver's. Cost:
milliseconds on one node, about a second on several. The functions `check_…` don't use Ray.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.core.cluster import NODE_ID, Cluster, connected_cluster
from pipeline.core.files import free_bytes, scratch, write_atomically
from pipeline.core.outcome import Finding, JobError, check_disk_space
from pipeline.core.path import as_path, on_disk
from pipeline.training.trial import plan_slots
from pipeline.training.workers import DATA_CPUS, shortfalls, size_workers

ANSWER_S = 60  # how long to wait for the nodes' tasks
SPILL_FULL = 0.95
"""Ray stops spilling objects to a disk that is fuller than this: its `local_fs_capacity_threshold`."""
BYTES_A_WEIGHT = 12  # in a checkpoint: the weight and AdamW's two moments, in fp32


@dataclass(frozen=True)
class View:
    """What a node has."""

    host: str
    missing: tuple[str, ...]
    """Config keys of the paths that it does not see."""
    has_key: bool
    """Whether it finds the vector store's API key."""
    spill_free: int
    """Free bytes on the disk that Ray spills objects to."""
    spill_total: int


def preflight(config: Config, needs: Collection[str]) -> list[Finding]:
    """Run all checks. `needs` has what the job will do: any of prepare, train, tune, encode and store."""
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
    """Check what the nodes see; with `keyed`, that nodes that write find the store's key."""
    from ray.exceptions import RayError

    key_files = config.secret_files if keyed else None
    try:
        views = views_of(cluster.others, paths, key_files)
    except RayError as error:
        words = f"no answer within {ANSWER_S} s from all {len(cluster.others)} other nodes ({type(error).__name__})"
        return [Finding("nodes", words, JobError(f"RAY_ADDRESS: found {words}; check the nodes and run it again"))]
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
    """The paths that all nodes must see, by config key: a probe file in storage.root, and the sources' paths."""
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
    """Check the disk of storage.root; for a bucket, also this machine's disk, where checkpoints are written first."""
    if config.model.pretrained:
        return []  # its size is not known yet; if the disk is full, the loop says so
    vocab_size = config.tokenizer.vocab_size
    if config.tokenizer.load_path:
        from pipeline.data.tokenizer import load_tokenizer

        vocab_size = load_tokenizer(as_path(config.tokenizer.load_path)).get_vocab_size()
    needed = checkpoint_bytes(config, vocab_size)
    one = 2 * needed / (config.checkpointing.max_checkpoints + 1)
    found = [check_disk_space("storage.root", config.root, needed, "checkpoints")]
    return found if free_bytes(config.root) is not None else [check_disk_space("TMPDIR", scratch(), one, "checkpoints")]


def _store(config: Config) -> Finding:
    """Check that vectors can be written to the store."""
    from pipeline.index.published import check_store

    try:
        return Finding("store", check_store(config))
    except ConfigError as error:
        return Finding("store", config.embedding.store, error)
    except JobError as error:
        return Finding("store", config.embedding.store, JobError(f"embedding.store: {error}"))


def views_of(nodes: Sequence[str], paths: Mapping[str, str], key_files: Sequence[str] | None) -> dict[str, View]:
    """The view of each node, by id. Raises GetTimeoutError if one does not answer."""
    import ray

    if not nodes:
        return {}
    view = ray.remote(num_cpus=0)(view_here)
    views = [view.options(label_selector={NODE_ID: node}).remote(paths, key_files) for node in nodes]
    return dict(zip(nodes, ray.get(views, timeout=ANSWER_S), strict=True))


def view_here(paths: Mapping[str, str], key_files: Sequence[str] | None) -> View:
    """The view of this node. `key_files` may hold the store's key; None if no key is needed."""
    import ray

    context = ray.get_runtime_context()
    disk = shutil.disk_usage(Path(context.get_temp_dir(), context.get_session_name()))
    missing = tuple(key for key, path in paths.items() if not os.path.exists(path))
    return View(socket.gethostname(), missing, key_files is None or _has_key(key_files), disk.free, disk.total)


def _has_key(files: Sequence[str]) -> bool:
    from pipeline.index.pinecone_client import api_key
    from pipeline.index.table import StoreError

    try:
        return bool(api_key(files))
    except StoreError:
        return False


def check_data(config: Config, cluster: Cluster) -> Finding:
    """Check that the data nodes have a CPU for tasks that read, filter and tokenize."""
    labels = config.scaling.labels.data
    nodes = cluster.with_labels(labels)
    found = f"{nodes.capacity().cpus:g} CPUs{_of(labels)}"
    wrong = None
    if not nodes.nodes:
        wrong = ConfigError(f"scaling.labels.data: found no node{_of(labels)}; allowed are labels that nodes have")
    elif not nodes.fitting(DATA_CPUS, 0):
        wrong = ConfigError(f"scaling.labels.data: found no node with a CPU{_of(labels)}; allowed are nodes with CPUs")
    return Finding("data", found, wrong)


def check_training(config: Config, cluster: Cluster) -> list[Finding]:
    workers = size_workers(config, cluster)
    found = f"{workers}{_of(config.scaling.labels.train)}"
    wrong = shortfalls(config, workers, cluster)
    return [Finding("training", found, ConfigError(each)) for each in wrong] or [Finding("training", found)]


def check_tuning(config: Config, cluster: Cluster) -> Finding:
    """Check that at least one trial fits."""
    labels = config.scaling.labels.train
    try:
        trial_slots = plan_slots(config.scaling, config.training.strategy, cluster.with_labels(labels).capacity())
    except ConfigError as error:
        return Finding("trials", "no room for one", error)
    limit = config.tune.max_concurrent_trials
    trials = trial_slots.trials if limit == "auto" else min(trial_slots.trials, limit)
    return Finding("trials", f"{trials} at a time, {trial_slots.workers} workers each{_of(labels)}")


def check_encoding(config: Config, cluster: Cluster) -> Finding:
    """Check that there is a node for the encoders."""
    labels = config.scaling.labels.encode or config.scaling.labels.data
    nodes = cluster.with_labels(labels)
    capacity, wrong = nodes.capacity(), None
    if not nodes.nodes or not capacity.cpus:
        wrong = ConfigError(
            f"scaling.labels.encode: found no node with a CPU{_of(labels)}; allowed are nodes with CPUs"
        )
    where = f"{capacity.gpus:g} GPUs" if capacity.gpus else f"{capacity.cpus:g} CPUs"
    return Finding("encoding", f"{where}{_of(labels)}", wrong)


def check_seen(key: str, path: str, views: Sequence[View]) -> Finding:
    """Check that other nodes see a path that this one sees."""
    blind = sorted({view.host for view in views if key in view.missing})
    if not views:
        return Finding(key, f"{path}, on the only node")
    if not blind:
        return Finding(key, f"{path}, seen by the {len(views)} other nodes")
    return Finding(
        key,
        f"{path}, not seen by {', '.join(blind)}",
        ConfigError(
            f"{key}: found {path}, which {_some(blind)} not see; allowed with more than one node is a folder in a "
            "bucket (s3://, gs://), or one on storage that all nodes mount there"
        ),
    )


def check_key(views: Sequence[View]) -> Finding:
    """Check that the nodes that write to Pinecone find its key, which we never send."""
    keyless = sorted({view.host for view in views if not view.has_key})
    if not keyless:
        return Finding("key", "found on each node that writes")
    found = f"none on {', '.join(keyless)}"
    return Finding(
        "key",
        found,
        JobError(
            f"embedding.store: found no PINECONE_API_KEY on {', '.join(keyless)}; set it where `ray start` runs there, "
            "or write it to an api.env next to the config"
        ),
    )


def check_spilling(views: Sequence[View]) -> Finding:
    """Check the disk space for objects that Ray spills."""
    full = sorted({view.host for view in views if view.spill_free < (1 - SPILL_FULL) * view.spill_total})
    least = min(view.spill_free for view in views)
    found = f"{least / 1e9:,.2f} GB free for spilled objects"
    if not full:
        return Finding("spilling", found)
    return Finding(
        "spilling",
        found,
        ConfigError(
            f"RAY_TMPDIR: found a disk that is more than {SPILL_FULL:.0%} full on {', '.join(full)}, so Ray cannot "
            "spill objects to it; use a folder on a disk with more space"
        ),
    )


def checkpoint_bytes(config: Config, vocab_size: int) -> float:
    """Estimate the size of a run's checkpoints: those kept, one being written, and the best, which has only weights.

    A layer of our encoder has four square matrices and three of `d_ff`; a decoder counts as much as the encoder.
    """
    shape = config.model.dimensions()
    width = shape["d_model"]
    layer = 4 * width**2 + 3 * width * shape["d_ff"]
    weights = vocab_size * width + layer * shape["num_layers"] * (2 if config.objective.needs_decoder else 1)
    return weights * (BYTES_A_WEIGHT * (config.checkpointing.max_checkpoints + 1) + 4)


def _of(labels: dict[str, str]) -> str:
    return f" with {', '.join(f'{name}={value}' for name, value in labels.items())}" if labels else ""


def _some(hosts: Sequence[str]) -> str:
    return f"{', '.join(hosts)} {'do' if len(hosts) > 1 else 'does'}"
