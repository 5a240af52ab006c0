"""Run the trials of a sweep with Ray Tune: its OptunaSearch over the sweep's journal, its schedulers.

    run_trials(study, context, on_end)          # all remaining trials; calls `on_end` as each one ends

A sweep that was killed continues with a new Tuner. It never restores the old one, whose stored state is a pickle;
`<run>/tune/ray` is deleted. The validations of ended trials, from the journal, are passed to the new scheduler, so that
its rungs and medians include them. A trial that was running reports its earlier validations again, so the scheduler
may stop it at a rung that it had passed. With pbt, the trials that were running start again from step 0.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from pipeline.config import Dimension
from pipeline.core.arrow import arrow_location
from pipeline.core.console import log
from pipeline.core.files import remove_folder
from pipeline.training.study import NAME, Segment, SweepStudy, TrialRow, shown
from pipeline.training.trial import SAVED_STEP, STEP, VALUE, TrialContext, run_trial

KEPT_CHECKPOINTS = 4
"""Of a trial of pbt, in Tune's folder: of two rounds, as Tune lists a checkpoint twice when it pauses the trial."""
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
        if not result["ended"] and math.isfinite(result[VALUE]):
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
        seconds = round(result.get("time_total_s", 0.0), 1)  # Tune's own, over all pauses
        ended = {"steps": steps, "whole_steps": whole_steps, "seconds": seconds, "reason": failed}
        trial.set_user_attr("ended", ended)
        done = not failed and result.get("ended", False)
        super().on_trial_complete(trial_id, {VALUE: row.value} if done else None, error=bool(failed))
        self.on_end(self.sweep.row(number))

    def number(self, trial_id: str) -> int:
        return int(self.running[trial_id].user_attrs["number"])

    def copy(self, trial_id: str, copy: Segment) -> None:
        """Record in the study that a trial goes on from another's checkpoint, with other values."""
        trial = self.running[trial_id]
        trial.set_user_attr("copies", [*trial.user_attrs.get("copies", []), asdict(copy)])

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


class Population(PopulationBasedTraining):
    """Tune's Population Based Training in rounds of `grace_steps`, with the study in place of a searcher.

    Tune allows no searcher beside it. So it takes the values of new trials from the study and records their results. In
    each round, all trials wait for the slowest, so what is copied does not depend on their order.
    """

    def __init__(self, search: Search) -> None:
        study = search.sweep
        super().__init__(
            time_attr=SAVED_STEP,
            metric=VALUE,
            mode=study.criterion.mode,
            perturbation_interval=study.criterion.grace_steps,
            hyperparam_mutations={"values": {k: _mutations(each) for k, each in study.space.dimensions.items()}},
            custom_explore_fn=self._clamp,
            log_config=False,
            synch=True,
        )
        self.search = search

    def _clamp(self, suggested: dict[str, Any]) -> dict[str, Any]:
        return suggested | {"values": self.search.sweep.space.clamp(suggested["values"])}

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        trial.set_config(self.search.suggest(trial.trial_id))
        super().on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self.search.on_trial_result(trial.trial_id, result)
        if not math.isfinite(result[VALUE]):
            result = result | {VALUE: -self.search.sweep.criterion.sign * math.inf}  # the worst: Tune skips NaN
        return self._compare(controller, trial, result)

    def _compare(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record the copies of a round, if this result ends one. Tune gives a copy its source's config and number."""
        seed = np.random.SeedSequence([self.search.sweep.settings.seed, result[SAVED_STEP]]).generate_state(1)[0]
        random.seed(int(seed))  # Tune draws from the global generators
        np.random.seed(seed)
        decision: str = super().on_trial_result(controller, trial, result)
        for each in controller.get_live_trials():
            number, source = self.search.number(each.trial_id), each.config["number"]
            if number != source:
                copy = Segment(result[SAVED_STEP], number, each.config["values"], source)
                self.search.copy(each.trial_id, copy)
                each.set_config(each.config | {"number": number})
                log.info("tune: trial %d copies trial %d at step %d; %s", number, source, copy.step, shown(copy.values))
        return decision

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(controller, trial, result)
        self.search.on_trial_complete(trial.trial_id, result)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """Also ends a round whose last trial failed: Tune compares trials only when one reports."""
        chosen: Trial | None = super().choose_trial_to_run(controller)
        waiting = [*controller.get_live_trials()]
        if chosen or not waiting or any(trial.status != Trial.PAUSED for trial in waiting):
            return chosen
        self._compare(controller, waiting[0], waiting[0].last_result)
        return super().choose_trial_to_run(controller)


def _mutations(dimension: Dimension) -> Any:
    """What Tune draws a value from: a list, of which it may also take the next, or a distribution."""
    return dimension.values or (tune.loguniform if dimension.loguniform else tune.uniform)(*dimension.ends)


def build_scheduler(search: Search) -> TrialScheduler:
    """Tune's scheduler, which has already received the validations of the ended trials."""
    study, settings, criterion = search.sweep, search.sweep.settings, search.sweep.criterion
    shared = {"time_attr": STEP, "metric": VALUE, "mode": criterion.mode, "grace_period": criterion.grace_steps}
    if settings.scheduler == "none":
        return FIFOScheduler()
    if settings.scheduler == "pbt":
        return Population(search)
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
    takes_turns = config.tune.scheduler == "pbt"
    reserved = {"CPU": slots.cpus, "GPU": slots.gpus} if slots.in_process else {"memory": 1}  # Tune rejects empty ones
    resources = tune.PlacementGroupFactory([reserved], bundle_label_selector=[config.scaling.labels.train])
    storage_path, filesystem = arrow_location(folder)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), resources),
        tune_config=tune.TuneConfig(
            search_alg=None if takes_turns else search,
            scheduler=build_scheduler(search),
            num_samples=study.remaining,
            # Tune counts paused trials too, so with pbt the trials' resources alone limit how many run at a time
            max_concurrent_trials=None if takes_turns else slots.trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS if takes_turns else None),
            failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            callbacks=[CrashRecorder(search)],
            verbose=0,
        ),
    ).fit()
    remove_folder(folder)
