"""A sweep, from its first trial or from where it was left, to what it leaves under `<run>/tune`.

best.yaml            the config with the best trial's values, as `train.py --config` takes it; its run is `<run>-best`
trials.csv           a line a trial: how it ended, its metric, its steps, its values, and why it failed
*.png                parallel coordinates, importance of each key, learning curves
metrics.jsonl        and the others of logging.trackers: a row a trial, in order of their numbers

The result says what stopping early saved: `steps` that all trials took, and `whole_steps` of all to their end.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.core.cluster import connected_cluster
from pipeline.core.console import Stage, log, table
from pipeline.core.files import remove_folder, replacing, write_atomically
from pipeline.core.outcome import JobError, Result
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.manifest import Manifest
from pipeline.training.assembly import Task
from pipeline.training.checkpoints import best_checkpoint
from pipeline.training.history import VALIDATION
from pipeline.training.study import Row, SweepStudy, fanova
from pipeline.training.trackers import Trackers
from pipeline.training.trial import Criterion, TrialContext, slots, trial_config


def sweep(config: Config, folder: StoragePath, manifest: Manifest, progress: Callable[[], Progress]) -> Result:
    """Run the trials that are left, and report on all. `progress` starts Ray, which a finished sweep does without."""
    draft = trial_config(config, Criterion("", "max", 1, 1), 0, {})  # the budget is that of the config's own values
    criterion = Criterion.of(config, Task.of(draft, folder, manifest).total_steps)
    with SweepStudy.open(config, criterion, manifest.fingerprint) as study:
        remaining = study.remaining
        if remaining > 0:
            progress()
            _run(study, config, folder, manifest)
        else:
            log.info("tune: nothing to do, all %d trials have ended", study.goal - remaining)
        remove_checkpoints(config, study)
        return report(config, study, track=remaining > 0)


def _run(study: SweepStudy, config: Config, folder: StoragePath, manifest: Manifest) -> None:
    from pipeline.training.tuner import run_trials

    wanted, criterion, remaining = config.tune.max_concurrent_trials, study.criterion, study.remaining
    room = slots(
        config.scaling,
        config.training.strategy,
        connected_cluster().with_labels(config.scaling.labels.train).capacity(),
        remaining if wanted == "auto" else min(remaining, wanted),
    )
    log.info(
        "tune: %d of %d trials are left, %d at the same time, of %d workers %s; a whole one takes %s steps%s",
        remaining,
        study.goal,
        room.trials,
        room.workers,
        "in the trial's own process" if room.in_process else "beside it",
        f"{criterion.total_steps:,}",
        "" if config.tune.scheduler == "none" else f", each at least {criterion.grace_steps:,}",
    )
    with Stage("tune", study.goal, "trials", study.goal - remaining) as stage:

        def on_end(row: Row) -> None:
            log.info("%s", describe(row, study))
            remove_checkpoints(config, study, spared=row.number)
            stage.advance(1)

        run_trials(study, TrialContext(config, criterion, room, folder, manifest), on_end)


def describe(row: Row, study: SweepStudy) -> str:
    """A trial that has ended, as a line of the log."""
    value = "" if row.value is None else f": {study.criterion.metric} {row.value:.4f} at step {row.at_step:,}"
    values = ", ".join(f"{key}={_shown(value)}" for key, value in row.values.items())
    reason = f" ({row.reason})" if row.reason else ""
    return f"tune: trial {row.number} {row.state} after {row.steps:,} steps{value}{reason}; {values}"


def remove_checkpoints(config: Config, study: SweepStudy, spared: int | None = None) -> None:
    """Those of trials that have ended, all but the best one's best model. Trial `spared` keeps its own for now."""
    best = study.best
    for row in study.rows:
        if row.number != spared and row.state != "under way":
            folder = _trial_folder(config, row.number)
            for attempt in folder.glob("attempt-*"):
                if row != best or (folder / "best").is_dir():
                    remove_folder(attempt)
            if row != best:
                remove_folder(folder / "best")


def _trial_folder(config: Config, number: int) -> StoragePath:
    return config.run_dir / "tune" / "trials" / f"{number:04d}"


def report(config: Config, study: SweepStudy, *, track: bool) -> Result:
    """Write all of it; `track`: to the trackers too. Raises JobError, after the table, where all trials failed."""
    folder, rows, best = config.run_dir / "tune", study.rows, study.best
    write_atomically(folder / "trials.csv", _csv(rows, study.criterion.metric).encode())
    log.info("tune: the trials\n%s", _trial_table(rows, study))
    if best is None or best.value is None:
        reason, count = Counter(row.reason for row in rows).most_common(1)[0]
        raise JobError(
            f"all {len(rows)} trials failed, {count} of them because {reason}; {folder / 'trials.csv'} has every "
            "reason, and a new sweep needs another storage.run or an empty folder"
        )
    text = f"# The best of {len(rows)} trials: trial {best.number}, {study.criterion.metric} {best.value:.4f}\n"
    found = config.changed({**best.values, "storage.run": f"{config.storage.run}-best"}, "best.yaml")
    text += yaml.safe_dump(found.dump(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "best.yaml", text.encode())
    paths = {"best": str(folder / "best.yaml"), "trials": str(folder / "trials.csv")}
    if model := best_checkpoint(_trial_folder(config, best.number)):
        paths["model"] = str(model)
    paths |= _draw(study, folder)
    if track:
        _track(config, study)
    return Result(_metrics(study, rows, best), paths)


def _metrics(study: SweepStudy, rows: list[Row], best: Row) -> dict[str, Any]:
    own, states = study.config_row, Counter(row.state for row in rows)
    steps, whole_steps = sum(row.steps for row in rows), sum(row.whole_steps for row in rows)
    compared = ""
    if own and own.value is not None:
        compared = f"; the config as it is, {own.state}, has {own.value:.4f} at step {own.at_step:,}"
    log.info(
        "tune: trial %d is best, %s %.4f at step %s%s; %s steps were taken, %.0f%% of the %s of all to their end",
        best.number,
        study.criterion.metric,
        best.value,
        f"{best.at_step:,}",
        compared,
        f"{steps:,}",
        100 * steps / max(whole_steps, 1),
        f"{whole_steps:,}",
    )
    return {
        "trials": len(rows),
        "done": states["done"],
        "stopped_early": states["stopped early"],
        "failed": states["failed"],
        "metric": study.criterion.metric,
        "best": _found(best),
        "config": _found(own) if own else None,
        "steps": steps,
        "whole_steps": whole_steps,
        "importance": study.importance(),
    }


def _found(row: Row) -> dict[str, Any]:
    return {"trial": row.number, "state": row.state, "value": row.value, "step": row.at_step, "values": row.values}


def _trial_table(rows: list[Row], study: SweepStudy) -> str:
    """The best first; failed ones last, with their reasons."""
    sign, keys = study.criterion.sign, study.space.dimensions
    ranked = sorted(rows, key=lambda row: (row.value is None, row.state != "done", -sign * (row.value or 0)))
    header = ["trial", "state", study.criterion.metric, "steps", *(key.rpartition(".")[2] for key in keys)]
    lines = [
        [row.number, row.state, "–" if row.value is None else f"{row.value:.4f}", row.steps]
        + [_shown(row.values[key]) for key in keys]
        for row in ranked
    ]
    return "\n".join([table(lines, header), *(f"trial {row.number}: {row.reason}" for row in ranked if row.reason)])


def _csv(rows: list[Row], metric: str) -> str:
    lines = [
        {"trial": row.number, "state": row.state, metric: row.value, "at_step": row.at_step, "steps": row.steps}
        | {"whole_steps": row.whole_steps, "seconds": row.seconds, **row.values, "reason": row.reason}
        for row in rows
    ]
    writer = csv.DictWriter(text := io.StringIO(), list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _draw(study: SweepStudy, folder: StoragePath) -> dict[str, str]:
    """Optuna's pictures, as far as there is something to show: name → path. Trials without a validation are in none."""
    import matplotlib
    from optuna.visualization import matplotlib as pictures

    metric, step = study.criterion.metric, study.common_step
    best = {row.number: row.value for row in study.rows if row.value is not None}
    drawn: dict[str, Any] = {}
    paths = {}
    with warnings.catch_warnings(action="ignore"), matplotlib.rc_context({"backend": "agg", "figure.figsize": (9, 5)}):
        drawn["coordinates"] = pictures.plot_parallel_coordinate(study.view(best), target_name=metric)
        drawn["coordinates"].set_title(f"{len(best)} trials by their best {metric}, those stopped early among them")
        drawn["curves"] = pictures.plot_intermediate_values(study.view(best))
        drawn["curves"].set(title=f"{metric} by step", ylabel=metric)
        if study.importance():
            view = study.view(study.values_at(step))
            drawn["importance"] = pictures.plot_param_importances(view, evaluator=fanova(), target_name=metric)
            drawn["importance"].set_title(f"Share of the variance of {metric} at step {step:,}, by fANOVA", loc="left")
        for name, axes in drawn.items():
            with replacing(folder / f"{name}.png") as temporary:
                axes.figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
            matplotlib.pyplot.close(axes.figure)
            paths[name] = str(folder / f"{name}.png")
    return paths


def _track(config: Config, study: SweepStudy) -> None:
    """A row a trial: its metric, the best so far, its steps and its numbers. Trials have trackers of their own too."""
    own = config.changed({"storage.run": f"{config.storage.run}/tune"}, "the sweep")
    best, sign = None, study.criterion.sign
    with Trackers.open(own, 0) as trackers:
        for row in study.rows:
            if row.value is not None:
                best = row.value if best is None else sign * max(sign * best, sign * row.value)
                numbers = {k: float(v) for k, v in row.values.items() if isinstance(v, int | float)}
                key = f"{VALIDATION}{study.criterion.metric}"
                found = {key: row.value, f"{VALIDATION}best": best, "steps": row.steps}
                trackers.log({"step": row.number + 1, **found, **numbers})


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
