"""A cluster's nodes, those that its autoscaler may add, and where a job's work is placed.

    cluster = connected_cluster()
    cluster.with_labels({"pool": "gpu"}).capacity()          # of the nodes that have the label
    cluster.fitting(cpus=4, gpus=1)                          # 3: the bundles of this size that fit, each on one node

Ray has no API for the nodes that its autoscaler may add (2.60), so they are read from the cluster's own file. Nodes
that are not there yet count as if they had every label.
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
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` puts the cluster's file on the head
UNLIMITED = 1_000  # bundles without resources that fit on a node


@dataclass(frozen=True)
class Node:
    """A machine; `labels` is None if it is not there yet."""

    cpus: float
    gpus: float
    labels: Mapping[str, str] | None

    def has(self, labels: Mapping[str, str]) -> bool:
        return self.labels is None or labels.items() <= self.labels.items()

    def fitting(self, cpus: float, gpus: float) -> int:
        """How many bundles of this size fit."""
        ratios = [there / wanted for there, wanted in ((self.cpus, cpus), (self.gpus, gpus)) if wanted]
        return int(min(ratios) + 1e-9) if ratios else UNLIMITED


ASSUMED = [Node(2.0, 0.0, None)] * 4


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of a cluster: those there now, and those it may grow to (the same if it does not autoscale)."""

    cpus_there: float
    gpus_there: float
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """The nodes that are there, and those that may be added; `own` is the id of the driver's node."""

    nodes: tuple[Node, ...]
    own: str = ""

    @property
    def there(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.labels is not None)

    @property
    def others(self) -> list[str]:
        """Ids of the nodes that are there, without the driver's."""
        ids = [(node.labels or {}).get(NODE_ID, "") for node in self.there]
        return [each for each in ids if each != self.own]

    def with_labels(self, labels: Mapping[str, str]) -> Cluster:
        """The nodes that have these labels."""
        return Cluster(tuple(node for node in self.nodes if node.has(labels)), self.own)

    def without_labels(self, labels: Mapping[str, str]) -> Cluster:
        """The nodes that lack one of these labels."""
        return Cluster(tuple(node for node in self.nodes if not node.has(labels)), self.own)

    def capacity(self) -> Capacity:
        there = self.there
        return Capacity(
            sum(node.cpus for node in there),
            sum(node.gpus for node in there),
            sum(node.cpus for node in self.nodes),
            sum(node.gpus for node in self.nodes),
        )

    def fitting(self, cpus: float, gpus: float) -> int:
        """How many bundles of this size fit, each on one node."""
        return sum(node.fitting(cpus, gpus) for node in self.nodes)

    def __str__(self) -> str:
        now, more = self.capacity(), len(self.nodes) - len(self.there)
        count = f"{len(self.there)} node{'s' if len(self.there) != 1 else ''}"
        text = f"{count}, {now.cpus_there:g} CPUs, {now.gpus_there:g} GPUs"
        return f"{text}; may grow to {now.cpus:g} CPUs and {now.gpus:g} GPUs" if more else text


def connected_cluster() -> Cluster:
    """The cluster that this process is connected to."""
    import ray

    there = [
        Node(each["Resources"].get("CPU", 0.0), each["Resources"].get("GPU", 0.0), dict(each["Labels"]))
        for each in ray.nodes()
        if each["Alive"]
    ]
    more = addable(there, BOOTSTRAP.expanduser()) if os.environ.get("RAY_ADDRESS") else []
    return Cluster((*there, *more), ray.get_runtime_context().get_node_id())


def addable(there: Sequence[Node], file: Path) -> list[Node]:
    """Nodes that an autoscaler may add to those that are there, from the cluster's own file.

    Without that file, a cluster in which no node has a CPU is taken to be one that grows, by a few small nodes.
    """
    if not file.is_file():
        return [] if any(node.cpus for node in there) else ASSUMED
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    kinds: Counter[tuple[float, float]] = Counter()
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            size = float(kind["resources"].get("CPU", 0)), float(kind["resources"].get("GPU", 0))
            kinds[size] += kind.get("max_workers", config.get("max_workers", 0))
    left = kinds - Counter((node.cpus, node.gpus) for node in there)
    return [Node(*size, None) for size in left.elements()]


def on_own_node(actor: Any) -> Any:
    """The actor class, pinned to the driver's node, so that the actor is lost only if the driver is."""
    import ray

    return actor.options(label_selector={NODE_ID: ray.get_runtime_context().get_node_id()})


def place_data(labels: Mapping[str, str]) -> None:
    """Run the tasks of this process's datasets only on nodes with these labels."""
    import ray.data

    ray.data.DataContext.get_current().execution_options.label_selector = dict(labels) or None


@contextmanager
def data_on_own_node() -> Iterator[dict[str, Any]]:
    """Options of map_batches that keep tasks on this process's node, at most one per CPU at a time.

    They reserve no CPU, because a head may offer none. The labels of `place_data` are suspended within the block.
    """
    import ray.data

    own = ray.get_runtime_context().get_node_id()
    cpus = next(int(each["Resources"].get("CPU", 0)) for each in ray.nodes() if each["NodeID"] == own)
    at_once = ray.data.TaskPoolStrategy(size=max(1, cpus))
    options = ray.data.DataContext.get_current().execution_options
    before, options.label_selector = options.label_selector, None
    try:
        yield {"compute": at_once, "num_cpus": 0, "label_selector": {NODE_ID: own}}
    finally:
        options.label_selector = before
