"""What a sweep knows: which trials there are, how each went, what to try next, and which are worth going on with.

    with Sweep.open(config, terms) as sweep:
        sweep.next()                           # Candidate(number=0, values={"training.learning_rate": 0.001}, …)
        if sweep.report(0, 100, 0.71):         # its metric at step 100: True asks to end it here
            sweep.finish(0)
        sweep.best                             # Row(number=0, state="stopped early", value=0.71, …)

All of it is one Optuna study in a journal (journal.py), so that a killed sweep goes on as if nothing had happened: the
searcher has the finished trials and their curves, asha's rungs are among them, and what was under way is handed out
again first, under its own number. A trial is drawn with a seed of the sweep's seed and its number, not of how often the
driver was started.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.config import Config, ConfigError
from pipeline.config.tune import Tune
from pipeline.tuning.journal import Journal
from pipeline.tuning.space import Space
from pipeline.tuning.terms import Terms

STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
}
TRIALS = 16
MEDIAN_OF = 4  # trials that must have gone to their end before others are compared with them. Ours


FEWEST_TO_WEIGH = 4  # trials from which importance is told. Ours


@dataclass(frozen=True)
class Candidate:
    """A trial to run; `taken_up` where an earlier start of the driver has begun it."""

    number: int
    values: dict[str, Any]
    taken_up: bool


@dataclass(frozen=True)
class Row:
    """A trial as it stands. `value` is its best validation's, at `at_step`; `curve` has all of them, by step."""

    number: int
    state: str
    values: dict[str, Any]
    value: float | None
    at_step: int | None
    steps: int
    whole_steps: int
    """What it would have taken to its end; what it took, where it failed."""
    seconds: float
    reason: str
    curve: dict[int, float]


class Sweep:
    def __init__(self, study: optuna.Study, space: Space, settings: Tune, terms: Terms, journal: Journal) -> None:
        self.study, self.space, self.settings, self.terms, self.journal = study, space, settings, terms, journal
        self.running: dict[int, Trial] = {}
        self.pruned: set[int] = set()
        self.unfinished = [trial for trial in self._frozen() if trial.state == TrialState.RUNNING]
        points = len(list(space.grid())) if settings.searcher == "grid" else None
        wanted = settings.trials or points or TRIALS
        self.goal = min(wanted, points) if points else wanted

    @classmethod
    @contextmanager
    def open(cls, config: Config, terms: Terms) -> Iterator[Sweep]:
        """The sweep of the config's run, new or as it was left. Raises ConfigError where its folder holds another."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, journal = Space.of(config), Journal(config.run_dir / "tune")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna marks what may change
                study = optuna.create_study(
                    storage=JournalStorage(journal),
                    study_name="sweep",
                    direction="maximize" if terms.higher_is_better else "minimize",
                    pruner=_pruner(config.tune, terms),
                    load_if_exists=True,
                )
            _refuse_another(config, study, terms.described(config, space))
            sweep = cls(study, space, config.tune, terms, journal)
            sweep._enqueue(config)
            yield sweep
        finally:
            journal.close()

    def _enqueue(self, config: Config) -> None:
        """All points of a grid; else the config as it is, which the others are compared with."""
        own = self.space.point(config)
        points = list(self.space.grid()) if self.settings.searcher == "grid" else [own] if own else []
        for point in points:
            self.study.enqueue_trial(point, user_attrs={"is_config": point == own}, skip_if_exists=True)

    def next(self) -> Candidate | None:
        """The next trial to run: one that was under way when the driver ended, else a new one; None at the end."""
        taken_up = bool(self.unfinished)
        if not taken_up and self.count >= self.goal:
            return None
        number = self.unfinished[0].number if taken_up else self.count
        self.study.sampler = _sampler(self.settings, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = Trial(self.study, self.unfinished.pop(0)._trial_id) if taken_up else self.study.ask()
            values = self.space.suggest(trial)
        self.running[trial.number] = trial
        return Candidate(trial.number, values, taken_up)

    def report(self, number: int, step: int, value: float, *, last: bool = False) -> bool:
        """Note a trial's metric after a validation, its `last` one or not. Returns whether it should end there."""
        trial = self.running[number]
        if step not in self._frozen()[number].intermediate_values:  # after a kill, some come again
            trial.report(value, step)
        if not last and trial.should_prune():
            self.pruned.add(number)
        return number in self.pruned

    def finish(self, number: int, steps: int = 0, whole_steps: int = 0, seconds: float = 0.0, failed: str = "") -> Row:
        """A trial is at its end, having taken `steps` of `whole_steps`; `failed` is why, where it is a bad one."""
        trial = self.running.pop(number)
        curve = _finite(self._frozen()[number].intermediate_values)
        if not curve and not failed:
            failed = f"it gave no {self.terms.metric}"
        steps = max([steps, *curve])
        noted = {"steps": steps, "whole_steps": steps if failed else max(whole_steps, steps)}
        for name, value in {**noted, "seconds": round(seconds, 1), "reason": failed}.items():
            trial.set_user_attr(name, value)
        if failed:
            self.study.tell(trial, state=TrialState.FAIL)
        elif number in self.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, self._best_of(curve)[1])
        return self.rows[number]

    @property
    def count(self) -> int:
        """Trials that were begun."""
        return len(self._frozen(waiting=False))

    @property
    def done(self) -> int:
        return sum(trial.state.is_finished() for trial in self._frozen())

    @property
    def rows(self) -> list[Row]:
        """Every trial that was begun, by number."""
        return [self._row(trial) for trial in self._frozen(waiting=False)]

    @property
    def best(self) -> Row | None:
        """The best of those that went to their end, else of those stopped early; None where all failed."""
        for state in ("done", "stopped early"):
            rows = [row for row in self.rows if row.state == state and row.value is not None]
            if rows:
                return max(rows, key=lambda row: self.terms.sign * (row.value or 0.0))
        return None

    @property
    def config_row(self) -> Row | None:
        """The trial that is the config as it is."""
        return next((self._row(t) for t in self._frozen(waiting=False) if t.user_attrs.get("is_config")), None)

    @property
    def common_step(self) -> tuple[int, int]:
        """The last step at which all trials with a number have one, and how many those are: (0, 0) without any."""
        curves = [row.curve for row in self.rows if row.curve]
        return max(set.intersection(*map(set, curves)), default=0) if curves else 0, len(curves)

    def importance(self) -> dict[str, float]:
        """Each key's share of the variance of the score at `common_step`: what was stopped early counts as well.

        By fANOVA (Hutter et al. 2014). {} where there is too little to tell.
        """
        step, _ = self.common_step
        rows = [trial for trial in self._frozen() if step in _finite(trial.intermediate_values)]
        if len({trial.intermediate_values[step] for trial in rows}) < 2 or len(rows) < FEWEST_TO_WEIGH:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alike = optuna.create_study(direction=self.study.direction)
            for trial in rows:
                value = trial.intermediate_values[step]
                alike.add_trial(
                    optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)
                )
            shares = optuna.importance.get_param_importances(
                alike, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
        return {key: round(float(share), 4) for key, share in shares.items()}

    def _row(self, trial: FrozenTrial) -> Row:
        noted, curve = trial.user_attrs, _finite(trial.intermediate_values)
        at_step, value = self._best_of(curve) if curve else (None, None)
        return Row(
            number=trial.number,
            state=STATES[trial.state],
            values=self.space.values(trial.params),
            value=value,
            at_step=at_step,
            steps=noted.get("steps", max(curve, default=0)),
            whole_steps=noted.get("whole_steps", 0),
            seconds=noted.get("seconds", 0.0),
            reason=noted.get("reason", ""),
            curve=curve,
        )

    def _best_of(self, curve: dict[int, float]) -> tuple[int, float]:
        return max(curve.items(), key=lambda point: self.terms.sign * point[1])

    def _frozen(self, *, waiting: bool = True) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False)
        return trials if waiting else [trial for trial in trials if trial.state != TrialState.WAITING]


def _sampler(settings: Tune, number: int) -> BaseSampler:
    """One for each trial, so that what is drawn does not depend on how often the driver was started."""
    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    if settings.searcher == "optuna":
        return TPESampler(seed=seed, constant_liar=True, n_startup_trials=max(5, (settings.trials or TRIALS) // 4))
    return RandomSampler(seed=seed)


def _pruner(settings: Tune, terms: Terms) -> BasePruner:
    if settings.scheduler == "asha":
        return SuccessiveHalvingPruner(terms.grace_steps, settings.reduction_factor)
    if settings.scheduler == "median":
        return MedianPruner(n_startup_trials=MEDIAN_OF, n_warmup_steps=terms.grace_steps)
    return NopPruner()


def _refuse_another(config: Config, study: optuna.Study, described: dict[str, Any]) -> None:
    then = study.user_attrs.get("sweep")
    if then is None:
        study.set_user_attr("sweep", described)
        return
    keys = sorted(key for key in then.keys() | described.keys() if then.get(key) != described.get(key))
    if keys:
        listed = ", ".join(f"{key} (then {then.get(key)!r}, now {described.get(key)!r})" for key in keys)
        raise ConfigError(
            f"{config.run_dir / 'tune'} holds a sweep that differs in {listed}; name another run with "
            "storage.run=NAME, or delete that folder"
        )


def _finite(curve: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in sorted(curve.items()) if math.isfinite(value)}
