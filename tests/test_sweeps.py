"""Whole sweeps as processes: killed, with workers of their own. Run by `make test-slow`."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.job_process import JobProcess, kill, ray_processes, run, wait_until, with_prepared, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("shared_ray")]
RATE = "training.learning_rate"


def sweep_config(folder: Path, **tune: Any) -> Path:
    file = with_prepared(write_config(folder, max_steps=240, validate_every_steps=20, table_warmup_fraction=0.5))
    config = json.loads(file.read_text())
    config["tune"] = {"space": {RATE: {"loguniform": [1e-4, 1e-1]}}, "metric": "loss", **tune}
    config["checkpointing"] = {"every_steps": 10}
    file.write_text(json.dumps(config))
    return file


def trials_of(folder: Path, name: str) -> list[dict[str, str]]:
    """trials.csv, without what the clock says."""
    with (folder / "store" / "runs" / name / "tune" / "trials.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def starts(trial: Path) -> list[int]:
    """The steps from which a trial's training began, by its log."""
    log = (trial / "training.log").read_text() if (trial / "training.log").is_file() else ""
    found = re.findall(r"training on \d+ workers?(?:, from step ([\d,]+))?", log)
    return [int(step.replace(",", "") or 0) for step in found]


def validations(run: Path) -> dict[int, float]:
    """Step → loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def under_way(folder: Path, name: str) -> list[Path]:
    """Trials that have a checkpoint to go on from, and none of the end."""
    trials = (folder / "store" / "runs" / name / "tune" / "trials").glob("*")
    saved = {trial: {path.parent.name for path in trial.glob("attempt-*/step-*/state.json")} for trial in trials}
    return [trial for trial, steps in saved.items() if steps and "step-00000240" not in steps]


def test_trials_of_two_workers_are_the_training_of_train(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, searcher="grid", space={RATE: {"choice": [1e-2, 1e-6]}}, grace_steps=80)
    last = run("tune", config, "scaling.num_workers=2")
    assert last["metrics"]["best"]["values"] == {RATE: 1e-2}
    good, bad = trials_of(tmp_path, "r")
    assert (good["state"], good["steps"], bad["state"], bad["steps"]) == ("done", "240", "stopped early", "80")

    trained = run("train", Path(last["paths"]["best"]))
    assert trained["metrics"]["step"] == 240
    runs = tmp_path / "store" / "runs"
    trial, alone = validations(runs / "r" / "tune" / "trials" / "0000"), validations(runs / "r-best")
    assert trial == {step: alone[step] for step in (80, 160, 240)}


def test_a_sweep_that_is_killed_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, searcher="random", scheduler="none", trials=6)
    run("tune", config, "storage.run=whole")
    expected = trials_of(tmp_path, "whole")
    assert [row["state"] for row in expected] == ["done"] * 6

    job = JobProcess("tune", config, "storage.run=killed")
    job.wait_for("tune: trial ")
    wait_until(lambda: under_way(tmp_path, "killed"), job)
    job.kill()
    trials = tmp_path / "store" / "runs" / "killed" / "tune" / "trials"
    ended = set(re.findall(r"tune: trial (\d+) done", job.log.read_text()))
    before = {trial.name: starts(trial) for trial in trials.iterdir()}

    again = JobProcess("tune", config, "storage.run=killed")
    again.wait_for("tune: running ")
    wait_until(lambda: any(starts(trial) > before.get(trial.name, []) for trial in trials.iterdir()), again)
    kill(ray_processes("ImplicitFunc"))  # the trials' own
    code, last = again.end()
    assert code == 0, again.log.read_text()
    assert last["metrics"]["trials"] == last["metrics"]["done"] == 6

    assert trials_of(tmp_path, "killed") == expected
    for row in expected:  # the best of all validations, those before the kill too
        losses = validations(trials / f"{int(row['trial']):04d}")
        assert set(losses) == set(range(20, 241, 20))
        assert float(row["loss"]) == min(losses.values()) == losses[int(row["at_step"])]
    for number in ended:
        assert starts(trials / f"{int(number):04d}") == before[f"{int(number):04d}"] == [0]
    begun = [starts(trial) for trial in trials.iterdir()]
    assert any(step > 0 for steps in begun for step in steps)
    assert sum(map(len, begun)) >= 6 + 2  # one more for each of the kills
    files = [tmp_path / "store" / "runs" / name / "tune" / "best.yaml" for name in ("whole", "killed")]
    whole, killed = (yaml.safe_load(file.read_text()) for file in files)
    assert killed["storage"].pop("run") == "killed-best"
    assert whole["storage"].pop("run") == "whole-best"
    assert killed == whole
