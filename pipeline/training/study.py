"""A sweep's Optuna study in a journal: which trials there are, how each went, and which are left to run.

    with SweepStudy.open(config, criterion) as study:
        study.remaining                        # 16
        study.rows                             # [Row(number=0, state="stopped early", value=0.71, …), …]
        study.best                             # the row with the best metric

A trial has a number, which names its folder. Optuna sees attempts: a trial that was under way when a driver was killed
is queued again, as another attempt at the same number with the same values. The last event of an attempt is how it
ended, and a trial whose newest attempt has that event never runs again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import RandomSampler
from optuna.storages.journal import BaseJournalBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.config import Config, ConfigError
from pipeline.core.mirror import Mirror
from pipeline.core.path import StoragePath
from pipeline.training.run_folder import fixed_keys
from pipeline.training.space import Space
from pipeline.training.trial import Criterion

STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
}
NAME = "sweep"
TRIALS = 16
FEWEST_TO_WEIGH = 4  # trials from which importance is told. Ours


class Journal(BaseJournalBackend):
    """journal.jsonl, a line an event, on disk or in a bucket. An event costs an fsync, in a bucket the file's upload.

    One driver writes it, alone in its folder, so it needs no lock file as Optuna's own JournalFileBackend has, which a
    kill leaves behind. It cuts off half a last line, which would break that backend for good.
    """

    NAME = "journal.jsonl"

    def __init__(self, folder: StoragePath) -> None:
        self.mirror = Mirror(folder, [self.NAME])
        self.path = self.mirror.folder / self.NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        self.events: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self.events[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(event) + "\n" for event in logs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.events += [json.loads(line) for line in text.splitlines()]  # as they are read back, tuples being lists
        self.mirror.send()


@dataclass(frozen=True)
class Row:
    """A trial as it stands. `value` is its best validation's, at `at_step`; `curve` has all of them, by step."""

    number: int
    state: str
    values: dict[str, Any]
    curve: dict[int, float]
    value: float | None
    at_step: int | None
    steps: int = 0
    whole_steps: int = 0
    """What it would have taken to its end; what it took, where it failed."""
    seconds: float = 0.0
    reason: str = ""


class SweepStudy:
    def __init__(self, config: Config, criterion: Criterion, storage: JournalStorage) -> None:
        self.settings, self.criterion, self.storage = config.tune, criterion, storage
        self.space = Space.of(config)
        self.own = self.space.point(config)
        self.study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction="minimize" if criterion.mode == "min" else "maximize",
            load_if_exists=True,
        )
        searcher, trials = self.settings.searcher, self.settings.trials
        self.goal = trials or TRIALS
        self.points = [self.own] if self.own else []
        """Trials whose values are known beforehand, by number: a grid's; else the config as it is, and random ones."""
        if searcher == "grid":
            self.points = list(self.space.grid())
            self.goal = min(trials or len(self.points), len(self.points))
        if searcher == "random":
            draws = optuna.create_study(sampler=RandomSampler(seed=self.settings.seed))
            count = self.goal - len(self.points)
            self.points += [draws.ask(self.space.distributions).params for _ in range(count)]

    @classmethod
    @contextmanager
    def open(cls, config: Config, criterion: Criterion, data_fingerprint: str = "") -> Iterator[SweepStudy]:
        """The sweep of the config's run, new or as it was left. Raises ConfigError where its folder holds another."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = Journal(config.run_dir / "tune")
        try:
            study = cls(config, criterion, JournalStorage(journal))
            study._refuse_another(config, data_fingerprint)
            study._queue_again()
            yield study
        finally:
            journal.mirror.close()

    def _refuse_another(self, config: Config, data_fingerprint: str) -> None:
        """What may not change while a sweep goes on; more trials may come."""
        wanted = config.tune.model_dump(mode="json", exclude={"trials", "max_concurrent_trials", "space"})
        dimensions = {key: each.model_dump(exclude_none=True) for key, each in self.space.dimensions.items()}
        described = {
            **{f"tune.{key}": value for key, value in wanted.items()},
            **{f"tune.space.{key}": value for key, value in dimensions.items()},
            **fixed_keys(config),
            "data (the prepared data)": data_fingerprint,
        }
        now = json.loads(json.dumps(described))
        then = self.study.user_attrs.get("sweep")
        if then is None:
            self.study.set_user_attr("sweep", now)
            return
        keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        if keys:
            listed = ", ".join(f"{key} (then {then.get(key)!r}, now {now.get(key)!r})" for key in keys)
            raise ConfigError(
                f"{config.run_dir / 'tune'} holds a sweep that differs in {listed}; name another run with "
                "storage.run=NAME, or delete that folder"
            )

    def _queue_again(self) -> None:
        """Queue another attempt at each trial that was under way when a driver was killed."""
        newest = self._newest
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            number = trial.user_attrs.get("number")
            if number is not None and newest[number].number == trial.number:
                self._queue(number, trial.params)
            self.study.tell(trial.number, state=TrialState.FAIL)

    def queue_next(self) -> int:
        """The number of the next new trial, which is queued if its values are known beforehand and none waits."""
        trials = self._newest
        number = max(trials, default=-1) + 1
        if number < len(self.points) and all(trial.state != TrialState.WAITING for trial in trials.values()):
            self._queue(number, self.points[number])
        return number

    def _queue(self, number: int, point: dict[str, Any]) -> None:
        space, attributes = self.space.distributions, {"number": number}
        attempt = create_trial(state=TrialState.WAITING, params=point, distributions=space, user_attrs=attributes)
        self.study.add_trial(attempt)

    @property
    def remaining(self) -> int:
        return self.goal - sum(trial.state.is_finished() for trial in self._newest.values())

    @property
    def rows(self) -> list[Row]:
        """Every trial that was begun, by number."""
        trials = sorted(self._newest.items())
        return [self._row(number, trial) for number, trial in trials if trial.state != TrialState.WAITING]

    @property
    def best(self) -> Row | None:
        """The best of those that went to their end, else of those stopped early; None where all failed."""
        for state in ("done", "stopped early"):
            rows = [row for row in self.rows if row.state == state and row.value is not None]
            if rows:
                return max(rows, key=lambda row: self.criterion.sign * (row.value or 0.0))
        return None

    @property
    def config_row(self) -> Row | None:
        """The trial that is the config as it is."""
        own = self.space.values(self.own) if self.own else None
        return next((row for row in self.rows if row.values == own), None)

    @property
    def common_step(self) -> int:
        """The last step at which all trials with a validation have one; 0 without any."""
        curves = [set(row.curve) for row in self.rows if row.curve]
        return max(set.intersection(*curves), default=0) if curves else 0

    def importance(self) -> dict[str, float]:
        """Each key's share of the variance of the metric at `common_step`: what was stopped early counts as well.

        By fANOVA (Hutter et al. 2014). {} where there is too little to tell.
        """
        values = self.values_at(self.common_step)
        if len(values) < FEWEST_TO_WEIGH or len(set(values.values())) < 2:
            return {}
        shares = get_param_importances(self.view(values), evaluator=fanova())
        return {key: round(float(share), 4) for key, share in shares.items()}

    def values_at(self, step: int) -> dict[int, float]:
        return {row.number: row.curve[step] for row in self.rows if step in row.curve}

    def view(self, values: Mapping[int, float]) -> optuna.Study:
        """The trials as a study in memory under their own numbers; those with one of the `values` count as complete."""
        view = optuna.create_study(direction=self.study.direction)
        for row in self.rows:
            trial = self._newest[row.number]
            view.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if row.number in values else TrialState.FAIL,
                    value=values.get(row.number),
                    params=trial.params,
                    distributions=trial.distributions,
                    intermediate_values=row.curve,
                )
            )
        return view

    @property
    def _newest(self) -> dict[int, FrozenTrial]:
        """The newest attempt at each trial."""
        trials = self.study.get_trials(deepcopy=False)
        return {trial.user_attrs["number"]: trial for trial in trials if "number" in trial.user_attrs}

    def row(self, number: int) -> Row:
        return self._row(number, self._newest[number])

    def _row(self, number: int, trial: FrozenTrial) -> Row:
        curve = {step: value for step, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)}
        best = max(curve.items(), key=lambda point: self.criterion.sign * point[1], default=(None, None))
        state, values = STATES[trial.state], self.space.values(trial.params)
        return Row(number, state, values, curve, best[1], best[0], **trial.user_attrs.get("ended", {}))


def fanova() -> FanovaImportanceEvaluator:
    return FanovaImportanceEvaluator(seed=0)
