"""How many trials run at the same time, and what each of them reserves.

    slots(Scaling(num_workers=2), strategy="ddp", capacity=Capacity(9, 0, 9, 0))
    # Slots(trials=8, workers=2, in_process=False): 16 workers of half a CPU, and a CPU to read data with

A trial of one worker trains in the trial's own process, which reserves that worker's share, a CPU at least, as it reads
its data too. A trial of several is a driver that reserves nothing, beside workers that Ray Train places; as Ray Tune
does not count those, there are never more trials than the cluster holds workers for, one CPU left to read data.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import ConfigError
from pipeline.config.training import Scaling
from pipeline.runtime.cluster import Capacity


@dataclass(frozen=True)
class Slots:
    """`trials` at the same time, of `workers` each, and what a trial's own process reserves."""

    trials: int
    workers: int
    in_process: bool
    cpus: float
    gpus: float
    threads: int
    """torch threads of a worker."""


def slots(scaling: Scaling, strategy: str, capacity: Capacity, most: int | None = None) -> Slots:
    """As many trials as fit, `most` at most. Raises ConfigError where not even one does.

    scaling.num_workers=auto is one worker a trial: trials side by side wait for nobody, and batches are the same for
    any number of workers. Of a range, room is kept for the most.
    """
    wanted = scaling.num_workers
    workers = 1 if wanted == "auto" else max(wanted) if isinstance(wanted, list) else wanted
    in_process = workers == 1 and not isinstance(wanted, list) and strategy == "ddp"
    gpus = (1.0 if capacity.gpus else 0.0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    cpus = max(1.0, scaling.cpus_per_worker) if in_process else scaling.cpus_per_worker
    free = capacity.cpus if in_process else capacity.cpus - 1
    fitting = int(free / cpus + 1e-9) // workers
    if gpus:
        fitting = min(fitting, int(_workers_on_gpus(capacity.gpus, gpus) // workers))
    if fitting < 1:
        raise ConfigError(
            f"scaling: found trials of {workers} workers with {cpus:g} CPUs and {gpus:g} GPUs each, and {free:g} CPUs "
            f"and {capacity.gpus:g} GPUs free for them; allowed are trials of which one fits, by "
            "scaling.num_workers, cpus_per_worker and gpus_per_worker"
        )
    trials = min(fitting, most or fitting)
    threads = max(1, int(capacity.cpus_there / (trials * workers)))
    return Slots(trials, workers, in_process, cpus if in_process else 0.0, gpus if in_process else 0.0, threads)


def _workers_on_gpus(there: float, each: float) -> float:
    """A fraction of a GPU is one GPU's: of two GPUs, two hold two workers of 0.6, not three."""
    return int(1 / each + 1e-9) * there if each < 1 else there / each
