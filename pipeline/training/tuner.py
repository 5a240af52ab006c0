"""Run the trials of a sweep with Ray Tune: its OptunaSearch over the sweep's journal, its schedulers.

    run_trials(study, context, on_end)          # all remaining trials; calls `on_end` as each one ends

A sweep that was killed continues with a new Tuner. It never restores the old one, whose stored state is a pickle;
`<run>/tune/ray` is deleted. The validations of ended trials, from the journal, are passed to the new scheduler, so that
its rungs and medians include them. A trial that was running reports its earlier validations again, so the scheduler
may stop it at a rung that it had passed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from pipeline.core.arrow import arrow_location
from pipeline.core.files import remove_folder
from pipeline.training.study import NAME, SweepStudy, TrialRow
from pipeline.training.trial import STEP, VALUE, TrialContext, run_trial

OnEnd = Callable[[TrialRow], None]


class Search(OptunaSearch):
    """Tune's OptunaSearch, which also records in the study how many steps each trial took and why it failed."""

    def __init__(self, study: SweepStudy, on_end: OnEnd) -> None:
        self.sweep, self.on_end = study, on_end
        self.defined: Any = None
        self.next_number = 0
        self.running: dict[str, Any] = {}
        settings = study.settings
        with warnings.catch_warnings(action="ignore"):  # constant_liar is experimental
            sampler = TPESampler(
                # a resumed sweep must not draw the same values again
                seed=int(np.random.SeedSequence([settings.seed, len(study.study.trials)]).generate_state(1)[0]),
                n_startup_trials=max(5, study.goal // 4),
                constant_liar=True,
            )
        mode, storage = study.criterion.mode, study.storage
        super().__init__(self._define, VALUE, mode, sampler=sampler, study_name=NAME, storage=storage)

    def _define(self, trial: Any) -> dict[str, Any]:
        """The input of `run_trial` for an Optuna trial, new or queued."""
        values = self.sweep.space.suggest(trial)
        if "number" not in trial.user_attrs:
            trial.set_user_attr("number", self.next_number)
        self.defined = trial
        return {"number": trial.user_attrs["number"], "values": values}

    def suggest(self, trial_id: str) -> Any:
        self.next_number = self.sweep.queue_next()
        suggested = super().suggest(trial_id)
        self.running[trial_id] = self.defined
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not result["ended"]:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error:  # else CrashRecorder calls `end` with the reason
            self.end(trial_id, result or {})

    def end(self, trial_id: str, result: dict[str, Any], failed: str = "") -> None:
        """Record in the study how a trial ended: done, stopped early or failed."""
        trial, step = self.running.pop(trial_id), result.get(STEP, 0)
        number = trial.user_attrs["number"]
        if math.isfinite(result.get(VALUE, math.nan)) and step not in self.sweep.row(number).curve:
            trial.report(result[VALUE], step)  # the step at which Tune stopped it, or its last
        row, failed = self.sweep.row(number), failed or result.get("failed", "")
        if row.value is None and not failed:
            failed = f"it reported no {self.sweep.criterion.metric}"
        steps = max(result.get("steps", 0), *row.curve, 0)
        whole_steps = steps if failed else max(result.get("whole_steps", 0), steps)
        seconds = round(result.get("seconds", 0.0), 1)
        ended = {"steps": steps, "whole_steps": whole_steps, "seconds": seconds, "reason": failed}
        trial.set_user_attr("ended", ended)
        done = not failed and result.get("ended", False)
        super().on_trial_complete(trial_id, {VALUE: row.value} if done else None, error=bool(failed))
        self.on_end(self.sweep.row(number))

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the journal has everything."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the search for a restore, which we never use


class CrashRecorder(tune.Callback):
    """Records trials whose process died more often than `max_failures`."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        reason = lines[-1] if lines else "Ray gave no reason"
        self.search.end(trial.trial_id, trial.last_result, f"its process died: {reason}")


def build_scheduler(study: SweepStudy) -> TrialScheduler:
    """Tune's scheduler, which has already received the validations of the ended trials."""
    settings, criterion = study.settings, study.criterion
    shared = {"time_attr": STEP, "metric": VALUE, "mode": criterion.mode, "grace_period": criterion.grace_steps}
    if settings.scheduler == "none":
        return FIFOScheduler()
    if settings.scheduler == "median":
        scheduler = MedianStoppingRule(min_time_slice=math.inf, **shared)  # never pauses one for another
    else:
        scheduler = ASHAScheduler(
            max_t=criterion.total_steps,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,  # let a trial end by itself, with a last checkpoint
            **shared,
        )
    for row in study.rows:
        ended = Trial(f"trial {row.number}", stub=True)
        scheduler.on_trial_add(None, ended)
        results = [{STEP: step, VALUE: value} for step, value in row.curve.items()]
        for result in results:
            scheduler.on_trial_result(None, ended, result)
        if results:
            scheduler.on_trial_complete(None, ended, results[-1])
    return scheduler


def run_trials(study: SweepStudy, context: TrialContext, on_end: OnEnd) -> None:
    """Run all remaining trials, as many concurrently as `context.slots` allows."""
    config, slots = context.config, context.slots
    folder = config.run_dir / "tune" / "ray"
    remove_folder(folder)
    search = Search(study, on_end)
    reserved = {"CPU": slots.cpus, "GPU": slots.gpus} if slots.in_process else {"memory": 1}  # Tune rejects empty ones
    resources = tune.PlacementGroupFactory([reserved], bundle_label_selector=[config.scaling.labels.train])
    storage_path, filesystem = arrow_location(folder)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), resources),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=build_scheduler(study),
            num_samples=study.remaining,
            max_concurrent_trials=slots.trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            callbacks=[CrashRecorder(search)],
            verbose=0,
        ),
    ).fit()
    remove_folder(folder)
