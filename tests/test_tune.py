"""Sweeps: the space, what is tried and stopped, what a kill leaves, and a real one on two CPUs."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from pipeline.config import Config, ConfigError, load
from pipeline.config.training import Scaling
from pipeline.core.cluster import Capacity
from pipeline.training.space import Space
from pipeline.training.study import SweepStudy, TrialRow
from pipeline.training.trial import STEP, VALUE, Criterion, plan_slots, trial_config
from pipeline.training.tuner import CrashRecorder, Search, build_scheduler
from tests.bucket_servers import s3
from tests.conftest import make_pairs, no_progress, run_here, write_jsonl

RATE = "training.learning_rate"
TRIAL = {RATE: {"loguniform": [1e-4, 1e-1]}, "training.weight_decay": {"uniform": [0.0, 1.0]}}


def config_of(folder: Path, tune: dict[str, Any], **sections: Any) -> Config:
    file = folder / "c.yaml"
    file.write_text(json.dumps({"storage": {"root": str(folder), "run": "s"}, "tune": tune, **sections}))
    return load(file, environ={})


class TestSpace:
    @pytest.mark.parametrize(
        ("space", "said"),
        [
            ({"training.learning_rat": {"uniform": [1, 2]}}, "learning_rat: unknown key; did you mean learning_rate?"),
            ({RATE: {"loguniform": [1e-5, 20]}}, f"{RATE}: found 20.0; allowed is less than or equal to 10"),
            ({RATE: {"loguniform": [0, 1]}}, "allowed is loguniform with a lowest value above 0 and a higher one"),
            ({RATE: {"uniform": [1, 1]}}, "allowed is uniform with a lowest value and a higher one"),
            ({RATE: {"uniform": [1]}}, "allowed is a list with at least 2 items"),
            ({RATE: {"lognormal": [0, 1]}}, "lognormal: unknown key; did you mean loguniform?"),
            ({RATE: {"uniform": [0.1, 1], "choice": [1]}}, "not choice and uniform"),
            ({RATE: {}}, "allowed is one of choice, uniform, loguniform, quniform, integer"),
            ({"training.schedule": {"choice": ["linear", "cosin"]}}, "training.schedule: found 'cosin' (text)"),
            ({"training.global_batch_size": {"quniform": [64, 256, 64]}}, "found 64.0; allowed is a valid integer"),
            ({"model.num_heads": {"choice": [4, 5]}}, "even multiple of num_heads, not 256 over 5"),
            (
                {"data.seed": {"choice": [1, 2]}},
                "data.seed cannot be tuned: it would change",
            ),
            ({"tokenizer.vocab_size": {"integer": [600, 900]}}, "the prepared data, which all trials share"),
            ({"training.max_steps": {"integer": [6, 9]}}, "all trials have the same number of steps, tune.max_steps"),
            ({"embedding.batch_tokens": {"choice": [1]}}, "allowed are keys of model, objective, training"),
            ({"objective.mlm.ratio": {"choice": [0.1]}}, "found null in objective.mlm; allowed is an existing key"),
        ],
    )
    def test_what_no_trial_could_have_is_refused_by_file_and_key(
        self, space: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError) as error:
            config_of(tmp_path, {"space": space})
        assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: tune")
        assert said in str(error.value)

    def test_an_argument_is_named_as_one_and_refused_without_ray(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, *_, err = run_here(capsys, "tune", f"tune.space={{{RATE}: {{uniform: [0.1, 11]}}}}")
        assert code == 2
        assert f"argument tune.space: {RATE}: found 11.0" in err

    def test_values_that_fit_together_alone_are_taken(self, tmp_path: Path) -> None:
        fitting = {"model.d_model": {"choice": [96, 256]}, "model.num_heads": {"choice": [3, 4]}}
        config_of(tmp_path, {"space": fitting})  # 256 over 3 heads is none; 96 over 3 is
        with pytest.raises(ConfigError, match="grid with only choice, quniform and integer"):
            config_of(tmp_path, {"searcher": "grid", "space": TRIAL})

    def test_a_grid_is_the_product_of_what_each_key_takes(self, tmp_path: Path) -> None:
        betas = [[0.9, 0.98], [0.9, 0.999]]
        axes = {
            "training.betas": {"choice": betas},
            "training.global_batch_size": {"integer": [64, 200, 64]},
            "training.weight_decay": {"quniform": [0.0, 0.3, 0.1]},
        }
        space = Space.of(config_of(tmp_path, {"space": axes, "searcher": "grid"}))
        points = [space.values(point) for point in space.grid()]
        assert len(points) == 2 * 3 * 4
        assert {tuple(point["training.betas"]) for point in points} == set(map(tuple, betas))
        assert {point["training.global_batch_size"] for point in points} == {64, 128, 192}
        assert sorted({round(point["training.weight_decay"], 9) for point in points}) == [0, 0.1, 0.2, 0.3]

    @pytest.mark.parametrize("name", ["quickstart", "pairs", "fine_tune", "tune", "denoise"])
    def test_every_config_has_a_space_round_itself(self, name: str) -> None:
        config = load(f"configs/{name}.yaml", environ={})
        space = Space.of(config)
        assert space.point(config) is not None
        for key, dimension in space.dimensions.items():
            for value in dimension.candidates:
                assert config.changed({key: value}, "here").get(key) == value


@pytest.mark.parametrize(
    ("scaling", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, 2),  # a CPU each
        ({"cpus_per_worker": 2}, 9, 0, 4),
        ({"num_workers": 2}, 2, 0, 1),  # two halves, and a CPU to read with
        ({"num_workers": 2}, 9, 0, 8),
        ({"num_workers": [1, 4]}, 9, 0, 4),  # room for the most
        ({"num_workers": 3, "cpus_per_worker": 1}, 9, 0, 2),
        ({}, 64, 4, 4),
        ({"gpus_per_worker": 0.25}, 64, 2, 8),
        ({"gpus_per_worker": 0.6}, 64, 2, 2),  # a fraction is one GPU's
        ({"num_workers": 2, "gpus_per_worker": 0.5}, 64, 3, 3),
        ({"num_workers": 2}, 64, 5, 2),
        ({"num_workers": 4, "gpus_per_worker": 2}, 64, 8, 1),
        ({}, 3, 8, 3),  # CPUs may be what is short
        ({"num_workers": 4}, 2, 0, 0),  # a trial that never fits
        ({"gpus_per_worker": 1}, 8, 0, 0),
        ({"num_workers": 3}, 9, 2, 0),
    ],
)
def test_trials_and_their_workers_fit_side_by_side(
    scaling: dict[str, Any], cpus: int, gpus: int, expected: int
) -> None:
    given: Any = (Scaling(**scaling), "ddp", Capacity(cpus, gpus, cpus, gpus))
    with nullcontext() if expected else pytest.raises(ConfigError, match="scaling: found trials of"):
        found = plan_slots(*given)
        assert found.trials == expected
        assert found.in_process == ("num_workers" not in scaling)
        assert plan_slots(*given, max_trials=1).trials == 1


CRITERION = Criterion("ndcg@10", "max", total_steps=27, grace_steps=3)
Score = Callable[[dict[str, Any], int], float]
Ran = list[tuple[int, dict[str, Any], list[int]]]


def by_rate(values: dict[str, Any], step: int) -> float:
    """Best at a rate of 1e-2, whatever the decay; better with every step."""
    return -abs(math.log10(values[RATE]) + 2) - 1 / step


class Controller:
    """Calls a sweep's search and scheduler as Tune's controller does, for one trial after the other."""

    def __init__(self, study: SweepStudy, score: Score = by_rate) -> None:
        self.study, self.score = study, score
        self.search = Search(study, lambda row: None)
        self.scheduler = build_scheduler(self.search)

    def begin(self) -> tuple[Trial, int, dict[str, Any]]:
        trial = Trial("stub", stub=True)
        suggested = self.search.suggest(trial.trial_id)
        self.scheduler.on_trial_add(None, trial)
        return trial, suggested["number"], suggested["values"]

    def report(self, trial: Trial, value: float, step: int, **more: Any) -> bool:
        """Returns whether the trial is to end."""
        result = {VALUE: value, STEP: step, "ended": step == 27, "steps": step, "whole_steps": 27, **more}
        stop = self.scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if not stop:
            self.search.on_trial_result(trial.trial_id, result)
        if stop or result["ended"]:
            self.scheduler.on_trial_complete(None, trial, result)
            self.search.on_trial_complete(trial.trial_id, result)
        return stop or result["ended"]

    def run(self, count: int) -> Ran:
        """Up to `count` trials: number, values, and the steps that it got to report."""
        ran: Ran = []
        while len(ran) < count and self.study.remaining:
            trial, number, values = self.begin()
            steps = iter(range(3, 28, 3))
            reported = [next(steps)]
            while not self.report(trial, self.score(values, reported[-1]), reported[-1]):
                reported.append(next(steps))
            ran.append((number, values, reported))
        return ran


def shown(rows: list[TrialRow]) -> list[Any]:
    return [(row.number, row.state, row.values, row.curve, row.steps, row.whole_steps, row.reason) for row in rows]


class TestStudy:
    def test_asha_goes_on_with_the_best_third_of_those_that_came_so_far(self, tmp_path: Path) -> None:
        """Of those of an earlier start too."""
        config, ran = config_of(tmp_path, {"space": TRIAL, "searcher": "random", "trials": 40}), []
        for _ in range(2):
            with SweepStudy.open(config, CRITERION) as study:
                ran += Controller(study).run(20)
        rungs: dict[int, list[float]] = {3: [], 9: []}  # 27 is the end
        for _, values, reported in ran:
            last = 27
            for rung, seen in rungs.items():
                value, before = by_rate(values, rung), list(seen)
                seen.append(value)
                if before and value < np.percentile(before, 100 * 2 / 3):
                    last = rung
                    break
            assert reported[-1] == last
        spent = sum(reported[-1] for _, _, reported in ran)
        assert 40 * 3 < spent < 0.5 * 40 * 27

    def test_median_stops_what_is_below_the_others(self, tmp_path: Path) -> None:
        tune = {"space": TRIAL, "searcher": "random", "scheduler": "median", "trials": 20}
        config, ran = config_of(tmp_path, tune), []
        for _ in range(2):
            with SweepStudy.open(config, CRITERION) as study:
                ran += Controller(study, lambda values, step: by_rate(values, 1)).run(10)
        curves: list[tuple[int, float]] = []  # the last step, and the value at each
        for _, values, reported in ran:
            value = by_rate(values, 1)
            last = 27
            for step in range(3, 28, 3):
                others = [other for end, other in curves if end >= step]
                if len(others) >= 3 and value < statistics.median(others):
                    last = step
                    break
            curves.append((last, value))
            assert reported[-1] == last
        assert 4 < sum(last == 27 for last, _ in curves) < 20

    @pytest.mark.parametrize("scheduler", ["asha", "none"])
    def test_killed_anywhere_it_tries_and_stops_what_it_would_have(self, scheduler: str, tmp_path: Path) -> None:
        tune = {"space": TRIAL, "searcher": "random", "scheduler": scheduler, "trials": 14}
        with SweepStudy.open(config_of(tmp_path, tune), CRITERION) as study:
            Controller(study).run(14)
            expected = shown(study.rows)
        chance, folder = random.Random(scheduler), tmp_path / "killed"
        folder.mkdir()
        config, starts, ran = config_of(folder, tune), 0, []
        journal = folder / "runs" / "s" / "tune" / "journal.jsonl"
        while True:
            starts += 1
            with SweepStudy.open(config, CRITERION) as study:
                controller = Controller(study)
                ran += controller.run(chance.randrange(3))
                if not study.remaining:
                    break
                trial, number, values = controller.begin()
                for step in range(3, chance.choice([3, 6, 12]), 3):  # is under way when the driver is killed
                    if controller.report(trial, by_rate(values, step), step):
                        ran.append((number, values, [step]))
                        break
            with journal.open("a") as file:
                file.write('{"op_code": 5, "torn')
        assert starts > 3
        assert shown(study.rows) == expected
        assert sorted(number for number, _, _ in ran) == list(range(14))  # none again

    def test_what_was_under_way_comes_first_under_its_number(self, tmp_path: Path) -> None:
        """The first trial of all is the config as it is. Twice killed, the second time with a trial in the queue."""
        config = config_of(tmp_path, {"space": TRIAL, "trials": 9}, training={"learning_rate": 3e-3})
        with SweepStudy.open(config, CRITERION) as study:
            controller = Controller(study)
            begun = [controller.begin() for _ in range(3)]
            assert study.rows[0].values == {RATE: 3e-3, "training.weight_decay": 0.01}
            assert study.config_row == study.rows[0]
            controller.report(begun[1][0], 0.5, 3)
            controller.report(begun[1][0], 0.6, 27)
        for _ in range(2):
            with SweepStudy.open(config, CRITERION) as study:
                assert [row.number for row in study.rows] == [1]
                controller = Controller(study)
                again = [controller.begin() for _ in range(3)]
                assert study.rows[1].curve == {3: 0.5, 27: 0.6}
                assert study.remaining == 8
            assert [number for _, number, _ in again] == [0, 2, 3]
            assert [values for *_, values in again[:2]] == [begun[0][2], begun[2][2]]

    def test_the_searcher_learns_and_keeps_it_over_a_restart(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, {"space": TRIAL, "scheduler": "none", "trials": 60})
        with SweepStudy.open(config, CRITERION) as study:
            earlier = Controller(study).run(40)
        with SweepStudy.open(config, CRITERION) as study:
            later = Controller(study).run(20)
            assert next(iter(study.importance())) == RATE
            assert study.importance()[RATE] > 0.8  # the decay changes nothing
        assert len({json.dumps(values) for _, values, _ in earlier + later}) == 60
        learnt = [math.log10(values[RATE]) for _, values, _ in later]
        assert sum(abs(rate + 2) for rate in learnt) / 20 < 0.53  # up to 0.43 over seeds; from 0.62 on if it forgets

    def test_a_grid_is_gone_through_once_over_restarts(self, tmp_path: Path) -> None:
        space = {RATE: {"choice": [1e-3, 1e-2, 1e-1]}, "training.seed": {"integer": [1, 3]}}
        config = config_of(tmp_path, {"space": space, "searcher": "grid", "scheduler": "none"})
        for _ in range(6):
            with SweepStudy.open(config, CRITERION) as study:
                Controller(study).run(2)
                rows = study.rows
        points = [(row.values[RATE], row.values["training.seed"]) for row in rows]
        assert points == [(rate, seed) for rate in (1e-3, 1e-2, 1e-1) for seed in (1, 2, 3)]

    def test_failures_are_told_apart_and_never_best(self, tmp_path: Path) -> None:
        with SweepStudy.open(config_of(tmp_path, {"space": TRIAL, "trials": 4}), CRITERION) as study:
            controller = Controller(study)
            trials = [controller.begin()[0] for _ in range(4)]
            controller.report(trials[1], 0.9, 3)
            controller.report(trials[1], math.nan, 0, steps=5, failed="the loss is no finite number", ended=True)
            controller.report(trials[2], math.nan, 0, steps=27, ended=True)
            controller.search.on_trial_complete(trials[3].trial_id, error=True)
            (tmp_path / "error.txt").write_text("Traceback\nthe node is gone\n")
            died: Any = SimpleNamespace(trial_id=trials[3].trial_id, error_file=tmp_path / "error.txt", last_result={})
            CrashRecorder(controller.search).on_trial_error(1, trials, died)
            assert study.best is None
            controller.report(trials[0], 0.1, 27)
            best, rows = study.best, study.rows
        assert best is not None
        assert best.number == 0
        reasons = ["the loss is no finite number", "it reported no ndcg@10", "its process died: the node is gone"]
        assert [(row.state, row.reason) for row in rows[1:]] == [("failed", reason) for reason in reasons]
        assert (rows[1].steps, rows[1].whole_steps) == (5, 5)

    def test_another_sweep_in_the_folder_is_refused_and_more_trials_are_not(self, tmp_path: Path) -> None:
        for trials, left in ((2, 2), (4, 2)):
            with SweepStudy.open(config_of(tmp_path, {"space": TRIAL, "trials": trials}), CRITERION) as study:
                assert len(Controller(study).run(9)) == left
        other = config_of(tmp_path, {"space": {RATE: TRIAL[RATE]}, "seed": 1}, training={"max_grad_norm": 2.0})
        with pytest.raises(ConfigError) as error, SweepStudy.open(other, CRITERION):
            pass
        for key in ("tune.seed (then 0, now 1)", "training.max_grad_norm", "tune.space.training.weight_decay"):
            assert key in str(error.value)
        assert RATE not in str(error.value)

    def test_a_loss_is_best_where_it_is_low(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, {"space": TRIAL, "trials": 12, "metric": "validation_loss", "searcher": "random"})
        criterion = Criterion.of(config, 27)
        assert criterion == Criterion("loss", "min", 27, 3)
        with SweepStudy.open(config, criterion) as study:
            Controller(study, lambda values, step: -by_rate(values, step)).run(12)
            rows, best = study.rows, study.best
        assert best is not None
        assert best.value == min(row.value or math.inf for row in rows if row.state == "done")
        assert max(row.steps for row in rows) == 27
        assert min(row.steps for row in rows) == 3


def test_a_trial_is_a_run_of_its_own_with_its_values_and_the_budget(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"space": TRIAL, "max_steps": 90}, training={"max_epochs": 3})
    trial = trial_config(config, Criterion.of(config, 90), 7, {RATE: 0.02})
    assert trial.run_dir == tmp_path / "runs" / "s" / "tune" / "trials" / "0007"
    assert (trial.training.learning_rate, trial.training.max_steps, trial.training.max_epochs) == (0.02, 90, None)
    assert (trial.training.validate_every_steps, trial.training.best_metric) == (10, "ndcg@10")
    with pytest.raises(ConfigError, match="trial 7"):
        trial_config(config, Criterion.of(config, 90), 7, {"model.num_heads": 3})


class Tuning:
    """Runs tune on one config; returns (exit code, last line, stderr)."""

    def __init__(self, folder: Path) -> None:
        self.root, self.config = folder / "store", folder / "c.yaml"
        write_jsonl(folder / "pairs.jsonl", make_pairs(800))
        source = {"name": "pages", "type": "json", "path": str(folder / "pairs.jsonl")}
        base = {
            "storage": {"root": str(self.root), "run": "small"},
            "data": {"sources": [source], "validation_fraction": 0.1},
            "tokenizer": {"vocab_size": 800, "max_length": 24},
            "model": {"d_model": 64, "num_layers": 0},
            "training": {"global_batch_size": 64, "max_steps": 18},
            "logging": {"trackers": ["tensorboard"]},
            "tune": {"metric": "loss"},  # these pairs are found without training, NDCG@10 tells nothing
        }
        self.config.write_text(json.dumps(base))

    def __call__(self, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any, str]:
        code, last, out, err = run_here(capsys, "tune", "--config", str(self.config), *args)
        assert len(out.splitlines()) == 1  # Ray Tune's own words go elsewhere
        return code, last, err


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    return Tuning(tmp_path_factory.mktemp("tune"))


GRID = (
    "tune.searcher=grid",
    "tune.scheduler=none",
    f"tune.space={{{RATE}: {{choice: [1e-6, 2e-2]}}, "
    "model.num_heads: {choice: [3, 4]}, model.d_model: {choice: [96, 64]}}",
    "training.validate_every_steps=6",
)


@pytest.mark.usefixtures("ray_cluster")
class TestRealSweep:
    """In this order: the later tests find the records prepared."""

    def test_trials_run_side_by_side_and_leave_the_best(
        self, tuning: Tuning, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code, last, err = tuning(capsys, *GRID)
        assert code == 0, err
        assert "running 8 of 8 trials, 2 at a time, with 1 workers each" in err
        metrics, folder = last["metrics"], tuning.root / "runs" / "small" / "tune"
        assert (metrics["trials"], metrics["failed"]) == (8, 2)  # 64 over 3 heads is none
        values = metrics["best"]["values"]
        assert values[RATE] == 2e-2
        assert metrics["steps"] == metrics["whole_steps"]
        with (folder / "trials.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["trial"] for row in rows] == list("01234567")
        for row in rows:
            if (row["model.d_model"], row["model.num_heads"]) == ("64", "3"):
                assert row["state"] == "failed"
                assert "num_heads" in row["reason"]
        assert len(list((tuning.root / "prepared").iterdir())) == 1
        assert not (folder / "ray").exists()
        self.check_best_yaml(tuning, folder, values)
        self.check_the_best_model_alone_is_kept(folder)
        self.check_trackers(folder, {int(row["trial"]) + 1: float(row["loss"]) for row in rows if row["loss"]})

        monkeypatch.setattr("pipeline.stages.ray_session", no_progress)
        code, last, err = tuning(capsys, *GRID)
        assert (code, last["metrics"]["trials"]) == (0, 8), err
        assert "nothing to do, all 8 trials have finished" in err

    def check_best_yaml(self, tuning: Tuning, folder: Path, values: dict[str, Any]) -> None:
        """It is the config with the best values."""
        expected = load(tuning.config, GRID, environ={}).dump()
        for key, value in values.items():
            section, _, name = key.partition(".")
            expected[section][name] = value
        expected["storage"]["run"] = "small-best"
        written = yaml.safe_load((folder / "best.yaml").read_text())
        assert load(folder / "best.yaml", environ={}).dump() == written == expected

    def check_the_best_model_alone_is_kept(self, folder: Path) -> None:
        from pipeline.training.checkpoints import read_state

        (kept,) = folder.glob("trials/*/*/step-*")
        rows = [json.loads(line) for line in (kept.parents[1] / "metrics.jsonl").read_text().splitlines()]
        scores = [row["validation_loss"] for row in rows if "validation_loss" in row]
        assert len(scores) == 3
        assert read_state(kept).best_metric == -min(scores)

    def check_trackers(self, folder: Path, scores: dict[int, float]) -> None:
        """They have each trial and the sweep."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert len(scores) == 6
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert {e.step: pytest.approx(e.value) for e in events.Scalars("validation/loss")} == scores
        for number in scores:
            trial = EventAccumulator(str(folder / "trials" / f"{number - 1:04d}" / "tensorboard")).Reload()
            assert min(e.value for e in trial.Scalars("validation/loss")) == pytest.approx(scores[number])

    def test_the_example_config_sweeps_and_starts_with_itself(
        self, tuning: Tuning, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = {"name": "pages", "type": "json", "path": str(tuning.config.parent / "pairs.jsonl")}
        small = [
            "tokenizer.vocab_size=800",
            "tokenizer.max_length=24",
            "model.d_model=64",
            "data.validation_fraction=0.1",
        ]
        small += ["training.global_batch_size=64", "tune.max_steps=36", "tune.trials=6", "tune.metric=loss"]
        small += [f"storage.root={tuning.root}", f"data.sources=[{json.dumps(source)}]"]
        code, last, err = tuning(capsys, "--config", "configs/tune.yaml", *small)
        assert code == 0, err
        metrics, folder = last["metrics"], tuning.root / "runs" / "tuned" / "tune"
        assert metrics["done"] + metrics["stopped_early"] == metrics["trials"] == 6
        assert metrics["stopped_early"] > 0
        assert metrics["steps"] < metrics["whole_steps"] == 6 * 36
        assert f"; the sweep took {metrics['steps']} steps, {100 * metrics['steps'] / 216:.0f}% of 216 without" in err
        with (folder / "trials.csv").open() as file:
            first = next(csv.DictReader(file))
        assert float(first["training.table_learning_rate"]) == 2e-3
        own, best = metrics["config"], metrics["best"]
        assert (own["trial"], own["state"]) == (0, first["state"])
        assert float(first["loss"]) == pytest.approx(own["value"])
        assert best["value"] <= own["value"] or own["state"] == "stopped early"
        for name in ("coordinates", "importance", "curves"):
            assert Path(last["paths"][name]).read_bytes().startswith(b"\x89PNG")

    def test_all_trials_failing_is_a_failed_job(
        self, tuning: Tuning, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """How a real trial fails, the first test shows."""

        def run_trials(study: SweepStudy, context: Any, on_end: Callable[[TrialRow], None]) -> None:
            search = Search(study, on_end)
            for trial_id in ("a", "b"):
                search.suggest(trial_id)
                search.on_trial_complete(trial_id, {"failed": "it diverged"})

        monkeypatch.setattr("pipeline.training.tuner.run_trials", run_trials)
        space = "tune.space={training.warmup_fraction: {choice: [0.1, 0.2]}}"
        code, last, err = tuning(capsys, space, "tune.trials=2", "storage.run=bad")
        assert (code, last["status"]) == (1, "failed")
        assert "all 2 trials failed, 2 of them because it diverged" in err

    @pytest.mark.exhaustive
    def test_a_sweep_in_a_bucket_leaves_all_there(self, tuning: Tuning, capsys: pytest.CaptureFixture[str]) -> None:
        with s3("sweeps") as served:
            space = f"tune.space={{{RATE}: {{choice: [2e-2, 1e-3]}}}}"
            args = [space, "tune.searcher=grid", "training.max_steps=6", f"storage.root={served.uri('store')}"]
            code, last, err = tuning(capsys, *args)
            assert (code, last["metrics"]["trials"]) == (0, 2), err
            keys = {key.removeprefix("store/runs/small/tune/") for key in served.keys("store/runs/small/tune/")}
            assert {"best.yaml", "trials.csv", "curves.png", "journal.jsonl", "metrics.jsonl"} <= keys
            assert len({key for key in keys if re.search(r"^trials/.*/step-.*/state.json", key)}) == 1
            assert not [key for key in keys if key.startswith("ray/")]
            code, _, err = tuning(capsys, *args)
            assert code == 0
            assert "nothing to do, all 2 trials have finished" in err
