"""A trial of a sweep: its budget, its config, how many run concurrently, and the function that Ray Tune runs.

    plan_slots(Scaling(num_workers=2), "ddp", Capacity(9, 0, 9, 0))       # TrialSlots(trials=8, workers=2, …)
    criterion = Criterion.of(config, total_steps=900)                # ndcg@10, compared at 100, 300 and 900 steps
    trial_config(config, criterion, 3, {"training.learning_rate": 1e-3}).run_dir      # <run>/tune/trials/0003

A trial of one worker trains in Tune's own process. Tune reuses processes, so such a trial starts in a second. A trial
of several workers starts them with Ray Train, which takes half a minute.

A trial that fails reports the reason and is not retried. If it loses its process or node, Tune restarts it, and it
resumes from its newest checkpoint.

With pbt, Tune pauses trials and lets some continue from another's checkpoint. So a trial then hands Tune a checkpoint
with each validation, and starts from the one that Tune hands back.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.config.training import Scaling
from pipeline.core.arrow import arrow_location
from pipeline.core.cluster import Capacity
from pipeline.core.console import LogFile, log
from pipeline.core.outcome import job_lock
from pipeline.core.path import StoragePath
from pipeline.data.manifest import Manifest
from pipeline.training.checkpoints import TrainState, start_from
from pipeline.training.history import VALIDATION, Metrics, read_rows
from pipeline.training.stopping import loss_of, lower_is_better

VALUE = "value"
STEP = "training_iteration"  # Tune's name for a trial's progress; we report optimizer steps
SAVED_STEP = "saved_step"  # of the checkpoint that comes with a report
LONGEST_REASON = 500


@dataclass(frozen=True)
class Criterion:
    """The metric that trials are compared by, and how long they train."""

    metric: str
    """As named in validation, such as ndcg@10."""
    mode: str
    """max or min."""
    total_steps: int
    """Steps of a trial that is not stopped early."""
    grace_steps: int
    """Steps that every trial gets, and the steps between two validations."""

    @classmethod
    def of(cls, config: Config, total_steps: int) -> Criterion:
        """Raises ConfigError if trials would end before they are compared."""
        settings, metric = config.tune, _metric_of(config)
        grace = settings.grace_steps or -(-total_steps // settings.reduction_factor**2)
        if grace > total_steps:
            raise ConfigError(
                f"tune.grace_steps: found {grace}; allowed are at most {total_steps}, the steps of a full trial"
            )
        mode = ("min" if lower_is_better(metric) else "max") if settings.mode == "auto" else settings.mode
        return cls(metric, mode, total_steps, grace)

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1


def _metric_of(config: Config) -> str:
    named = config.tune.metric or config.training.best_metric
    if named:
        return named.removeprefix("validation_")
    return "ndcg@10" if config.objective.contrastive else loss_of(next(iter(config.objective.named)))


def trial_config(config: Config, criterion: Criterion, number: int, values: dict[str, Any]) -> Config:
    """The config of a trial, whose run folder is inside the sweep's. Raises ConfigError for incompatible values."""
    scheduler, workers, steps = config.tune.scheduler, config.scaling.num_workers, config.tune.max_steps
    every = config.training.validate_every_steps if scheduler == "none" else criterion.grace_steps
    save_every = every if scheduler == "pbt" else min(config.checkpointing.every_steps, every)
    overrides = {
        "storage.run": f"{config.storage.run}/tune/trials/{number:04d}",
        "logging.save_dir": None,
        "training.max_steps": steps or config.training.max_steps,
        "training.max_epochs": None if steps else config.training.max_epochs,
        "training.best_metric": criterion.metric,
        "training.validate_every_steps": every,
        "checkpointing.every_steps": save_every,
        "checkpointing.max_checkpoints": 1,
        "checkpointing.accept_changes": [*config.checkpointing.accept_changes, *values],  # of a copied checkpoint
        "scaling.num_workers": 1 if workers == "auto" else workers,
    }
    return config.changed(values | overrides, f"trial {number}")


@dataclass(frozen=True)
class TrialSlots:
    """How many trials run concurrently, the workers of each, and what each trial's own process reserves."""

    trials: int
    workers: int
    in_process: bool
    """Whether the trial's own process is the worker."""
    cpus: float
    gpus: float
    threads: int
    """torch threads of a worker."""


def plan_slots(scaling: Scaling, strategy: str, capacity: Capacity, max_trials: int | None = None) -> TrialSlots:
    """As many concurrent trials as fit, up to `max_trials`. Raises ConfigError if none fits.

    A trial of one worker reserves its resources in its own process, at least one CPU. A trial of several reserves
    nothing, because Ray Train places its workers; Tune does not count those, so we keep one CPU free for reading data.
    num_workers=auto means one worker per trial, so that trials don't wait for each other; a range means its maximum.
    """
    num_workers = scaling.num_workers
    workers = 1 if num_workers == "auto" else max(num_workers) if isinstance(num_workers, list) else num_workers
    in_process = workers == 1 and not isinstance(num_workers, list) and strategy == "ddp"
    gpus = (1.0 if capacity.gpus else 0.0) if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    cpus = max(1.0, scaling.cpus_per_worker) if in_process else scaling.cpus_per_worker
    free = capacity.cpus if in_process else capacity.cpus - 1
    fitting = int(free / cpus + 1e-9) // workers
    if gpus:
        # a fraction cannot span GPUs: two GPUs hold two workers of 0.6, not three
        on_gpus = int(1 / gpus + 1e-9) * capacity.gpus if gpus < 1 else capacity.gpus / gpus
        fitting = min(fitting, int(on_gpus // workers))
    if fitting < 1:
        raise ConfigError(
            f"scaling: found trials of {workers} workers with {cpus:g} CPUs and {gpus:g} GPUs each, but only "
            f"{free:g} CPUs and {capacity.gpus:g} GPUs free for them; lower scaling.num_workers, cpus_per_worker or "
            "gpus_per_worker"
        )
    trials = min(fitting, max_trials or fitting)
    threads = max(1, int(capacity.cpus_now / (trials * workers)))
    return TrialSlots(trials, workers, in_process, cpus if in_process else 0.0, gpus if in_process else 0.0, threads)


@dataclass(frozen=True)
class TrialContext:
    """The inputs that all trials share."""

    config: Config
    criterion: Criterion
    slots: TrialSlots
    folder: StoragePath
    manifest: Manifest


class Reporter:
    """Reports a trial's validations to Ray Tune, which may then stop the trial.

    A resumed trial first reports its earlier validations from metrics.jsonl, because a new Tuner does not know them.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.key, self.every = VALIDATION + criterion.metric, criterion.grace_steps
        self.history: StoragePath | None = None
        self.whole_steps, self.step, self.validated, self.stopped = 0, 0, 0, False

    def on_metrics(self, metrics: Metrics) -> None:
        """Report a validation. Tune raises SystemExit to stop the trial."""
        rows, self.history = read_rows(self.history) if self.history else [], None
        for row in [*(row for row in rows if row["step"] < metrics["step"]), metrics]:
            self.step = int(row["step"])
            is_new = self.validated < self.step < self.whole_steps  # `end` reports the last validation
            if is_new and math.isfinite(row.get(self.key, math.nan)):
                self.validated = self.step
                self._report(row[self.key])

    def on_saved(self, folder: StoragePath, state: TrainState) -> None:
        """Report a validation with its checkpoint. Tune raises SystemExit to pause the trial."""
        from ray import tune

        if state.step % self.every == 0 and state.step < self.whole_steps:  # `end` reports the last validation
            self.step = state.step
            path, filesystem = arrow_location(folder)
            self._report(state.metrics.get(self.key, math.nan), checkpoint=tune.Checkpoint(path, filesystem))

    def end(self, metrics: Metrics | None = None, failed: str = "") -> None:
        """Report the last validation, or why the trial failed."""
        if metrics:
            self.on_metrics(metrics)
        self._report((metrics or {}).get(self.key, math.nan), ended=True, failed=failed)

    def _report(self, value: float, *, ended: bool = False, failed: str = "", checkpoint: Any = None) -> None:
        from ray import tune

        compared_at = self.step if math.isfinite(value) else 0  # schedulers ignore step 0
        spent = {"steps": self.step, "whole_steps": self.whole_steps, SAVED_STEP: self.step if checkpoint else 0}
        metrics = {VALUE: float(value), STEP: compared_at, "ended": ended, "failed": failed, **spent}
        try:
            tune.report(metrics, checkpoint=checkpoint)
        except SystemExit:
            self.stopped = True
            raise


def run_trial(suggested: dict[str, Any], context: TrialContext) -> None:
    """Run one trial; Ray Tune calls this in a thread. `suggested` has the trial's number and values."""
    reporter = Reporter(context.criterion)
    try:
        config = trial_config(context.config, context.criterion, suggested["number"], suggested["values"])
        with _logged(config), job_lock(config.run_dir, wait=True):  # a killed driver's trial may run on for a minute
            state = _train(config, context, reporter)
    except Exception as error:
        reporter.end(failed=" ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__)
        return
    if reporter.stopped:
        sys.exit(0)
    reporter.end({"step": state.step, **state.metrics})


def _train(config: Config, context: TrialContext, reporter: Reporter) -> TrainState:
    from pipeline.training.assembly import RunSpec, train_locally

    reporter.whole_steps = RunSpec.of(config, context.folder, context.manifest).total_steps
    if context.slots.in_process:
        import torch

        gc.collect()
        torch.cuda.empty_cache()  # of this process's previous trial; others may share the GPU
        torch.set_num_threads(context.slots.threads)
        if config.tune.scheduler == "pbt":
            _start_from_tune(config.run_dir)
            return train_locally(config, context.folder, context.manifest, on_saved=reporter.on_saved)
        reporter.history = config.run_dir / "metrics.jsonl"
        return train_locally(config, context.folder, context.manifest, reporter.on_metrics)
    from pipeline.core.session import Progress
    from pipeline.training.fit import fit

    progress, reporter.history = Progress(), config.run_dir / "metrics.jsonl"

    def on_metrics(metrics: Metrics) -> None:
        """Called in the progress thread, so it cannot raise; it asks the workers to checkpoint and stop."""
        try:
            if not reporter.stopped:
                reporter.on_metrics(metrics)
        except SystemExit:
            progress.ask_to_stop()

    return fit(config, context.folder, context.manifest, progress, on_metrics, context.slots.trials)


def _start_from_tune(run_dir: StoragePath) -> None:
    """Replace a trial's checkpoints by the one that Tune hands it: its own, or that of the trial that it copies."""
    from ray import tune

    checkpoint = tune.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as source:
        start_from(run_dir, Path(source) if source else None)


@contextmanager
def _logged(config: Config) -> Iterator[None]:
    """Log to the trial's own training.log within the block."""
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
