"""Runs that lose workers end with the weights, and on the batches, of one that was left alone. Without Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import load
from pipeline.data.feed import LocalFeed
from pipeline.training import checkpoints, fit
from pipeline.training.assembly import RunSpec, train_locally, train_or_resume
from pipeline.training.checkpoints import resume_point, step_folder
from pipeline.training.loop import Hooks
from pipeline.training.worker import WorkerInput
from pipeline.training.workers import Workers
from tests.killed_loop import PLACES, Finished, Kill, Start, prepared, train_in

STEPS = 24
SETTINGS: dict[str, Any] = {
    "data": {"sources": [{"name": "made", "type": "json", "path": "made.jsonl"}]},
    "tokenizer": {"max_length": 16},
    "model": {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "objective": {"contrastive": {"learn_temperature": True}, "mlm": {"weight": 0.5}},
    "training": {
        "global_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "validate_every_steps": 6,
        "log_every_steps": 1,
        "table_warmup_fraction": 0.25,
    },
    "checkpointing": {"every_steps": 3},
}


def kills(world_size: int, number: int, seed: int) -> list[Kill]:
    """Points anywhere in a run, of one worker or of all."""
    chance = random.Random(seed)
    found = []
    for i in range(number):
        place = PLACES[i % len(PLACES)]
        rank_0_alone = place in ("writing", "written", "moved")
        # A start redoes at most three steps, so those that come late in a run's life have few passes left.
        count = chance.randint(1, 3) if not rank_0_alone else 1
        ranks = [0] if rank_0_alone else chance.choice([[chance.randrange(world_size)], list(range(world_size))])
        found.append(Kill(place, count, ranks))
    chance.shuffle(found)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("world_size", "points"),
    [(4, len(PLACES)), *(pytest.param(workers, 10, marks=pytest.mark.exhaustive) for workers in (2, 4))],
)
def test_killed_anywhere_a_run_ends_with_the_same_bits(world_size: int, points: int, tmp_path: Path) -> None:
    """At each of PLACES once or more. With four workers the buckets of stock DDP would change a resumed run's bits."""
    alone = train_in(tmp_path / "alone", SETTINGS, [Start(world_size)])
    starts = [Start(world_size, [kill]) for kill in kills(world_size, points, seed=points)]
    killed = train_in(tmp_path / "killed", SETTINGS, [*starts, Start(world_size)])
    assert killed.weights == alone.weights
    assert killed.losses == alone.losses
    assert_same_batches(killed, alone)


def assert_same_batches(found: Finished, expected: Finished) -> None:
    assert expected.ids.keys() == set(range(STEPS))
    assert found.ids == expected.ids
    assert all(len(batches) == 1 for batches in found.ids.values())


def test_two_workers_then_one_then_three_train_on_the_same_batches(tmp_path: Path) -> None:
    settings = SETTINGS | {"model": SETTINGS["model"] | {"dropout": 0.0}}
    alone = train_in(tmp_path / "alone", settings, [Start(2)])
    leave = Kill("updated", 5, [0])
    elastic = train_in(tmp_path / "elastic", settings, [Start(2, [leave]), Start(1, [leave]), Start(3)])
    assert_same_batches(elastic, alone)
    for step in range(1, STEPS + 1):
        assert elastic.losses[step] == pytest.approx(alone.losses[step], rel=1e-5), step
    assert elastic.weights != alone.weights  # they are another's sums, or this would compare a run with itself


TAUGHT = {"contrastive": {"guide": "teacher"}, "distillation": {"teacher": "teacher"}}


def test_with_a_teacher_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = SETTINGS | {"objective": TAUGHT}
    alone = train_in(tmp_path / "alone", settings, [Start(2)])
    killed = train_in(tmp_path / "killed", settings, [Start(2, [Kill("updated", 8, [1])]), Start(2)])
    assert killed.weights == alone.weights
    assert killed.losses == alone.losses
    assert_same_batches(killed, alone)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [SETTINGS["objective"], TAUGHT], ids=["contrastive", "taught"])
def test_fsdp_killed_and_resumed_ends_with_the_same_bits(objective: dict[str, Any], tmp_path: Path) -> None:
    settings = SETTINGS | {"objective": objective, "training": SETTINGS["training"] | {"strategy": "fsdp"}}
    alone = train_in(tmp_path / "alone", settings, [Start(2)])
    starts = [Start(2, [Kill("updated", 5, [1])]), Start(2, [Kill("written", 2, [0])]), Start(2)]
    killed = train_in(tmp_path / "killed", settings, starts)
    assert killed.weights == alone.weights
    assert_same_batches(killed, alone)


class ReachedError(Exception): ...


def until(step: int) -> Callable[[dict[str, float]], None]:
    def on_metrics(metrics: dict[str, float]) -> None:
        if metrics["step"] >= step:
            raise ReachedError

    return on_metrics


@pytest.mark.parametrize("with_ray", [False, True])
def test_a_resume_hashes_each_file_of_the_newest_checkpoint_once(
    with_ray: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first step: in one process, and in the driver and its workers together (the trainer is made up)."""
    data, manifest = tmp_path / "data", prepared(tmp_path / "data")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SETTINGS | {"storage": {"root": str(tmp_path), "run": "r"}}))
    config = load(tmp_path / "c.yaml", environ={})
    with pytest.raises(ReachedError):
        train_locally(config, data, manifest, until(5))
    (state,) = config.run_dir.glob(f"attempt-*/{step_folder(3)}/state.json")
    hash_of, hashed = checkpoints.xxh3_of, list[str]()
    monkeypatch.setattr(checkpoints, "xxh3_of", lambda path: hashed.append(path.name) or hash_of(path))

    def trainer(config: object, workers: object, sent: WorkerInput) -> SimpleNamespace:
        hooks = Hooks(lambda run, state, is_best: None, until(4))
        batches = LocalFeed(sent.spec.plan).batches
        return SimpleNamespace(fit=lambda: train_or_resume(sent.spec, batches, hooks, torch.device("cpu"), sent.point))

    def train_through_ray() -> None:
        monkeypatch.setattr(fit, "_trainer", trainer)
        task, point = RunSpec.of(config, data, manifest), resume_point(config.run_dir)
        assert not fit.is_done(config, data, manifest, point.state)
        fit._run_trainer(
            config, Workers(1, 1, 1, 0, 1), WorkerInput(task, 1, None, resume_point(config.run_dir, point), 0.0)
        )

    with pytest.raises(ReachedError):
        train_through_ray() if with_ray else train_locally(config, data, manifest, until(4))
    assert sorted(hashed) == sorted(json.loads(state.read_text())["files"])
