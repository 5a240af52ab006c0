"""Whether a cluster has what a config asks of it. Plain functions of what was found there, without Ray.

check_training(config, cluster)                      # Finding("training", "2 workers of 0.5 CPUs and 0 GPUs")
check_seen("storage.root", "/data", [View("node-b", missing=("storage.root",), …)]).wrong
# storage.root: found /data, which node-b does not see; allowed is a bucket, or …
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import Config, ConfigError
from pipeline.preflight.views import View
from pipeline.runtime.cluster import Cluster
from pipeline.runtime.findings import Finding
from pipeline.runtime.job import JobError
from pipeline.training.workers import DATA_CPUS, shortfalls, size_workers
from pipeline.tuning.trial import slots

SPILL_FULL = 0.95
"""Share of a disk in use from which Ray spills no more objects to it: its `local_fs_capacity_threshold`."""
BYTES_A_WEIGHT = 12  # in a checkpoint: the weight and AdamW's two moments, in fp32


def check_data(config: Config, cluster: Cluster) -> Finding:
    """A CPU for the tasks that read, judge and tokenize."""
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
    """Room for a trial."""
    labels = config.scaling.labels.train
    try:
        room = slots(config.scaling, config.training.strategy, cluster.with_labels(labels).capacity())
    except ConfigError as error:
        return Finding("trials", "no room for one", error)
    wanted = config.tune.max_concurrent_trials
    trials = room.trials if wanted == "auto" else min(room.trials, wanted)
    return Finding("trials", f"{trials} at the same time, {room.workers} workers each{_of(labels)}")


def check_encoding(config: Config, cluster: Cluster) -> Finding:
    """A node that encoders may go to."""
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
    """That other nodes see what this one does under a path."""
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
    """That the nodes which write to Pinecone find its key: it is sent to none of them."""
    keyless = sorted({view.host for view in views if not view.has_key})
    if not keyless:
        return Finding("key", "found on each node that writes")
    found = f"none on {', '.join(keyless)}"
    return Finding(
        "key",
        found,
        JobError(
            f"embedding.store: found no PINECONE_API_KEY on {', '.join(keyless)}; set it where `ray start` runs there, "
            "or write it to an api.env beside the config"
        ),
    )


def check_spilling(views: Sequence[View]) -> Finding:
    """Room for objects that memory does not hold."""
    full = sorted({view.host for view in views if view.spill_free < (1 - SPILL_FULL) * view.spill_total})
    least = min(view.spill_free for view in views)
    found = f"{least / 1e9:,.2f} GB free for objects that leave memory"
    if not full:
        return Finding("spilling", found)
    return Finding(
        "spilling",
        found,
        ConfigError(
            f"RAY_TMPDIR: found a disk that is more than {SPILL_FULL:.0%} full on {', '.join(full)}, to which Ray "
            "spills nothing; allowed is a folder on a disk with room"
        ),
    )


def checkpoint_bytes(config: Config, vocab_size: int) -> float:
    """About what all checkpoints of a run take: those that are kept, one on its way, and the best, which has weights
    alone. Layers of our encoder have four square matrices and three of `d_ff`; a decoder is taken for as large.
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
