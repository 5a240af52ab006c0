"""A sweep's Optuna study, stored in a journal: its trials, their results, and the ones that remain.

    with SweepStudy.open(config, criterion) as study:
        study.remaining                        # 16
        study.rows                             # [TrialRow(number=0, state="stopped early", value=0.71, …), …]
        study.best                             # the row with the best metric

A trial has a number, which names its folder. An Optuna trial is an attempt: if the driver is killed while a trial runs,
the trial is queued again as another attempt with the same number and values. A trial whose newest attempt has ended
never runs again.
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
DEFAULT_TRIALS = 16
MIN_TRIALS_FOR_IMPORTANCE = 4  # trials needed to estimate importance. Ours


class Journal(BaseJournalBackend):
    """journal.jsonl, one event per line, on disk or in a bucket. Each event costs an fsync; in a bucket, an upload.

    The driver has locked the run's folder, so there is no need for the lock file of Optuna's JournalFileBackend, which
    a killed process leaves behind. An incomplete last line is cut off; that backend would fail on it for good.
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
        self.events += [json.loads(line) for line in text.splitlines()]  # as read from the file: tuples become lists
        self.mirror.send()


@dataclass(frozen=True)
class Segment:
    """The values that a trial trained with after `step`. With pbt, it copied the weights of trial `copied` there."""

    step: int
    trial: int
    values: dict[str, Any]
    copied: int | None = None


@dataclass(frozen=True)
class TrialRow:
    """The state of a trial. `curve` has the metric of each validation by step; `value` is the best, at `at_step`."""

    number: int
    state: str
    segments: tuple[Segment, ...]
    curve: dict[int, float]
    value: float | None
    at_step: int | None
    steps: int = 0
    whole_steps: int = 0
    """Steps to its end, had it not been stopped; if it failed, the steps it took."""
    seconds: float = 0.0
    reason: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The values of the best validation, or those that it started with."""
        return self.segment(self.at_step or 0).values

    @property
    def copies(self) -> tuple[Segment, ...]:
        return self.segments[1:]

    def segment(self, step: int) -> Segment:
        """What the trial trained with up to `step`."""
        return next((each for each in reversed(self.segments) if each.step < step), self.segments[0])


class SweepStudy:
    """The Optuna study of one sweep. Use `open`."""

    def __init__(self, config: Config, criterion: Criterion, storage: JournalStorage) -> None:
        self.settings, self.criterion, self.storage = config.tune, criterion, storage
        self.space = Space.of(config)
        self.config_point = self.space.point(config)
        self.study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction="minimize" if criterion.mode == "min" else "maximize",
            load_if_exists=True,
        )
        searcher, trials = self.settings.searcher, self.settings.trials
        self.goal = trials or DEFAULT_TRIALS
        self.points = [self.config_point] if self.config_point else []
        """Values of the first trials, by number: the grid's; or the config's own, then random ones unless TPE draws."""
        if searcher == "grid":
            self.points = list(self.space.grid())
            self.goal = min(trials or len(self.points), len(self.points))
        elif searcher == "random" or self.settings.scheduler == "pbt":
            draws = optuna.create_study(sampler=RandomSampler(seed=self.settings.seed))
            count = self.goal - len(self.points)
            self.points += [draws.ask(self.space.distributions).params for _ in range(count)]

    @classmethod
    @contextmanager
    def open(cls, config: Config, criterion: Criterion, data_fingerprint: str = "") -> Iterator[SweepStudy]:
        """Start or resume the sweep of the config's run. Raises ConfigError if its folder holds another sweep."""
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
        """Raise ConfigError if a setting differs from the earlier start. The number of trials may grow."""
        settings = config.tune.model_dump(mode="json", exclude={"trials", "max_concurrent_trials", "space"})
        dimensions = {key: each.model_dump(exclude_none=True) for key, each in self.space.dimensions.items()}
        described = {
            **{f"tune.{key}": value for key, value in settings.items()},
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
                f"{config.run_dir / 'tune'} holds a sweep that differs in {listed}; use another run with "
                "storage.run=NAME, or delete that folder"
            )

    def _queue_again(self) -> None:
        """Queue another attempt at each trial that was running when the driver was killed."""
        newest = self._newest
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            number = trial.user_attrs.get("number")
            if number is not None and newest[number].number == trial.number:
                self._queue(number, trial.params)
            self.study.tell(trial.number, state=TrialState.FAIL)

    def queue_next(self) -> int:
        """Return the next new trial's number. If its values are in `points` and no trial is queued, queue it."""
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
    def rows(self) -> list[TrialRow]:
        """Every trial that was started, by number."""
        trials = sorted(self._newest.items())
        return [self._row(number, trial) for number, trial in trials if trial.state != TrialState.WAITING]

    @property
    def best(self) -> TrialRow | None:
        """The best trial that ran to its end, or else the best stopped early; None if all failed."""
        for state in ("done", "stopped early"):
            rows = [row for row in self.rows if row.state == state and row.value is not None]
            if rows:
                return max(rows, key=lambda row: self.criterion.sign * (row.value or 0.0))
        return None

    @property
    def config_row(self) -> TrialRow | None:
        """The trial with the config's own values."""
        values = self.space.values(self.config_point) if self.config_point else None
        return next((row for row in self.rows if row.values == values), None)

    def history(self, row: TrialRow) -> list[Segment]:
        """The values by step that the best weights of a trial were trained with, by it and by those that it copied."""
        rows, segment = {each.number: each for each in self.rows}, row.segment(row.at_step or 0)
        history = [segment]
        while segment.copied is not None:
            segment = rows[segment.copied].segment(segment.step)
            history.append(segment)
        return history[::-1]

    @property
    def common_step(self) -> int:
        """The last step at which every trial that validated has a value, before any copies another; 0 if none."""
        rows = [row for row in self.rows if row.curve]
        until = min((copy.step for row in rows for copy in row.copies), default=math.inf)
        common = set.intersection(*(set(row.curve) for row in rows)) if rows else set()
        return max((step for step in common if step <= until), default=0)

    def importance(self) -> dict[str, float]:
        """Each key's share of the variance of the metric, by fANOVA (Hutter et al. 2014); {} with too few trials.

        It compares values at `common_step`, so trials that were stopped early count too.
        """
        values = [row.curve[self.common_step] for row in self.rows if self.common_step in row.curve]
        if len(values) < MIN_TRIALS_FOR_IMPORTANCE or len(set(values)) < 2:
            return {}
        shares = get_param_importances(self.view(self.common_step), evaluator=fanova())
        return {key: round(float(share), 4) for key, share in shares.items()}

    def view(self, step: int | None = None) -> optuna.Study:
        """An in-memory study of the trials under their own numbers, with the metric at `step`, or the best."""
        view = optuna.create_study(direction=self.study.direction)
        for row in self.rows:
            value = row.value if step is None else row.curve.get(step)
            values = row.values if step is None else row.segment(step).values
            view.add_trial(
                create_trial(
                    state=TrialState.FAIL if value is None else TrialState.COMPLETE,
                    value=value,
                    params=self.space.labels(values),
                    distributions=self.space.distributions,
                    intermediate_values=row.curve,
                )
            )
        return view

    @property
    def _newest(self) -> dict[int, FrozenTrial]:
        """The newest attempt at each trial."""
        trials = self.study.get_trials(deepcopy=False)
        return {trial.user_attrs["number"]: trial for trial in trials if "number" in trial.user_attrs}

    def row(self, number: int) -> TrialRow:
        return self._row(number, self._newest[number])

    def _row(self, number: int, trial: FrozenTrial) -> TrialRow:
        curve = {step: value for step, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)}
        best = max(curve.items(), key=lambda point: self.criterion.sign * point[1], default=(None, None))
        first, copies = Segment(0, number, self.space.values(trial.params)), trial.user_attrs.get("copies", [])
        segments = (first, *(Segment(**copy) for copy in copies))
        ended = trial.user_attrs.get("ended", {})
        return TrialRow(number, STATES[trial.state], segments, curve, best[1], best[0], **ended)


def shown(values: Mapping[str, Any]) -> str:
    """Values as a log line has them."""
    return ", ".join(f"{key}={shown_value(value)}" for key, value in values.items())


def shown_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def fanova() -> FanovaImportanceEvaluator:
    return FanovaImportanceEvaluator(seed=0)
