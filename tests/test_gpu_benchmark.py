"""benchmarks/gpu.py at its smallest, on the CPU: what it prints and keeps, and that it does not pass what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_checks, gpu_speed
from benchmarks.gpu_checks import CHECKS, Deviation, Rig
from benchmarks.gpu_training import LEVELS, TEXTS, learner_of, pairs, shape_of
from pipeline.model import transformer
from pipeline.model.packing import Layout
from pipeline.training import step
from pipeline.training.prefetch import to_batch

CPU = torch.device("cpu")

# torch.compile keeps this warning of its own from being shown, which is too late where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of tiny products wait for each other, and a GPU would be taken for a device to measure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.exhaustive
def test_checks_then_a_line_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--json", str(tmp_path / "found.json"), "--profile"]) == 0
    machine, _, *lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in machine
    assert "no GPU" in machine
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("work")) :]
    assert table[0].split("  ")[-1].strip() == "wait %"
    assert [line.split()[:5] for line in table[2:7]] == [
        ["train", "toy", "descriptions", "bf16", "eager"],
        ["train", "toy", "descriptions", "fp32", "eager"],
        ["train", "toy", "descriptions", "fp16", "eager"],
        ["train", "toy", "512", "bf16", "compiled"],
        ["embed", "toy", "paragraphs", "fp32", "eager"],
    ]
    assert "aten::mm" in "\n".join(table)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == found["left_out"] == []
    assert {one["what"].split(":")[0] for one in found["deviations"]} >= {"micro-batches", "gradient checkpointing"}
    for speed in found["speeds"]:
        assert speed["tokens_per_s"] > speed["pairs_per_s"] > 0
        assert speed["mfu"] > 0
        assert speed["first_step_s"] > 0


def test_a_wrong_result_ends_it_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers that see other states where they are run again, and a check that breaks off."""

    def broken(rig: Rig) -> Iterator[Deviation]:
        yield Deviation("broken: batches that differ", 0, 0)
        raise RuntimeError("CUDA error:\nmisaligned address")

    monkeypatch.setattr(transformer, "checkpoint", lambda layer, x, *inputs, use_reentrant: layer(1.01 * x, *inputs))
    monkeypatch.setattr(gpu, "CHECKS", {"broken": broken, "checkpointing": CHECKS["checkpointing"]})
    monkeypatch.setattr(gpu, "measure", lambda *given: pytest.fail("measured what is wrong"))
    assert gpu.main([]) == 1
    sentences = capsys.readouterr().out.strip().splitlines()[-3:]
    assert sentences[0] == "broken: the check ended with RuntimeError: CUDA error: misaligned address."
    assert [one.split(":")[0] for one in sentences[1:]] == ["gradient checkpointing"] * 2
    assert sentences[2].endswith(", at most 0.0001.")


def _attention_of_few_bits(change: pytest.MonkeyPatch) -> None:
    def attend(*given: Any) -> Tensor:
        mixed = right(*given)
        return mixed if mixed.dtype == torch.float64 else mixed * 1.1

    right = gpu_checks.attend
    change.setattr(gpu_checks, "attend", attend)


def _texts_that_see_each_other(change: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, *options: Any) -> Tensor:
        whole = Layout(torch.tensor([0, len(q)]), len(q))
        return right(q, k, v, whole, whole, *options)

    right = transformer.attend
    change.setattr(transformer, "attend", attend)


def _compiled_into_another(change: pytest.MonkeyPatch) -> None:
    def compile_layers(encoder: transformer.Encoder, backend: str) -> None:
        encoder.layers[0].mlp.down_proj.weight.data *= 2  # type: ignore[union-attr, operator]

    change.setattr(gpu_checks, "compile_layers", compile_layers)


def _dropout_drawn_anew(change: pytest.MonkeyPatch) -> None:
    change.setattr(step, "_set_rng_state", lambda device, state: None)


def _copies_of_another_batch(change: pytest.MonkeyPatch) -> None:
    change.setattr(gpu_checks, "to_device", lambda part, device: replace(part, keys=part.keys + 1))


PLANTS = {
    "attention": _attention_of_few_bits,
    "packing": _texts_that_see_each_other,
    "compiled": _compiled_into_another,
    "micro-batches": _dropout_drawn_anew,
    "prefetch": _copies_of_another_batch,
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_check_finds_what_it_is_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(CPU, shape_of("toy"), pairs=4)
    PLANTS[name](monkeypatch)
    assert any(one.is_wrong for one in CHECKS[name](rig))


def test_no_number_is_wrong() -> None:
    assert Deviation("loss", float("nan"), 1.0).is_wrong
    assert not Deviation("loss", 1.0, 1.0).is_wrong


def test_a_micro_batch_that_does_not_fit_ends_the_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits by itself, and not beside the two that wait, is halved again."""
    most, case = 64, gpu_speed.Case("toy", "512", "fp32")
    tried: list[int] = []

    def run(runner: object, ready: gpu_speed._Ready) -> None:
        rows = ready.parts[0].rows
        tried.append(rows)
        if rows > most or (rows == most and tried.count(rows) > gpu_speed.DISTINCT):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_speed._Runner, "run", run)
    speed = gpu_speed.measure(case, CPU, gpu_speed.Bounds(seconds=0.0, steps=1, max_tokens=1 << 30))
    assert tried[:9] == [16, 16, 32, 32, 64, 64, 128, 64, 32]
    assert (speed.pairs, speed.tokens) == (32, 2 * 512 * 32)


def test_lengths_are_those_of_the_table() -> None:
    batch = to_batch(pairs("descriptions", 4000, vocab_size=50, seed=1))
    for field, quantiles in zip(("anchor", "positive"), TEXTS["descriptions"], strict=True):
        lengths = batch.fields[field].lengths.numpy()
        assert np.quantile(lengths, 0.5) == pytest.approx(quantiles[LEVELS.index(0.5)], rel=0.05)
        assert quantiles[0] <= lengths.min() <= lengths.max() <= quantiles[-1]
    row = batch.slice(7, 8)
    shared = torch.isin(row.fields["anchor"].ids[1::2], row.fields["positive"].ids)
    assert pairs("512", 2, 50, 1).equals(pairs("512", 2, 50, 1))
    assert shared.float().mean() > 0.4


def test_base_has_the_parameters_of_bert() -> None:
    with torch.device("meta"):
        learner = learner_of(shape_of("base"), torch.device("meta"))
    assert transformer.parameter_count(learner) == pytest.approx(110e6, rel=0.01)
