"""How many training workers a config asks for, and whether a cluster has room for them. Pure arithmetic.

    workers = size_workers(config, cluster)                 # Workers(fewest=2, most=2, cpus=0.5, gpus=0, threads=1)
    for sentence in shortfalls(config, workers, cluster): ...

One CPU must be left for Ray Data, which reads for the workers: without it, training waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.core.cluster import Cluster

DEFAULT_CPU_WORKERS = 2
DATA_CPUS = 1.0


@dataclass(frozen=True)
class Workers:
    """How many training workers there are, at least and at most, what each reserves, and its torch threads."""

    fewest: int
    most: int
    cpus: float
    gpus: float
    threads: int

    def __str__(self) -> str:
        number = str(self.most) if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{number} workers of {self.cpus:g} CPUs and {self.gpus:g} GPUs"


def size_workers(config: Config, cluster: Cluster, concurrent_runs: int = 1) -> Workers:
    """The workers that are asked for, whether or not they fit, if `concurrent_runs` share the cluster."""
    capacity, wanted = cluster.with_labels(config.scaling.labels.train).capacity(), config.scaling
    gpu_share = (1.0 if capacity.gpus else 0.0) if wanted.gpus_per_worker == "auto" else wanted.gpus_per_worker
    if wanted.num_workers == "auto":
        most = max(1, int(capacity.gpus / gpu_share)) if gpu_share else DEFAULT_CPU_WORKERS
        fewest = most = min(most, config.training.global_batch_size)
    else:
        numbers = wanted.num_workers if isinstance(wanted.num_workers, list) else [wanted.num_workers]
        fewest, most = numbers[0], numbers[-1]
    threads = max(1, int(max(capacity.cpus_there // (most * concurrent_runs), wanted.cpus_per_worker)))
    return Workers(fewest, most, wanted.cpus_per_worker, gpu_share, threads)


def shortfalls(config: Config, workers: Workers, cluster: Cluster) -> list[str]:
    """Why the fewest workers do not fit the cluster, a sentence a reason; empty where they do."""
    labels, fewest = config.scaling.labels, workers.fewest
    own = cluster.with_labels(labels.train)
    if not own.nodes:
        return [f"scaling.labels.train: found no node with {_listed(labels.train)}; allowed are labels that nodes have"]
    if fewest * workers.gpus > own.capacity().gpus:
        return [
            f"scaling.gpus_per_worker: found {fewest} workers of {workers.gpus:g} GPUs, and {own.capacity().gpus:g} "
            "GPUs that are there or may be added; allowed are as many as there are"
        ]
    sentences = _cpu_shortfall(config, workers, cluster)
    if not sentences and own.fitting(workers.cpus, workers.gpus) < fewest:
        largest = max(own.nodes, key=lambda node: (node.gpus, node.cpus))
        sentences = [
            f"scaling.cpus_per_worker: found {fewest} workers of {workers.cpus:g} CPUs and {workers.gpus:g} GPUs, and "
            f"room for {own.fitting(workers.cpus, workers.gpus)} of them, each on one node, of which the largest has "
            f"{largest.cpus:g} CPUs and {largest.gpus:g} GPUs; allowed are workers that fit the nodes"
        ]
    return sentences


def _cpu_shortfall(config: Config, workers: Workers, cluster: Cluster) -> list[str]:
    """Whether the CPUs are enough, and one of them is left where Ray Data may work."""
    labels, fewest = config.scaling.labels, workers.fewest
    own, data = cluster.with_labels(labels.train), cluster.with_labels(labels.data)
    if not data.nodes:
        return [f"scaling.labels.data: found no node with {_listed(labels.data)}; allowed are labels that nodes have"]
    apart = own.without_labels(labels.data).capacity().cpus  # where training is alone
    cpus, shared = own.capacity().cpus, data.capacity().cpus
    left = shared - max(0.0, fewest * workers.cpus - apart)
    if left >= DATA_CPUS and fewest * workers.cpus <= cpus:
        return []
    room = min(cpus, apart + shared - DATA_CPUS)
    fitting = int(max(0.0, room) / workers.cpus)
    return [
        f"scaling: found {fewest} workers of {workers.cpus:g} CPUs and {cpus:g} CPUs in all, of which reading data "
        f"takes {DATA_CPUS:g}; allowed "
        + (f"are {fitting} workers of {workers.cpus:g}, or " if fitting else "is ")
        + (f"scaling.cpus_per_worker={room / fewest:g}" if room > 0 else "a cluster with more CPUs")
    ]


def _listed(labels: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())
