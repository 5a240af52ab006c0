"""The nodes of a Ray cluster, including those its autoscaler may add, and where work is placed.

    cluster = connected_cluster()
    cluster.with_labels({"pool": "gpu"}).capacity()          # of the nodes that have the label
    cluster.fitting(cpus=4, gpus=1)                          # 3: the number of such bundles that fit, each on one node

Ray 2.60 has no API for the nodes that its autoscaler may add, so we read them from the cluster's config file. Nodes
that may be added count as if they had every label.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NODE_ID = "ray.io/node-id"  # a label that Ray sets on each node
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` puts the cluster's config on the head node
UNLIMITED = 1_000  # bundles without resources per node


@dataclass(frozen=True)
class Node:
    """A machine; `labels` is None if the autoscaler may add it."""

    cpus: float
    gpus: float
    labels: Mapping[str, str] | None

    def has(self, labels: Mapping[str, str]) -> bool:
        return self.labels is None or labels.items() <= self.labels.items()

    def fitting(self, cpus: float, gpus: float) -> int:
        """How many bundles of this size fit."""
        ratios = [total / needed for total, needed in ((self.cpus, cpus), (self.gpus, gpus)) if needed]
        return int(min(ratios) + 1e-9) if ratios else UNLIMITED


ASSUMED = [Node(2.0, 0.0, None)] * 4


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of a cluster now, and after autoscaling (the same if it does not autoscale)."""

    cpus_now: float
    gpus_now: float
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """All nodes, including those that may be added."""

    nodes: tuple[Node, ...]
    driver_id: str = ""
    """Id of the driver's node."""

    @property
    def alive(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.labels is not None)

    @property
    def others(self) -> list[str]:
        """Ids of the nodes that are alive, except the driver's."""
        ids = [(node.labels or {}).get(NODE_ID, "") for node in self.alive]
        return [node_id for node_id in ids if node_id != self.driver_id]

    def with_labels(self, labels: Mapping[str, str]) -> Cluster:
        """The nodes that have these labels."""
        return Cluster(tuple(node for node in self.nodes if node.has(labels)), self.driver_id)

    def without_labels(self, labels: Mapping[str, str]) -> Cluster:
        """The nodes that lack one of these labels."""
        return Cluster(tuple(node for node in self.nodes if not node.has(labels)), self.driver_id)

    def capacity(self) -> Capacity:
        return Capacity(
            sum(node.cpus for node in self.alive),
            sum(node.gpus for node in self.alive),
            sum(node.cpus for node in self.nodes),
            sum(node.gpus for node in self.nodes),
        )

    def fitting(self, cpus: float, gpus: float) -> int:
        """How many bundles of this size fit, each on one node."""
        return sum(node.fitting(cpus, gpus) for node in self.nodes)

    def __str__(self) -> str:
        capacity, count = self.capacity(), len(self.alive)
        nodes = f"{count} node{'s' if count != 1 else ''}"
        text = f"{nodes}, {capacity.cpus_now:g} CPUs, {capacity.gpus_now:g} GPUs"
        if count == len(self.nodes):
            return text
        return f"{text}; may grow to {capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs"


def connected_cluster() -> Cluster:
    """The cluster that this process is connected to."""
    import ray

    alive = [
        Node(each["Resources"].get("CPU", 0.0), each["Resources"].get("GPU", 0.0), dict(each["Labels"]))
        for each in ray.nodes()
        if each["Alive"]
    ]
    addable = addable_nodes(alive, BOOTSTRAP.expanduser()) if os.environ.get("RAY_ADDRESS") else []
    return Cluster((*alive, *addable), ray.get_runtime_context().get_node_id())


def accelerators() -> list[str]:
    """The kinds of GPUs that the nodes of the connected cluster have, such as H200."""
    import ray

    names = (name for each in ray.nodes() if each["Alive"] for name in each["Resources"])
    return sorted({name.partition(":")[2] for name in names if name.startswith("accelerator_type:")})


def addable_nodes(alive: Sequence[Node], file: Path) -> list[Node]:
    """Nodes that the autoscaler may add, from the cluster's config file.

    Without that file, a cluster whose nodes have no CPUs is assumed to grow by a few small nodes.
    """
    if not file.is_file():
        return [] if any(node.cpus for node in alive) else ASSUMED
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    kinds: Counter[tuple[float, float]] = Counter()
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            size = float(kind["resources"].get("CPU", 0)), float(kind["resources"].get("GPU", 0))
            kinds[size] += kind.get("max_workers", config.get("max_workers", 0))
    left = kinds - Counter((node.cpus, node.gpus) for node in alive)
    return [Node(*size, None) for size in left.elements()]


def on_driver_node(actor: Any) -> Any:
    """Pin an actor class to the driver's node, so that the actor is lost only with the driver."""
    import ray

    return actor.options(label_selector={NODE_ID: ray.get_runtime_context().get_node_id()})


def restrict_data_to(labels: Mapping[str, str]) -> None:
    """Run this process's Ray Data tasks only on nodes with these labels."""
    import ray.data

    ray.data.DataContext.get_current().execution_options.label_selector = dict(labels) or None


@contextmanager
def data_on_driver_node() -> Iterator[dict[str, Any]]:
    """Options of map_batches that run tasks on this process's node, at most one per CPU at a time.

    They reserve no CPU, because a head node may have none. The labels of `restrict_data_to` don't apply in the block.
    """
    import ray.data

    node_id = ray.get_runtime_context().get_node_id()
    cpus = next(int(each["Resources"].get("CPU", 0)) for each in ray.nodes() if each["NodeID"] == node_id)
    pool = ray.data.TaskPoolStrategy(size=max(1, cpus))
    options = ray.data.DataContext.get_current().execution_options
    before, options.label_selector = options.label_selector, None
    try:
        yield {"compute": pool, "num_cpus": 0, "label_selector": {NODE_ID: node_id}}
    finally:
        options.label_selector = before
