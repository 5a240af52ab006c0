"""How many training workers a config asks for, and whether they fit the cluster. Pure arithmetic.

    workers = size_workers(config, cluster)                 # Workers(2, 2, cpus=0.5, gpus=0, threads=1)
    for sentence in shortfalls(config, workers, cluster): ...

One CPU must stay free for Ray Data, which reads for the workers: without it, training hangs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.core.cluster import Cluster
from pipeline.core.console import duration

DEFAULT_CPU_WORKERS = 2
DATA_CPUS = 1.0
AUTO_LAYERS = 2  # that model.num_layers=auto may choose for `tiny`; larger sizes have more of their own
AUTO_TIME_S = 600.0  # for training them, without training.max_time_s. Ours: what someone who tries it waits
GPU_FLOPS_PER_S = 1e13  # that small layers reach at least on a data centre's GPU: 3% of an A100's peak in bf16. Ours
AUTO_TABLE_WARMUP = 0.5  # training.table_warmup_fraction with such layers


@dataclass(frozen=True)
class Workers:
    """The minimum and maximum number of training workers, the resources of each, and its torch threads."""

    min_workers: int
    max_workers: int
    cpus: float
    gpus: float
    threads: int

    @property
    def count(self) -> str:
        fixed = self.min_workers == self.max_workers
        return str(self.max_workers) if fixed else f"{self.min_workers} to {self.max_workers}"

    def __str__(self) -> str:
        return f"{self.count} workers of {self.cpus:g} CPUs and {self.gpus:g} GPUs"


def size_workers(config: Config, cluster: Cluster, concurrent_runs: int = 1, batch_size: int | None = None) -> Workers:
    """The workers that the config asks for, whether or not they fit; `concurrent_runs` share the CPUs for threads.

    `batch_size` is the number of pairs per step, if not the config's; each worker needs one.
    """
    capacity, scaling = cluster.with_labels(config.scaling.labels.train).capacity(), config.scaling
    gpu_share = (1.0 if capacity.gpus else 0.0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if scaling.num_workers == "auto":
        max_workers = max(1, int(capacity.gpus / gpu_share)) if gpu_share else DEFAULT_CPU_WORKERS
        min_workers = max_workers = min(max_workers, batch_size or config.training.global_batch_size)
    else:
        numbers = scaling.num_workers if isinstance(scaling.num_workers, list) else [scaling.num_workers]
        min_workers, max_workers = numbers[0], numbers[-1]
    threads = max(1, int(max(capacity.cpus_now // (max_workers * concurrent_runs), scaling.cpus_per_worker)))
    return Workers(min_workers, max_workers, scaling.cpus_per_worker, gpu_share, threads)


def choose_layers(config: Config, workers: Workers, tokens: float) -> tuple[int, str]:
    """The number of layers for model.num_layers=auto, and why; `tokens` are those of the whole run."""
    if not workers.gpus:
        return 0, "a token table, because training has no GPU; on CPUs layers take long and gained nothing"
    shape, gpus = config.model.dimensions(), max(1, round(workers.max_workers * workers.gpus))
    width, shared = shape["d_model"], shape["num_kv_heads"] / shape["num_heads"]
    weights = 2 * width**2 * (1 + shared) + 3 * width * shape["d_ff"]
    layer_s = 6 * weights * tokens / (GPU_FLOPS_PER_S * gpus)
    most, limit = max(AUTO_LAYERS, shape["num_layers"]), config.training.max_time_s or AUTO_TIME_S
    layers, on = min(most, int(limit / max(layer_s, 1e-9))), f"{gpus} GPU{'s' * (gpus > 1)}"
    if layers:
        return layers, f"{on} should train {'it' if layers == 1 else 'them'} in under {duration(layers * layer_s)}"
    return 0, f"a token table, because a layer might take {duration(layer_s)} on {on}, over {duration(limit)}"


def shortfalls(config: Config, workers: Workers, cluster: Cluster) -> list[str]:
    """A sentence for each reason why the minimum number of workers does not fit; empty if it fits."""
    labels, count = config.scaling.labels, workers.min_workers
    train = cluster.with_labels(labels.train)
    if not train.nodes:
        return [f"scaling.labels.train: found no node with {_listed(labels.train)}; allowed are labels that nodes have"]
    if count * workers.gpus > train.capacity().gpus:
        return [
            f"scaling.gpus_per_worker: found {count} workers of {workers.gpus:g} GPUs each, but the cluster has or "
            f"can add only {train.capacity().gpus:g} GPUs; lower it or scaling.num_workers"
        ]
    sentences = _cpu_shortfall(config, workers, cluster)
    if not sentences and train.fitting(workers.cpus, workers.gpus) < count:
        largest = max(train.nodes, key=lambda node: (node.gpus, node.cpus))
        sentences = [
            f"scaling.cpus_per_worker: found {count} workers of {workers.cpus:g} CPUs and {workers.gpus:g} GPUs each, "
            f"but the nodes hold only {train.fitting(workers.cpus, workers.gpus)}; the largest node has "
            f"{largest.cpus:g} CPUs and {largest.gpus:g} GPUs; allowed are workers that fit the nodes"
        ]
    return sentences


def _cpu_shortfall(config: Config, workers: Workers, cluster: Cluster) -> list[str]:
    """Check that the CPUs are enough, with one left on the nodes that Ray Data may use."""
    labels, count = config.scaling.labels, workers.min_workers
    train, data = cluster.with_labels(labels.train), cluster.with_labels(labels.data)
    if not data.nodes:
        return [f"scaling.labels.data: found no node with {_listed(labels.data)}; allowed are labels that nodes have"]
    train_only = train.without_labels(labels.data).capacity().cpus  # nodes without Ray Data
    cpus, shared = train.capacity().cpus, data.capacity().cpus
    left = shared - max(0.0, count * workers.cpus - train_only)
    if left >= DATA_CPUS and count * workers.cpus <= cpus:
        return []
    free = min(cpus, train_only + shared - DATA_CPUS)
    fitting = int(max(0.0, free) / workers.cpus)
    return [
        f"scaling: found {count} workers of {workers.cpus:g} CPUs and {cpus:g} CPUs in all; reading data needs "
        f"{DATA_CPUS:g} of them; allowed "
        + (f"are {fitting} workers of {workers.cpus:g}, or " if fitting else "is ")
        + (f"scaling.cpus_per_worker={free / count:g}" if free > 0 else "a cluster with more CPUs")
    ]


def _listed(labels: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())
