"""Ray Tune drives a sweep's trials: it places them, restarts what a lost node took, and asks the sweep for the rest.

    drive(sweep, errand, done)          # every trial that is left; `done` is called with each as it ends

What to try and what to stop are the sweep's own (sweep.py); Tune's searcher and scheduler are here its messengers. So a
start of the driver is a new experiment to Tune, whose folder, `<run>/tune/ray`, is dropped at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.storage.arrow import arrow_location
from pipeline.storage.files import remove_folder
from pipeline.tuning.sweep import Row, Sweep
from pipeline.tuning.trial import Errand, run_trial

Done = Callable[[Row], None]


class _Suggestions(Searcher):
    """The sweep's next trial, and back to it how each ended."""

    def __init__(self, sweep: Sweep, done: Done) -> None:
        super().__init__()
        self.sweep, self.done = sweep, done
        self.numbers: dict[str, int] = {}
        self.deaths: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        candidate = self.sweep.next()
        if candidate is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = candidate.number
        return {"number": candidate.number, "values": json.dumps(candidate.values)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number, last = self.numbers.pop(trial_id), result or {}
        failed = self.deaths.get(trial_id, "its process died") if error else last.get("failed", "")
        row = self.sweep.finish(
            number, last.get("step", 0), last.get("whole_steps", 0), last.get("seconds", 0.0), failed
        )
        self.done(row)

    def save(self, checkpoint_path: str) -> None:
        """The sweep's journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it was given, for a restore that is not made use of


class _Decisions(FIFOScheduler):
    """The sweep's verdict on each validation."""

    def __init__(self, suggestions: _Suggestions) -> None:
        super().__init__()
        self.suggestions = suggestions

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        sweep, number = self.suggestions.sweep, trial.config["number"]
        if "value" in result and sweep.report(number, result["step"], result["value"], last=result["last"]):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        self.suggestions.deaths[trial.trial_id] = f"its process died: {lines[-1] if lines else 'Ray gives no reason'}"


def drive(sweep: Sweep, errand: Errand, done: Done) -> None:
    """Run all trials that are left, side by side as far as the errand's slots go."""
    config, slots = errand.config, errand.slots
    folder = config.run_dir / "tune" / "ray"
    remove_folder(folder)
    suggestions = _Suggestions(sweep, done)
    reserved = {"CPU": slots.cpus, "GPU": slots.gpus} if slots.in_process else {"memory": 1}  # Tune takes no nothing
    room = tune.PlacementGroupFactory([reserved], bundle_label_selector=[config.scaling.labels.train])
    storage_path, filesystem = arrow_location(folder)
    trainable = tune.with_resources(tune.with_parameters(run_trial, errand=errand), room)
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=suggestions,
            scheduler=_Decisions(suggestions),
            num_samples=sweep.goal - sweep.done,
            max_concurrent_trials=slots.trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            verbose=0,
        ),
    ).fit()
    remove_folder(folder)
