"""The learning rate over a run, against transformers' schedules, and AdamW's groups."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import optimization

from pipeline.config import Objective
from pipeline.config.training import Training
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.training.optimizer import Schedule, autocast_type, build_optimizer, slow_precision

PEAK = 0.5


def theirs(shape: str, total: int, warmup: int, decay: int, final: float) -> list[float]:
    """The multipliers of transformers' schedule for the steps 0 to `total`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    if shape == "linear":
        make: Any = optimization.get_polynomial_decay_schedule_with_warmup
        schedule = make(optimizer, warmup, total, lr_end=final * PEAK, power=1.0)
    elif shape == "cosine":
        make = optimization.get_cosine_with_min_lr_schedule_with_warmup
        schedule = make(optimizer, warmup, total, min_lr_rate=final)
    elif shape == "wsd":
        make, stable = optimization.get_wsd_schedule, max(0, total - warmup - decay)
        schedule = make(optimizer, warmup, total - warmup - stable, num_stable_steps=stable, decay_type="linear",
                        min_lr_ratio=final)  # fmt: skip
    else:
        schedule = optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    rates = []
    for _ in range(total + 1):
        rates.append(schedule.get_last_lr()[0] / PEAK)
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd", "constant"])
def test_as_transformers_schedules(shape: Any) -> None:
    """Ours rises a step ahead: its first update is not at rate 0."""
    runs = ((40, 8, 10), (40, 0, 10), (40, 35, 10), (2, 1, 1), (1, 0, 1))
    for (total, warmup, decay), final in itertools.product(runs, (0.0, 0.05, 0.25)):
        scale = Schedule(total, warmup, shape, decay, final).scale
        expected = theirs(shape, total, warmup, decay, final)
        assert [scale(step) for step in range(warmup, total + 1)] == pytest.approx(expected[warmup:])
        rising = [scale(step) for step in range(warmup)]
        assert rising == pytest.approx([(step + 1) / warmup for step in range(warmup)])
        if shape != "wsd":  # transformers' wsd rises from its floor
            assert rising == pytest.approx(expected[1 : warmup + 1])


def test_a_run_at_the_defaults() -> None:
    schedule = Schedule.of(Training(), 100)
    assert [schedule.scale(step) for step in (0, 3, 4, 5)] == [0.2, 0.8, 1.0, 1.0]
    assert schedule.scale(6) == 1 - 0.95 / 95
    assert schedule.scale(99) == 1 - 0.95 * 94 / 95
    assert schedule.scale(100) == schedule.scale(1000) == pytest.approx(0.05)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    for shape in ("linear", "cosine", "wsd", "constant"):
        assert Schedule.of(Training(schedule=shape, warmup_steps=0), 1).scale(0) == 1.0
        assert Schedule.of(Training(schedule=shape), 1).scale(0) == 1.0


def test_warm_up_in_steps_or_as_a_share() -> None:
    assert Schedule.of(Training(warmup_steps=7, warmup_fraction=0.5), 100).warmup_steps == 7
    assert Schedule.of(Training(warmup_steps=0), 100).warmup_steps == 0
    assert Schedule.of(Training(warmup_fraction=0.5), 100).warmup_steps == 50
    assert Schedule.of(Training(warmup_fraction=0.0), 100).warmup_steps == 0
    assert Schedule.of(Training(warmup_fraction=0.05), 8).warmup_steps == 1
    assert Schedule.of(Training(warmup_steps=200), 100).scale(99) == 0.5


def test_wsd_by_hand() -> None:
    schedule = Schedule.of(Training(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_rate_fraction=0.5), 100)
    assert [schedule.scale(step) for step in (9, 10, 79, 80)] == [1.0] * 4
    assert [schedule.scale(step) for step in (81, 90, 99, 100)] == pytest.approx([0.975, 0.75, 0.525, 0.5])


def test_layers_warm_up_when_they_join() -> None:
    schedule = Schedule.of(Training(warmup_fraction=0.1, table_warmup_fraction=0.5), 100)
    assert schedule.scale(49, joined_at=50) == 0
    assert [schedule.scale(step, joined_at=50) for step in (50, 51)] == [0.1, 0.2]
    assert schedule.scale(99, joined_at=50) == schedule.scale(99)
    groups = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0, "peak": 2.0, "layers": p is groups[1]} for p in groups])
    schedule.apply(optimizer, 9)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 0.0]
    schedule.apply(optimizer, 50)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0 * schedule.scale(50), 0.2]


def learner() -> Learner:
    shape = EncoderShape(64, 16, num_layers=1, num_heads=2, d_ff=24, positions="learned", max_positions=8)
    return Learner(EmbeddingModel(Encoder(shape)), Objective())


def test_decay_is_on_weight_matrices_alone() -> None:
    model = learner()
    optimizer = build_optimizer(model, Training(learning_rate=1e-3, table_learning_rate=2e-3, weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    peak = {names[p]: group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert {name for name in decay if decay[name]} == {name for name in decay if "_proj" in name}
    assert {name for name in peak if peak[name] == 2e-3} == {"model.backbone.embed_tokens.weight"}
    assert {peak[name] for name in peak if "embed_tokens" not in name} == {1e-3}


def test_betas_and_epsilon_are_the_configs() -> None:
    """The first two updates of a single weight, by Loshchilov & Hutter's algorithm 2."""
    betas, eps, rate, decay = (0.7, 0.9), 0.1, 0.01, 0.5
    settings = Training(learning_rate=rate, weight_decay=decay, betas=list(betas), adam_eps=eps)
    model = learner()
    optimizer = build_optimizer(model, settings)
    weight = next(p for name, p in model.named_parameters() if name.endswith("q_proj.weight"))
    torch.nn.init.ones_(weight)  # a random one may be as large as the updates, and what is left have few digits
    expected, first, second = 1.0, 0.0, 0.0
    for step, gradient in ((1, 2.0), (2, -0.5)):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        first, second = (
            beta * moment + (1 - beta) * gradient**power
            for beta, moment, power in zip(betas, (first, second), (1, 2), strict=True)
        )
        update = first / (1 - betas[0] ** step) / (math.sqrt(second / (1 - betas[1] ** step)) + eps)
        expected -= rate * (update + decay * expected)
        assert weight.detach()[0, 0].item() == pytest.approx(expected)


def test_parameters_that_do_not_train_are_left_out() -> None:
    model = learner()
    model.model.backbone.requires_grad_(False)
    model.model.token_table.weight.requires_grad_(True)
    optimizer = build_optimizer(model, Training())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [({}, {"bf16", "fp16"}), ({"avx512_bf16": True}, {"fp16"}), ({"amx_bf16": True, "amx_fp16": True}, set())],
)
def test_precisions_that_the_processor_lacks(
    capabilities: dict[str, bool], slow: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict.fromkeys(("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"), False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "cpu_name": "x", **known, **capabilities})
    for precision in ("auto", "fp32", "bf16", "fp16"):
        said = slow_precision(precision, torch.device("cpu"))
        assert (said is not None) == (precision in slow)
        assert said is None or "use training.precision=fp32" in said
        assert slow_precision(precision, torch.device("meta")) is None
    assert autocast_type("auto", torch.device("cpu")) is None
