"""List the runs under storage.root, compare two, or give a run's model a name.

examples:
  tep runs                                          # data, model, scores, verdict and size of each
  tep runs pairs                                    # one run, with its verdicts
  tep runs pairs fine_tune                          # what differs in config, data and scores
  tep runs promote fine_tune production             # embedding.model=models:/production is now its best model
  tep runs --json storage.root=s3://bucket/prefix   # for programs, as when piped
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config import Config, ConfigError
from pipeline.config.reference import written
from pipeline.config.section import Name
from pipeline.core.aliases import SCHEME, assign_alias, read_aliases
from pipeline.core.console import table
from pipeline.core.escaping import printable
from pipeline.core.outcome import Result, command
from pipeline.core.path import StoragePath, without_options
from pipeline.job import parser

if TYPE_CHECKING:
    from pipeline.evaluation.runs import Run

MAIN_SCORES = ("ndcg@10", "spearman", "v_measure", "accuracy")


def arguments() -> argparse.ArgumentParser:
    own = parser("runs", __doc__ or "", names="RUN", prepares=False)
    own.set_defaults(logs=False)
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    from pipeline.evaluation.runs import compare_runs, find_runs

    names, as_json = args.names, args.json or not sys.stdout.isatty()
    runs = {run.name: run for run in find_runs(config.root)}
    if len(names) == 3 and names[0] == "promote":
        return promote(config, _run(runs, names[1], config), names[2])
    if len(names) > 2:
        raise ConfigError(f"found {' '.join(names)}; allowed are no run, one, two to compare, and promote RUN NAME")
    chosen = [_run(runs, name, config) for name in names] or list(runs.values())
    if len(names) == 2:
        found = compare_runs(*chosen)
        if not as_json:
            print(printed(found, names))
        return Result({"differing_keys": len(found["config"])}, reply=found if as_json else None, summary="")
    if as_json:
        return Result(reply=[described(run) for run in chosen])
    print(
        listed(chosen)
        if chosen
        else f"no runs below {without_options(str(config.root))}; to make one: {command('run')}"
    )
    for each in chosen[0].evaluation.get("comparisons", []) if names else ():
        print(printable(each["sentence"]))
    return Result({"runs": len(chosen)}, summary="")


def _run(runs: dict[str, Run], name: str, config: Config) -> Run:
    if name in runs:
        return runs[name]
    near = difflib.get_close_matches(name, runs, 1)
    known = f"the runs are {', '.join(runs)}" if runs else "there are none yet"
    meant = f"did you mean {near[0]}?" if near else known
    raise ConfigError(f"found no run {name} below {without_options(str(config.root))}; {meant}")


def promote(config: Config, run: Run, name: str) -> Result:
    """Copy the run's best model below storage.root/models and give it the name."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"found the name {name!r}; allowed are letters, digits, '.', '_' and '-', such as production"
        ) from None
    from pipeline.core.files import local_copy
    from pipeline.index.published import copy_model
    from pipeline.stages import consolidated_model

    own = config.changed({"storage.run": run.name, "embedding.model": None}, "promote")
    model = copy_model(own, local_copy(consolidated_model(own)))
    before = read_aliases(config.root).get(name, {}).get("run")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    assign_alias(config.root, name, {"run": run.name, "model": f"models/{model.name}", "promoted": now})
    if before and before != run.name:
        print(f"{name} was {before}; to go back: {command('runs', ['promote', before, name])}", file=sys.stderr)
    if "mlflow" in run.settings["logging"].get("trackers", ()):
        _register(own, run, model, name)
    print(f"{name} is now the model of {run.name}: use it with embedding.model={SCHEME}{name}", file=sys.stderr)
    return Result({"run": run.name, "name": name, "before": before}, {"model": str(model)})


def _register(config: Config, run: Run, model: StoragePath, name: str) -> None:
    """Register the model with MLflow too. An error there is a warning: the name is given already."""
    from pipeline.training.mlflow_tracker import register

    try:
        project = run.settings["logging"].get("project", config.logging.project)
        settings = config.changed({"logging.project": project}, "promote")
        print(f"MLflow has it as {register(settings, run.folder, model, name)}", file=sys.stderr)
    except Exception as error:
        print(printable(f"MLflow did not take it: {' '.join(str(error).split())}"), file=sys.stderr)


def described(run: Run) -> dict[str, Any]:
    """A run as plain values."""
    return {
        "run": run.name,
        "changed": _date(run).isoformat(timespec="seconds"),
        "names": run.aliases,
        "data": {"sources": run.sources, "rows": run.rows, "fingerprint": run.described["data_fingerprint"]},
        "model": run.model,
        "step": run.step,
        "steps": run.steps,
        "scores": run.scores,
        "verdict": run.verdict or None,
        "bytes": run.bytes,
        "run_dir": str(run.folder),
    }


def _date(run: Run) -> datetime:
    return datetime.fromtimestamp(run.changed_s, UTC)


def listed(runs: Sequence[Run]) -> str:
    """A line a run."""
    rows = []
    for run in runs:
        count = "" if run.rows is None else f", {run.rows:,} records"
        rows.append(
            (
                run.name + (f" ({', '.join(run.aliases)})" if run.aliases else ""),
                _date(run).astimezone().strftime("%Y-%m-%d %H:%M"),
                f"{', '.join(run.sources)}{count}",
                run.model,
                f"{run.step:,} of {run.steps:,}",
                _main_score(run),
                run.verdict or "not evaluated",
                f"{run.bytes / 1e6:,.1f} MB",
            )
        )
    headers = ("run", "changed", "data", "model", "step", "score", "verdict", "size")
    return table([tuple(map(printable, row)) for row in rows], headers)


def _main_score(run: Run) -> str:
    """The model's score on its first task."""
    for task, scores in run.scores.items():
        for metric in MAIN_SCORES:
            if metric in scores:
                return f"{metric} {scores[metric]:.3f} ({task})"
    return ""


def printed(found: dict[str, Any], names: Sequence[str]) -> str:
    """What differs between two runs, as tables."""
    config = [(key, *(written(value)[:60] for value in values)) for key, values in found["config"].items()]
    scores = [
        (task, metric, *("" if value is None else f"{value:.4f}" for value in (a, b)), _difference(a, b))
        for task, metrics in found["scores"].items()
        for metric, (a, b) in metrics.items()
    ]
    parts = [
        table(config, ("config", *names)) if config else "config: the same",
        f"data: {found['data']}",
        table(scores, ("task", "metric", *names, "difference")) if scores else "scores: neither run is evaluated",
        *found["verdicts"],
    ]
    return "\n\n".join(printable(part) if "\n" not in part else part for part in parts)


def _difference(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.4f}"
