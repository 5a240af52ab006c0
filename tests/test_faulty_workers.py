"""What happens on one worker of two: out of memory, a loss that is no number; gradients sent in 16 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.model.batch import Batch
from pipeline.model.transformer import Attention
from pipeline.training.checkpoints import TrainState
from pipeline.training.loop import Run, TrainingStopped, train
from pipeline.training.step import OutOfMemory, backward, micro_batch_ranges
from pipeline.training.strategy import DataParallel, build_strategy
from tests.gloo_workers import Result, run_workers
from tests.test_step import ROWS, assert_equal, batch, gradients, learner_of, whole_gradients
from tests.test_training import config_of, new_run, rows


def _out_of_memory(function: Callable[..., object], at: int) -> Callable[..., object]:
    """As the allocator of a CPU says it, at the n-th call."""
    calls = iter(range(1000))

    def call(*args: object) -> object:
        if next(calls) == at:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return function(*args)

    return call


def _halved(rank: int, world_size: int, at: int) -> Result:
    """The loop's step, on workers of which the last runs out of memory at the n-th forward pass."""
    learner = learner_of("hybrid", dropout=0.0)
    if rank == world_size - 1:
        learner.model.forward = _out_of_memory(learner.model.forward, at)  # type: ignore[method-assign]
    strategy, tries = DataParallel(), 0
    strategy.attach(learner)
    share: Batch = batch().slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    for oom_splits in range(3):
        parts = [learner.prepare(share.slice(*ends), 7) for ends in micro_batch_ranges(share, 2, oom_splits=oom_splits)]
        tries += 1
        with suppress(OutOfMemory):
            backward(learner, strategy, parts)
            break
    return {"tries": torch.tensor(tries), **gradients(learner)}


@pytest.mark.parametrize("at", [0, 3])
def test_out_of_memory_on_one_worker_is_made_good_by_all(at: int) -> None:
    """In the first pass over the pairs, and in the second, while others send their gradients."""
    expected, _ = whole_gradients("hybrid")
    found = run_workers(2, _halved, at)
    assert int(found.pop("tries")) == 2
    assert_equal(found, expected)


def _loop(rank: int, world_size: int, fault: str) -> Result:
    """Twelve steps of the loop; the fault is on rank 1."""
    with tempfile.TemporaryDirectory() as folder:
        run = new_run(config_of(Path(folder), "training.log_every_steps=1"))
        _halve_rows(run, rank)
        _without_dropout(run)
        if rank == 1 and fault == "memory":
            run.learner.model.forward = _out_of_memory(run.learner.model.forward, 2)  # type: ignore[method-assign]
        elif rank == 1 and fault == "nan":
            compare, steps = run.learner.compare, iter(range(12))

            def broken(*args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                loss, metrics = compare(*args)
                return loss * (torch.nan if next(steps) == 4 else 1), metrics

            run.learner.compare = broken  # type: ignore[method-assign, assignment]
        state = train(run, TrainState())
        return {
            "oom_splits": torch.tensor(state.oom_splits),
            "skipped": torch.tensor(state.skipped_steps),
            **{name: tensor.detach().clone() for name, tensor in run.learner.state_dict().items()},
        }


def _without_dropout(run: Run) -> None:
    """Which is drawn anew for each micro-batch."""
    for module in run.learner.modules():
        if isinstance(module, Attention):
            module.dropout = 0.0
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _halve_rows(run: Run, rank: int) -> None:
    run.batches = lambda start, stop: (table.slice(4 * rank, 4) for table in rows(start, stop))


def test_the_loop_goes_on_in_smaller_micro_batches_to_the_same_weights() -> None:
    plain, halved = (run_workers(2, _loop, fault) for fault in ("", "memory"))
    assert (int(plain.pop("oom_splits")), int(halved.pop("oom_splits"))) == (0, 1)
    for name in plain:
        torch.testing.assert_close(halved[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_loss_that_is_no_number_on_one_worker_is_skipped_by_both() -> None:
    found = run_workers(2, _loop, "nan")
    assert int(found["skipped"]) == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


def _compressed(rank: int, world_size: int, kind: str) -> Result:
    learner = learner_of("contrastive")
    strategy = DataParallel({"fp16": torch.float16, "none": None}[kind])
    strategy.attach(learner)
    share = batch().slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    backward(learner, strategy, [learner.prepare(share, 7)])
    with tempfile.TemporaryDirectory() as folder:
        refused = config_of(Path(folder), "training.gradient_compression=bf16")
        with pytest.raises(ConfigError, match=r"found 'bf16', which gloo, .* cannot add"):
            build_strategy(refused, learner, torch.device("cpu"))
    return gradients(learner)


def test_gradients_sent_in_16_bits_are_near_and_bf16_is_refused_without_gpus() -> None:
    expected, _ = whole_gradients("contrastive")
    found = run_workers(2, _compressed, "fp16")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-3, rtol=2e-3, msg=name)
    assert any(not torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_record_that_does_not_fit_alone_ends_the_run(tmp_path: Path) -> None:
    run = new_run(config_of(tmp_path))

    def never(*args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.learner.model.forward = never  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match="step 0: out of memory with one record per micro-batch"):
        train(run, TrainState())
