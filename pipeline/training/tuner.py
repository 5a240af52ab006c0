"""Ray Tune runs the trials of a sweep: its OptunaSearch over the sweep's journal, its schedulers, a process a trial.

    run_trials(study, context, on_end)          # every trial that is left; `on_end` is called with each as it ends

A sweep that was killed continues with a new Tuner. It never restores the old one, whose state in storage is pickled;
the old one's folder, `<run>/tune/ray`, is deleted. The journal has the trials that ended, and their validations are
passed to the new scheduler, so that its rungs and medians start with them. A trial that was under way reports its
earlier validations again, so the scheduler may stop it at a rung that it had passed.
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
from pipeline.training.study import NAME, Row, SweepStudy
from pipeline.training.trial import STEP, VALUE, TrialContext, run_trial

OnEnd = Callable[[Row], None]


class Search(OptunaSearch):
    """Tune's search by Optuna, which also notes in the study how far each trial came and why it failed."""

    def __init__(self, study: SweepStudy, on_end: OnEnd) -> None:
        self.sweep, self.on_end = study, on_end
        self.asked: Any = None
        self.next_number = 0
        self.running: dict[str, Any] = {}
        settings = study.settings
        with warnings.catch_warnings(action="ignore"):  # Optuna marks what may change
            sampler = TPESampler(
                # a sweep that goes on draws what it has not drawn yet
                seed=int(np.random.SeedSequence([settings.seed, len(study.study.trials)]).generate_state(1)[0]),
                n_startup_trials=max(5, study.goal // 4),
                constant_liar=True,
            )
        mode, storage = study.criterion.mode, study.storage
        super().__init__(self._define, VALUE, mode, sampler=sampler, study_name=NAME, storage=storage)

    def _define(self, trial: Any) -> dict[str, Any]:
        """What Tune sends to a trial, for one of Optuna's, new or from the queue."""
        values = self.sweep.space.suggest(trial)
        if "number" not in trial.user_attrs:
            trial.set_user_attr("number", self.next_number)
        self.asked = trial
        return {"number": trial.user_attrs["number"], "values": values}

    def suggest(self, trial_id: str) -> Any:
        self.next_number = self.sweep.queue_next()
        suggested = super().suggest(trial_id)
        self.running[trial_id] = self.asked
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not result["ended"]:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error:  # else Deaths has the reason
            self.end(trial_id, result or {})

    def end(self, trial_id: str, result: dict[str, Any], failed: str = "") -> None:
        """Note how a trial ended, then tell Optuna: done, stopped early or failed."""
        trial, step = self.running.pop(trial_id), result.get(STEP, 0)
        number = trial.user_attrs["number"]
        if math.isfinite(result.get(VALUE, math.nan)) and step not in self.sweep.row(number).curve:
            trial.report(result[VALUE], step)  # at which Tune stopped it, or its last one
        row, failed = self.sweep.row(number), failed or result.get("failed", "")
        if row.value is None and not failed:
            failed = f"it gave no {self.sweep.criterion.metric}"
        steps = max(result.get("steps", 0), *row.curve, 0)
        whole_steps = steps if failed else max(result.get("whole_steps", 0), steps)
        seconds = round(result.get("seconds", 0.0), 1)
        noted = {"steps": steps, "whole_steps": whole_steps, "seconds": seconds, "reason": failed}
        trial.set_user_attr("ended", noted)
        done = not failed and result.get("ended", False)
        super().on_trial_complete(trial_id, {VALUE: row.value} if done else None, error=bool(failed))
        self.on_end(self.sweep.row(number))

    def save(self, checkpoint_path: str) -> None:
        """The journal has it all."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it was given, for a restore that is never used


class Deaths(tune.Callback):
    """Trials whose process died more often than Tune starts it again."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        reason = lines[-1] if lines else "Ray gives no reason"
        self.search.end(trial.trial_id, trial.last_result, f"its process died: {reason}")


def scheduler_of(study: SweepStudy) -> TrialScheduler:
    """Tune's scheduler, which has been told of the trials that ended."""
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
            stop_last_trials=False,  # a trial ends by itself, with its last checkpoint
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
    """Run all trials that are left, side by side as far as the context's slots go."""
    config, slots = context.config, context.slots
    folder = config.run_dir / "tune" / "ray"
    remove_folder(folder)
    search = Search(study, on_end)
    reserved = {"CPU": slots.cpus, "GPU": slots.gpus} if slots.in_process else {"memory": 1}  # Tune takes no nothing
    room = tune.PlacementGroupFactory([reserved], bundle_label_selector=[config.scaling.labels.train])
    storage_path, filesystem = arrow_location(folder)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), room),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler_of(study),
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
            callbacks=[Deaths(search)],
            verbose=0,
        ),
    ).fit()
    remove_folder(folder)
