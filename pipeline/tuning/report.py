"""What a sweep leaves behind, under `<run>/tune`: best.yaml, trials.csv, pictures, and a summary in the trackers.

best.yaml            the config with the best trial's values, as `train.py --config` takes it; its run is `<run>-best`
trials.csv           a line a trial: how it ended, its metric, its steps, its values, and why it failed
*.png                parallel coordinates, importance of each key, learning curves
metrics.jsonl        and the others of logging.trackers: a row a trial, in order of their numbers

What stopping early saved stands in the result: `steps` taken by all trials, and `whole_steps` of all to their end.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.runtime.console import log, table
from pipeline.runtime.outcome import JobError, Result
from pipeline.storage.files import remove_folder, write_atomically
from pipeline.storage.path import StoragePath
from pipeline.training.checkpoints import best_checkpoint
from pipeline.training.tracking.tracker import VALIDATION
from pipeline.training.tracking.trackers import Trackers
from pipeline.tuning.pictures import draw_coordinates, draw_curves, draw_importance
from pipeline.tuning.sweep import Row, Sweep


def describe(row: Row, sweep: Sweep) -> str:
    """A trial that has ended, as a line of the log."""
    value = "" if row.value is None else f": {sweep.terms.metric} {row.value:.4f} at step {row.at_step:,}"
    values = ", ".join(f"{key}={_shown(value)}" for key, value in row.values.items())
    reason = f" ({row.reason})" if row.reason else ""
    return f"tune: trial {row.number} {row.state} after {row.steps:,} steps{value}{reason}; {values}"


def tidy(config: Config, sweep: Sweep, spared: int | None = None) -> None:
    """Drop the checkpoints of trials that have ended, all but the best one's best model. `spared` is left as it is."""
    best = sweep.best
    for row in sweep.rows:
        if row.number != spared and row.state != "under way":
            folder = trial_folder(config, row.number)
            for attempt in folder.glob("attempt-*"):
                if row != best or (folder / "best").is_dir():
                    remove_folder(attempt)
            if row != best:
                remove_folder(folder / "best")


def trial_folder(config: Config, number: int) -> StoragePath:
    return config.run_dir / "tune" / "trials" / f"{number:04d}"


def best_config(config: Config, values: dict[str, Any]) -> Config:
    """The config with a trial's values, and a run of its own."""
    return config.changed({**values, "storage.run": f"{config.storage.run}-best"}, "best.yaml")


def report(config: Config, sweep: Sweep, *, track: bool) -> Result:
    """Write all of it; `track`: to the trackers too. Raises JobError, beside the table, where all trials failed."""
    folder, rows, best = config.run_dir / "tune", sweep.rows, sweep.best
    write_atomically(folder / "trials.csv", _csv(rows, sweep).encode())
    log.info("tune: the trials\n%s", trial_table(rows, sweep))
    if best is None or best.value is None:
        reason, count = Counter(row.reason for row in rows).most_common(1)[0]
        raise JobError(
            f"all {len(rows)} trials failed, {count} of them because {reason}; {folder / 'trials.csv'} has every "
            "reason, and a new sweep needs another storage.run or an empty folder"
        )
    text = f"# The best of {len(rows)} trials: trial {best.number}, {sweep.terms.metric} {best.value:.4f}\n"
    text += yaml.safe_dump(best_config(config, best.values).dump(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "best.yaml", text.encode())
    paths = {"best": str(folder / "best.yaml"), "trials": str(folder / "trials.csv")}
    if model := best_checkpoint(trial_folder(config, best.number)):
        paths["model"] = str(model)
    for name, draw in (("coordinates", draw_coordinates), ("importance", draw_importance), ("curves", draw_curves)):
        if draw(sweep, folder / f"{name}.png"):
            paths[name] = str(folder / f"{name}.png")
    if track:
        _track(config, sweep)
    return Result(_metrics(sweep, rows, best), paths)


def _metrics(sweep: Sweep, rows: list[Row], best: Row) -> dict[str, Any]:
    own, states = sweep.config_row, Counter(row.state for row in rows)
    steps, whole_steps = sum(row.steps for row in rows), sum(row.whole_steps for row in rows)
    log.info(
        "tune: trial %d is best, %s %.4f at step %s%s; %s steps were taken, %.0f%% of the %s of all to their end",
        best.number,
        sweep.terms.metric,
        best.value,
        f"{best.at_step:,}",
        ""
        if own is None or own.value is None
        else f"; the config as it is, {own.state}, has {own.value:.4f} at step {own.at_step:,}",
        f"{steps:,}",
        100 * steps / max(whole_steps, 1),
        f"{whole_steps:,}",
    )
    return {
        "trials": len(rows),
        "done": states["done"],
        "stopped_early": states["stopped early"],
        "failed": states["failed"],
        "metric": sweep.terms.metric,
        "best": _found(best),
        "config": _found(own) if own else None,
        "steps": steps,
        "whole_steps": whole_steps,
        "importance": sweep.importance(),
    }


def _found(row: Row) -> dict[str, Any]:
    return {
        "trial": row.number,
        "state": row.state,
        "value": row.value,
        "step": row.at_step,
        "values": row.values,
    }


def trial_table(rows: list[Row], sweep: Sweep) -> str:
    """The best first; failed ones last, with their reasons."""
    ranked = sorted(
        rows, key=lambda row: (row.value is None, row.state != "done", -sweep.terms.sign * (row.value or 0))
    )
    header = [
        "trial",
        "state",
        sweep.terms.metric,
        "steps",
        *(key.rpartition(".")[2] for key in sweep.space.dimensions),
    ]
    lines = [
        [row.number, row.state, "–" if row.value is None else f"{row.value:.4f}", row.steps]
        + [_shown(row.values.get(key)) for key in sweep.space.dimensions]
        for row in ranked
    ]
    reasons = [f"trial {row.number}: {row.reason}" for row in ranked if row.reason]
    return "\n".join([table(lines, header), *reasons])


def _csv(rows: list[Row], sweep: Sweep) -> str:
    keys = list(sweep.space.dimensions)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["trial", "state", sweep.terms.metric, "at_step", "steps", "whole_steps", "seconds", *keys, "reason"]
    )
    for row in rows:
        found = [row.number, row.state, row.value, row.at_step, row.steps, row.whole_steps, row.seconds]
        writer.writerow([*found, *(row.values.get(key) for key in keys), row.reason])
    return text.getvalue()


def _track(config: Config, sweep: Sweep) -> None:
    """A row a trial: its metric, the best so far, its steps and its numbers. Trials have trackers of their own too."""
    run = f"{config.storage.run}/tune"
    best, sign = None, sweep.terms.sign
    with Trackers.open(config.changed({"storage.run": run}, "the sweep"), 0) as trackers:
        for row in sweep.rows:
            if row.value is not None:
                best = row.value if best is None else sign * max(sign * best, sign * row.value)
                numbers = {k: float(v) for k, v in row.values.items() if isinstance(v, int | float)}
                found = {f"{VALIDATION}{sweep.terms.metric}": row.value, f"{VALIDATION}best": best, "steps": row.steps}
                trackers.log({"step": row.number + 1, **found, **numbers})


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
