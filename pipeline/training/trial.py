"""A trial: its budget and its config, how many run side by side, and what Ray Tune runs in a process for each.

    slots(Scaling(num_workers=2), "ddp", Capacity(9, 0, 9, 0))       # Slots(trials=8, workers=2, in_process=False, …)
    criterion = Criterion.of(config, total_steps=900)                # ndcg@10, compared at 100, 300 and 900 steps
    trial_config(config, criterion, 3, {"training.learning_rate": 1e-3}).run_dir      # <run>/tune/trials/0003

A trial of one worker trains in the process that Tune gives it. Tune uses a process for one trial after the other, so
such a trial starts in a second. A trial of several workers starts them by Ray Train, which takes half a minute.

A trial that fails reports the reason. Tune starts a trial again only where it lost its process or its node, and the
trial resumes from its newest checkpoint.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.config.training import Scaling
from pipeline.core.cluster import Capacity
from pipeline.core.console import LogFile, log
from pipeline.core.outcome import alone_in
from pipeline.core.path import StoragePath
from pipeline.data.manifest import Manifest
from pipeline.training.checkpoints import TrainState
from pipeline.training.history import VALIDATION, Metrics, read_rows
from pipeline.training.stopping import lower_is_better

VALUE = "value"
STEP = "training_iteration"  # Tune's own name for how far a trial is; ours are optimizer steps
LONGEST_REASON = 500


@dataclass(frozen=True)
class Criterion:
    """The metric by which trials are compared, and for how long they train."""

    metric: str
    """As validation names it: ndcg@10."""
    mode: str
    """max or min."""
    total_steps: int
    """Of a trial that is not stopped early."""
    grace_steps: int
    """Steps that every trial gets, and between two comparisons."""

    @classmethod
    def of(cls, config: Config, total_steps: int) -> Criterion:
        """Raises ConfigError where trials would end before they are compared."""
        wanted, metric = config.tune, _metric_of(config)
        grace = wanted.grace_steps or -(-total_steps // wanted.reduction_factor**2)
        if grace > total_steps:
            raise ConfigError(
                f"tune.grace_steps: found {grace}; allowed are at most the {total_steps} steps of a whole trial"
            )
        mode = ("min" if lower_is_better(metric) else "max") if wanted.mode == "auto" else wanted.mode
        return cls(metric, mode, total_steps, grace)

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1


def _metric_of(config: Config) -> str:
    named = config.tune.metric or config.training.best_metric
    if named:
        return named.removeprefix("validation_")
    return "ndcg@10" if config.objective.contrastive else f"{next(iter(config.objective.named))}_nll"


def trial_config(config: Config, criterion: Criterion, number: int, values: dict[str, Any]) -> Config:
    """A trial as a run of its own, inside the sweep's. Raises ConfigError where the values do not go together."""
    every = config.training.validate_every_steps if config.tune.scheduler == "none" else criterion.grace_steps
    workers, steps = config.scaling.num_workers, config.tune.max_steps
    own = {
        "storage.run": f"{config.storage.run}/tune/trials/{number:04d}",
        "logging.save_dir": None,
        "training.max_steps": steps or config.training.max_steps,
        "training.max_epochs": None if steps else config.training.max_epochs,
        "training.best_metric": criterion.metric,
        "training.validate_every_steps": every,
        "checkpointing.every_steps": min(config.checkpointing.every_steps, every),
        "checkpointing.max_checkpoints": 1,
        "scaling.num_workers": 1 if workers == "auto" else workers,
    }
    return config.changed(values | own, f"trial {number}")


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

    A trial of one worker reserves that worker's share in its own process, a CPU at least. A trial of several reserves
    nothing itself: Ray Train places its workers, which Tune does not count, so one CPU is left free to read data with.
    num_workers=auto is one worker a trial: trials side by side never wait for each other. Of a range, the most count.
    """
    wanted = scaling.num_workers
    workers = 1 if wanted == "auto" else max(wanted) if isinstance(wanted, list) else wanted
    in_process = workers == 1 and not isinstance(wanted, list) and strategy == "ddp"
    gpus = (1.0 if capacity.gpus else 0.0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    cpus = max(1.0, scaling.cpus_per_worker) if in_process else scaling.cpus_per_worker
    free = capacity.cpus if in_process else capacity.cpus - 1
    fitting = int(free / cpus + 1e-9) // workers
    if gpus:
        # a fraction of a GPU is one GPU's: of two GPUs, two hold two workers of 0.6, not three
        on_gpus = int(1 / gpus + 1e-9) * capacity.gpus if gpus < 1 else capacity.gpus / gpus
        fitting = min(fitting, int(on_gpus // workers))
    if fitting < 1:
        raise ConfigError(
            f"scaling: found trials of {workers} workers with {cpus:g} CPUs and {gpus:g} GPUs each, and {free:g} CPUs "
            f"and {capacity.gpus:g} GPUs free for them; allowed are trials of which one fits, by "
            "scaling.num_workers, cpus_per_worker and gpus_per_worker"
        )
    trials = min(fitting, most or fitting)
    threads = max(1, int(capacity.cpus_there / (trials * workers)))
    return Slots(trials, workers, in_process, cpus if in_process else 0.0, gpus if in_process else 0.0, threads)


@dataclass(frozen=True)
class TrialContext:
    """What every trial is sent: the sweep's config, and the prepared data that all trials train on."""

    config: Config
    criterion: Criterion
    slots: Slots
    folder: StoragePath
    manifest: Manifest


class Reporter:
    """Reports a trial's validations to Ray Tune, and learns from it when to stop.

    A resumed trial first reports what it had before, from its metrics.jsonl: a new Tuner has not heard of it.
    """

    def __init__(self, metric: str) -> None:
        self.key, self.started = VALIDATION + metric, time.monotonic()
        self.history: StoragePath | None = None
        self.whole_steps, self.step, self.validated, self.stopped = 0, 0, 0, False

    def on_metrics(self, metrics: Metrics) -> None:
        """Report a validation. Raises SystemExit, from inside Tune, where the trial is to end."""
        rows, self.history = read_rows(self.history) if self.history else [], None
        for row in [*(row for row in rows if row["step"] < metrics["step"]), metrics]:
            self.step = int(row["step"])
            is_new = self.validated < self.step < self.whole_steps  # the last validation is left to `end`
            if is_new and math.isfinite(row.get(self.key, math.nan)):
                self.validated = self.step
                self._report(row[self.key])

    def end(self, metrics: Metrics | None = None, failed: str = "") -> None:
        """Report the last validation, or why there is none."""
        if metrics:
            self.on_metrics(metrics)
        self._report((metrics or {}).get(self.key, math.nan), ended=True, failed=failed)

    def _report(self, value: float, *, ended: bool = False, failed: str = "") -> None:
        from ray import tune

        compared_at = self.step if math.isfinite(value) else 0  # where no scheduler looks
        found = {"steps": self.step, "whole_steps": self.whole_steps, "seconds": time.monotonic() - self.started}
        try:
            tune.report({VALUE: float(value), STEP: compared_at, "ended": ended, "failed": failed, **found})
        except SystemExit:
            self.stopped = True
            raise


def run_trial(suggested: dict[str, Any], context: TrialContext) -> None:
    """What Ray Tune runs, in a thread of its own. `suggested`: the trial's number and its values."""
    reporter = Reporter(context.criterion.metric)
    try:
        config = trial_config(context.config, context.criterion, suggested["number"], suggested["values"])
        with _logged(config), alone_in(config.run_dir, wait=True):  # a killed driver's may live on for a minute
            state = _train(config, context, reporter)
    except Exception as error:
        reporter.end(failed=" ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__)
        return
    if reporter.stopped:
        sys.exit(0)
    reporter.end({"step": state.step, **state.metrics})


def _train(config: Config, context: TrialContext, reporter: Reporter) -> TrainState:
    from pipeline.training.assembly import Task, train_here

    reporter.whole_steps = Task.of(config, context.folder, context.manifest).total_steps
    reporter.history = config.run_dir / "metrics.jsonl"
    if context.slots.in_process:
        import torch

        gc.collect()
        torch.cuda.empty_cache()  # of the trial that this process had before: others may share the GPU
        torch.set_num_threads(context.slots.threads)
        return train_here(config, context.folder, context.manifest, reporter.on_metrics)
    from pipeline.core.session import Progress
    from pipeline.training.fit import fit

    progress = Progress()

    def on_metrics(metrics: Metrics) -> None:
        """In the thread that follows the progress: the workers are asked to stop, with a checkpoint."""
        try:
            if not reporter.stopped:
                reporter.on_metrics(metrics)
        except SystemExit:
            progress.ask_to_stop()

    return fit(config, context.folder, context.manifest, progress, on_metrics, context.slots.trials)


@contextmanager
def _logged(config: Config) -> Iterator[None]:
    """The log of this process is the trial's own training.log, for as long as the trial has it."""
    file = LogFile(config.log_dir, config.logging.format)
    log.handlers[:], log.propagate = [file], False
    log.setLevel(config.logging.level)
    try:
        yield
    except Exception as error:
        file.write_traceback(error)
        raise
    finally:
        log.handlers.clear()
        file.close()
