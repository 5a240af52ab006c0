"""Run or resume a hyperparameter sweep, and write its results to `<run>/tune`.

best.yaml            the config with the best trial's values, for `train.py --config`; its run is `<run>-best`
trials.csv           one row per trial: how it ended, its metric, steps, values, why it failed, and what it copied
*.png                parallel coordinates, importance of each key, learning curves
metrics.jsonl        one row per trial, by number; the other logging.trackers get the same rows

The result shows what early stopping saved: `steps` is the number of steps taken by all trials, `whole_steps` the number
they would have taken without stopping.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.core.cluster import connected_cluster
from pipeline.core.console import Stage, log, log_lines, table
from pipeline.core.escaping import printable
from pipeline.core.files import remove_folder, replacing, write_atomically
from pipeline.core.outcome import JobError, Result
from pipeline.core.path import StoragePath
from pipeline.core.session import Progress
from pipeline.data.manifest import Manifest
from pipeline.training.assembly import RunSpec
from pipeline.training.checkpoints import best_checkpoint
from pipeline.training.history import VALIDATION
from pipeline.training.study import SweepStudy, TrialRow, fanova, shown, shown_value
from pipeline.training.trackers import Trackers
from pipeline.training.trial import Criterion, TrialContext, plan_slots, trial_config


def sweep(config: Config, folder: StoragePath, manifest: Manifest, progress: Callable[[], Progress]) -> Result:
    """Run the remaining trials and report on all. `progress` starts Ray, if there are any."""
    draft = trial_config(config, Criterion("", "max", 1, 1), 0, {})  # the config's own values set the budget
    criterion = Criterion.of(config, RunSpec.of(draft, folder, manifest).total_steps)
    with SweepStudy.open(config, criterion, manifest.fingerprint) as study:
        remaining = study.remaining
        if remaining > 0:
            progress()
            _run(study, config, folder, manifest)
        else:
            log.info("tune: nothing to do, all %d trials have finished", study.goal - remaining)
        remove_checkpoints(config, study)
        return report(config, study, track=remaining > 0)


def _run(study: SweepStudy, config: Config, folder: StoragePath, manifest: Manifest) -> None:
    from pipeline.training.tuner import run_trials

    limit, criterion, remaining = config.tune.max_concurrent_trials, study.criterion, study.remaining
    trial_slots = plan_slots(
        config.scaling,
        config.training.strategy,
        connected_cluster().with_labels(config.scaling.labels.train).capacity(),
        remaining if limit == "auto" else min(remaining, limit),
    )
    every = f"{criterion.grace_steps:,}"
    comparison = {"none": "", "pbt": f", the worst copy the best every {every}"}.get(
        config.tune.scheduler, f", a stopped one at least {every}"
    )
    log.info(
        "tune: running %d of %d trials, %d at a time, with %d workers each%s; a full trial takes %s steps%s",
        remaining,
        study.goal,
        trial_slots.trials,
        trial_slots.workers,
        " (in the trial's own process)" if trial_slots.in_process else "",
        f"{criterion.total_steps:,}",
        comparison,
    )
    with Stage("tune", study.goal, "trials", study.goal - remaining) as stage:

        def on_end(row: TrialRow) -> None:
            log.info("%s", describe(row, study))
            remove_checkpoints(config, study, spared=row.number)
            stage.advance(1)

        run_trials(study, TrialContext(config, criterion, trial_slots, folder, manifest), on_end)


def describe(row: TrialRow, study: SweepStudy) -> str:
    """A log line about a trial that has ended."""
    value = "" if row.value is None else f": {study.criterion.metric} {row.value:.4f} at step {row.at_step:,}"
    reason = f" ({row.reason})" if row.reason else ""
    return f"tune: trial {row.number} {row.state} after {row.steps:,} steps{value}{reason}; {shown(row.values)}"


def remove_checkpoints(config: Config, study: SweepStudy, spared: int | None = None) -> None:
    """Delete the checkpoints of ended trials, except the best trial's best model. Skips trial `spared`."""
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
    """Write the sweep's files, and with `track` its tracker rows. Raises JobError if all trials failed."""
    folder, rows, best = config.run_dir / "tune", study.rows, study.best
    write_atomically(folder / "trials.csv", _csv(rows, study.criterion.metric).encode())
    log_lines(f"tune: the trials\n{_trial_table(rows, study)}")
    if best is None or best.value is None:
        reason, count = Counter(row.reason for row in rows).most_common(1)[0]
        raise JobError(
            f"all {len(rows)} trials failed, {count} of them because {reason}; {folder / 'trials.csv'} has all "
            "reasons; to start a new sweep, use another storage.run or delete that folder"
        )
    text = f"# The best of {len(rows)} trials: trial {best.number}, {study.criterion.metric} {best.value:.4f}\n"
    if best.copies:
        text += "# With pbt, the values that its weights were trained with, step by step:\n"
        text += "".join(
            f"#   after step {each.step:,}, in trial {each.trial}: {shown(each.values)}\n"
            for each in study.history(best)
        )
    best_config = config.changed({**best.values, "storage.run": f"{config.storage.run}-best"}, "best.yaml")
    text += yaml.safe_dump(best_config.dump(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "best.yaml", text.encode())
    paths = {"best": str(folder / "best.yaml"), "trials": str(folder / "trials.csv")}
    if model := best_checkpoint(_trial_folder(config, best.number)):
        paths["model"] = str(model)
    paths |= _draw(study, folder)
    if track:
        _track(config, study)
    return Result(_metrics(study, rows, best), paths)


def _metrics(study: SweepStudy, rows: list[TrialRow], best: TrialRow) -> dict[str, Any]:
    baseline, states = study.config_row, Counter(row.state for row in rows)
    steps, whole_steps = sum(row.steps for row in rows), sum(row.whole_steps for row in rows)
    comparison = ""
    if baseline and baseline.value is not None:
        comparison = f"; the unchanged config ({baseline.state}): {baseline.value:.4f} at step {baseline.at_step:,}"
    log.info(
        "tune: the best is trial %d, %s %.4f at step %s%s; the sweep took %s steps, %.0f%% of %s without stopping",
        best.number,
        study.criterion.metric,
        best.value,
        f"{best.at_step:,}",
        comparison,
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
        "best": _summary(best),
        "config": _summary(baseline) if baseline else None,
        "steps": steps,
        "whole_steps": whole_steps,
        "importance": study.importance(),
        **_lineage(study, rows, best),
    }


def _lineage(study: SweepStudy, rows: list[TrialRow], best: TrialRow) -> dict[str, Any]:
    """With pbt: which trial copied which, after which step, and how the best weights came about."""
    copies = [asdict(copy) for row in rows for copy in row.copies]
    return {"copies": copies, "history": [asdict(each) for each in study.history(best)]} if copies else {}


def _summary(row: TrialRow) -> dict[str, Any]:
    return {"trial": row.number, "state": row.state, "value": row.value, "step": row.at_step, "values": row.values}


def _trial_table(rows: list[TrialRow], study: SweepStudy) -> str:
    """The best trial first; failed ones last, with their reasons."""
    sign, keys = study.criterion.sign, study.space.dimensions
    ranked = sorted(rows, key=lambda row: (row.value is None, row.state != "done", -sign * (row.value or 0)))
    header = ["trial", "state", study.criterion.metric, "steps", *(key.rpartition(".")[2] for key in keys)]
    lines = [
        [row.number, row.state, "–" if row.value is None else f"{row.value:.4f}", row.steps]
        + [shown_value(row.values[key]) for key in keys]
        for row in ranked
    ]
    notes = [f"trial {row.number}: {note}" for row in ranked for note in (row.reason, _copies(row)) if note]
    return "\n".join([table(lines, header), *map(printable, notes)])


def _copies(row: TrialRow) -> str:
    return "; ".join(f"copied trial {copy.copied} at step {copy.step}" for copy in row.copies)


def _csv(rows: list[TrialRow], metric: str) -> str:
    lines = [
        {"trial": row.number, "state": row.state, metric: row.value, "at_step": row.at_step, "steps": row.steps}
        | {"whole_steps": row.whole_steps, "seconds": row.seconds, **row.values, "reason": row.reason}
        | ({"copies": _copies(row)} if any(each.copies for each in rows) else {})
        for row in rows
    ]
    writer = csv.DictWriter(text := io.StringIO(), list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _draw(study: SweepStudy, folder: StoragePath) -> dict[str, str]:
    """Draw Optuna's plots of the trials that have a validation. Returns name → path."""
    import matplotlib
    from optuna.visualization import matplotlib as pictures

    metric, step = study.criterion.metric, study.common_step
    count = sum(row.value is not None for row in study.rows)
    drawn: dict[str, Any] = {}
    paths = {}
    with warnings.catch_warnings(action="ignore"), matplotlib.rc_context({"backend": "agg", "figure.figsize": (9, 5)}):
        drawn["coordinates"] = pictures.plot_parallel_coordinate(study.view(), target_name=metric)
        drawn["coordinates"].set_title(f"{count} trials by best {metric}, including those stopped early")
        drawn["curves"] = pictures.plot_intermediate_values(study.view())
        drawn["curves"].set(title=f"{metric} by step", ylabel=metric)
        if study.importance():
            view = study.view(step)
            drawn["importance"] = pictures.plot_param_importances(view, evaluator=fanova(), target_name=metric)
            drawn["importance"].set_title(f"Share of the variance of {metric} at step {step:,}, by fANOVA", loc="left")
        for name, axes in drawn.items():
            with replacing(folder / f"{name}.png") as temporary:
                axes.figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
            matplotlib.pyplot.close(axes.figure)
            paths[name] = str(folder / f"{name}.png")
    return paths


def _track(config: Config, study: SweepStudy) -> None:
    """Log one row per trial to the trackers: its metric, the best so far, its steps and its numeric values."""
    sweep_config = config.changed({"storage.run": f"{config.storage.run}/tune"}, "the sweep")
    best, sign = None, study.criterion.sign
    with Trackers.open(sweep_config, 0) as trackers:
        for row in study.rows:
            if row.value is not None:
                best = row.value if best is None else sign * max(sign * best, sign * row.value)
                numbers = {k: float(v) for k, v in row.values.items() if isinstance(v, int | float)}
                key = f"{VALIDATION}{study.criterion.metric}"
                metrics = {key: row.value, f"{VALIDATION}best": best, "steps": row.steps}
                trackers.log({"step": row.number + 1, **metrics, **numbers})
