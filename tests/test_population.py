"""Population Based Training: what it refuses, how values change, and real sweeps whose trials copy each other."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from safetensors.torch import load_file
from torch.testing import assert_close

from pipeline.api import prepare
from pipeline.config import Config, ConfigError, load
from pipeline.core.path import StoragePath
from pipeline.data.manifest import read_prepared
from pipeline.training import sweep, tuner
from pipeline.training.assembly import train_locally
from pipeline.training.checkpoints import TrainState, newest_valid
from pipeline.training.space import Space
from pipeline.training.study import SweepStudy, TrialRow
from pipeline.training.trial import SAVED_STEP, STEP, VALUE, Criterion
from pipeline.training.tuner import Search, build_scheduler
from tests.conftest import make_pairs, run_here, write_jsonl
from tests.job_process import JobProcess, run

RATE, DECAY, DROPOUT, SCHEDULE = (
    "training.learning_rate",
    "training.weight_decay",
    "model.dropout",
    "training.schedule",
)
SPACE: dict[str, Any] = {
    RATE: {"loguniform": [1e-4, 1e-1]},
    DECAY: {"uniform": [0.0, 0.5]},
    DROPOUT: {"uniform": [0.0, 0.4]},
    SCHEDULE: {"choice": ["constant", "linear", "cosine"]},
}
TOTAL, ROUND = 12, 4


def config_of(folder: Path, **sections: Any) -> Config:
    tune = {"scheduler": "pbt", "space": SPACE, "metric": "loss"} | sections.pop("tune", {})
    tree = {"storage": {"root": str(folder / "store"), "run": "p"}, "tune": tune, **sections}
    (folder / "c.yaml").write_text(json.dumps(tree))
    return load(folder / "c.yaml", environ={})


def pairs_config(folder: Path, steps: int = TOTAL, every: int = ROUND, trials: int = 3) -> Config:
    """Three trials that learn pairs; the first is the config itself."""
    write_jsonl(folder / "pairs.jsonl", make_pairs(400))
    source = {"name": "pages", "type": "json", "path": str(folder / "pairs.jsonl")}
    return config_of(
        folder,
        data={"sources": [source], "validation_fraction": 0.1},
        tokenizer={"vocab_size": 600, "max_length": 24},
        model={"d_model": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
        training={"global_batch_size": 32, "max_steps": steps, "learning_rate": 1e-2},
        tune={"trials": trials, "grace_steps": every},
    )


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"tune": {"space": SPACE | {"model.d_model": {"choice": [32]}, "training.seed": {"choice": [1]}}}},
            "tune.space: model.d_model, training.seed cannot change while a model is trained",
        ),
        ({"tune": {"space": {"training.global_batch_size": {"choice": [64]}}}}, "use scheduler=asha, or only model.dr"),
        ({"tune": {"trials": 1}}, "scheduler=pbt with trials of at least 2"),
        ({"tune": {"max_concurrent_trials": 2}}, "raise scaling.cpus_per_worker to run fewer at a time"),
        ({"scaling": {"num_workers": 2}}, "found pbt with scaling.num_workers=2"),
        ({"scaling": {"num_workers": [1, 2]}}, "found pbt with scaling.num_workers=[1, 2]"),
        ({"training": {"strategy": "fsdp"}}, "training.strategy=fsdp; allowed are trials of one worker"),
        (
            {
                "objective": {"contrastive": {"learn_temperature": True}},
                "tune": {"space": {"objective.contrastive.temperature": {"uniform": [0.1, 1]}}},
            },
            "temperature is trained (learn_temperature=true)",
        ),
    ],
)
def test_what_cannot_change_in_training_is_refused(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, **sections)
    assert said in str(error.value)


def test_the_default_space_leaves_out_a_trained_temperature(tmp_path: Path) -> None:
    contrastive = {"contrastive": {"learn_temperature": True}}
    config = config_of(tmp_path, tune={"space": {}}, objective=contrastive)
    assert set(Space.of(config).dimensions) == {RATE, "training.warmup_fraction"}


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.floats(0, 1e3), st.floats(1e-6, 1e3), st.floats(-1e4, 1e4), st.sampled_from(["uniform", "loguniform"]))
def test_clamped_values_are_the_nearest_in_their_range(low: float, width: float, value: float, kind: str) -> None:
    low = low + 1e-6
    space = Space.of(Config.model_validate({"tune": {"space": {RATE: {kind: [low, low + width]}}}}))
    clamped = space.clamp({RATE: value, SCHEDULE: "linear"})
    assert clamped == {RATE: sorted([low, value, low + width])[1], SCHEDULE: "linear"}


class Controller:
    """The part of Tune's controller that pbt asks, with trials that have no processes."""

    search_alg = None

    def __init__(self, study: SweepStudy) -> None:
        self.search = Search(study, lambda row: None)
        self.scheduler = build_scheduler(self.search)
        self.trials = [Trial("stub", stub=True) for _ in range(study.remaining)]
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)  # type: ignore[arg-type]

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self.trials if not trial.is_finished()}

    def report(self, trial: Trial, value: float, step: int) -> None:
        result = {VALUE: value, STEP: step, SAVED_STEP: step, "ended": False, "steps": step, "whole_steps": TOTAL}
        decision = self.scheduler.on_trial_result(self, trial, result)  # type: ignore[arg-type]
        assert decision == "PAUSE"
        trial.update_last_result(result)
        trial.set_status(Trial.PAUSED)

    def fail(self, trial: Trial) -> None:
        trial.set_status(Trial.TERMINATED)
        result = {VALUE: math.nan, STEP: 0, SAVED_STEP: 0, "ended": True, "failed": "it diverged", "steps": 2}
        self.scheduler.on_trial_complete(self, trial, result)  # type: ignore[arg-type]


def test_a_round_ends_when_its_last_trial_fails(tmp_path: Path) -> None:
    with SweepStudy.open(config_of(tmp_path, tune={"trials": 3}), Criterion("loss", "min", TOTAL, ROUND)) as study:
        controller = Controller(study)
        first, second, last = controller.trials
        controller.report(first, 0.5, ROUND)
        controller.report(second, math.inf, ROUND)
        assert controller.scheduler.choose_trial_to_run(controller) is last  # type: ignore[arg-type]
        controller.fail(last)
        assert controller.scheduler.choose_trial_to_run(controller) in (first, second)  # type: ignore[arg-type]
        assert [(row.state, row.curve, row.reason) for row in study.rows] == [
            ("under way", {ROUND: 0.5}, ""),
            ("under way", {}, ""),
            ("failed", {}, "it diverged"),
        ]


def is_mutated(value: Any, source: Any, key: str) -> bool:
    """Whether the value is the source's times 0.8 or 1.2, at an end of its range, or the next of a choice."""
    if key == SCHEDULE:
        choices = SPACE[key]["choice"]
        return abs(choices.index(value) - choices.index(source)) == 1
    low, high = next(iter(SPACE[key].values()))
    return any(value == pytest.approx(min(max(source * factor, low), high)) for factor in (0.8, 1.2))


class TrainedAlone:
    """Trains what a trial should have trained, step by step, in this process: the oracle."""

    def __init__(self, config: Config, rows: list[TrialRow]) -> None:
        self.config, self.rows = config, rows
        result = prepare(config)
        self.data = Path(result.paths["prepared"])
        self.manifest = read_prepared(self.data)

    def checkpoint(self, number: int, step: int) -> Path:
        """A trial's checkpoint of a step, trained from step 0 by its values and those of the trials that it copied."""
        run = f"alone-{number}-{step}"
        overrides = {
            "storage.run": run,
            "training.validate_every_steps": ROUND,
            "checkpointing.every_steps": ROUND,
            "checkpointing.accept_changes": list(SPACE),
        }
        folder = self.config.root / "runs" / run
        assert isinstance(folder, Path)
        history = [self.rows[number].segment(step)]
        while history[0].copied is not None:
            copy = history[0]
            history.insert(0, self.rows[copy.copied].segment(copy.step))
        for segment, until in zip(history, [*(later.step for later in history[1:]), step], strict=True):
            self._train(self.config.changed(overrides | segment.values, run), until)
        found = newest_valid(folder).folder
        assert isinstance(found, Path)
        return found

    def _train(self, config: Config, until: int) -> None:
        def stop(folder: StoragePath, state: TrainState) -> None:
            if state.step == until:
                raise SystemExit

        with pytest.raises(SystemExit):
            train_locally(config, self.data, self.manifest, on_saved=stop)


@pytest.mark.usefixtures("ray_cluster")
def test_a_copy_goes_on_from_the_weights_of_its_source_with_mutated_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pairs_config(tmp_path)
    monkeypatch.setattr(sweep, "remove_checkpoints", lambda *args, **options: None)
    monkeypatch.setattr(tuner, "remove_folder", lambda folder: None)
    code, last, _, err = run_here(capsys, "tune", "--config", str(tmp_path / "c.yaml"))
    assert code == 0, err
    metrics, folder = last["metrics"], config.run_dir / "tune"
    assert isinstance(folder, Path)
    criterion, fingerprint = Criterion("loss", "min", TOTAL, ROUND), last_fingerprint(folder)
    with SweepStudy.open(config, criterion, fingerprint) as study:
        rows, history = study.rows, study.history(study.best or study.rows[0])
    assert [row.state for row in rows] == ["done"] * 3
    assert rows[0].segments[0].values == {RATE: 1e-2, DECAY: 0.01, DROPOUT: 0.1, SCHEDULE: "linear"}

    copies = [copy for row in rows for copy in row.copies]
    assert sorted(copy.step for copy in copies) == [ROUND, 2 * ROUND]  # the worst of three, in each round
    assert [(copy["trial"], copy["copied"], copy["step"]) for copy in metrics["copies"]] == [
        (copy.trial, copy.copied, copy.step) for copy in copies
    ]
    mutated = []
    for copy in copies:
        losses = {row.number: row.curve[copy.step] for row in rows}
        assert (copy.trial, copy.copied) == (max(losses, key=losses.__getitem__), min(losses, key=losses.__getitem__))
        source = rows[copy.copied or 0].segment(copy.step).values
        mutated += [is_mutated(value, source[key], key) for key, value in copy.values.items()]
    assert sum(mutated) >= len(mutated) / 2  # the others are drawn again

    alone = TrainedAlone(config, rows)
    last_copy = max(copies, key=lambda copy: copy.step)
    handed_over = [
        checkpoint
        for checkpoint in folder.glob("ray/trials/*/checkpoint_*")
        if json.loads((checkpoint / "state.json").read_text())["step"] == last_copy.step
    ]
    expected = load_file(alone.checkpoint(last_copy.copied or 0, last_copy.step) / "model.safetensors")
    assert any(
        all(bool((weights[name] == expected[name]).all()) for name in expected)
        for weights in (load_file(checkpoint / "model.safetensors") for checkpoint in handed_over)
    )
    for row in rows:
        found = newest_valid(folder / "trials" / f"{row.number:04d}").folder
        assert isinstance(found, Path)
        expected = load_file(alone.checkpoint(row.number, TOTAL) / "model.safetensors")
        assert_close(load_file(found / "model.safetensors"), expected)

    text = (folder / "best.yaml").read_text()
    best = rows[metrics["best"]["trial"]]
    assert yaml.safe_load(text)["training"]["learning_rate"] == best.values[RATE]
    if best.copies:
        assert all(f"after step {each.step:,}, in trial {each.trial}" in text for each in history)
    table = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert sum(row["copies"].count("copied trial") for row in table) == 2


def last_fingerprint(folder: Path) -> str:
    """The fingerprint of the data that a sweep's journal was started with."""
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    sweeps = [event["user_attr"]["sweep"] for event in events if "sweep" in event.get("user_attr", {})]
    return str(sweeps[0]["data (the prepared data)"])


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_killed_population_starts_again_and_ends_as_one_left_alone(tmp_path: Path) -> None:
    pairs_config(tmp_path, steps=120, every=40, trials=4)
    file = tmp_path / "c.yaml"
    trials: dict[str, list[dict[str, str]]] = {}
    job = JobProcess("tune", file, "storage.run=killed")
    job.wait_for(" copies trial ")
    job.kill()
    again = run("tune", file, "storage.run=killed")
    assert again["metrics"]["done"] == 4
    run("tune", file, "storage.run=whole")
    for name in ("killed", "whole"):
        with (tmp_path / "store" / "runs" / name / "tune" / "trials.csv").open() as table:
            trials[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(table)]
    assert trials["killed"] == trials["whole"]
    logs = [
        path.read_text() for path in (tmp_path / "store" / "runs" / "killed" / "tune").glob("trials/*/training.log")
    ]
    assert any(
        len(re.findall(r"training on \d+ workers?$", log, re.MULTILINE)) > 1 for log in logs
    )  # the population was running, so it is repeated
    assert run("tune", file, "storage.run=killed")["metrics"] == again["metrics"]
