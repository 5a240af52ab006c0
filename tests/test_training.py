"""The loop without Ray: exact accumulation, exact resume, checkpoints that can be trusted."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.config import Config, load
from pipeline.model.batch import Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.training.checkpoints import (
    TrainState,
    best_checkpoint,
    link_best,
    newest_valid,
    next_attempt,
    prune,
    read_state,
    start_from,
    step_folder,
)
from pipeline.training.loop import ControlFlags, Hooks, Run, TrainingStopped, build_run, train
from pipeline.training.optimizer import build_optimizer
from pipeline.training.prefetch import to_batch
from pipeline.training.saving import load_checkpoint, load_optimizer, save_checkpoint
from pipeline.training.validation import Validation

SHAPE = EncoderShape(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=24, dropout=0.2, norm_eps=1.0)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text("training: {global_batch_size: 8, learning_rate: 1e-2, max_steps: 12, validate_every_steps: 4}\n")
    return load(file, [f"storage.root={tmp_path}", *overrides], environ={})


def rows(start: int, stop: int) -> Iterator[pa.Table]:
    """Batches of eight pairs; a pair shares a rare token."""
    for step in range(start, stop):
        chance = torch.Generator().manual_seed(step)
        tokens = torch.randperm(56, generator=chance)[:8] + 8
        noise = torch.randint(0, 8, (8, 5), generator=chance)
        yield pa.table(
            {
                "id": [f"{step}-{i}" for i in range(8)],
                "anchor": [[int(t), int(n[0])] for t, n in zip(tokens, noise, strict=True)],
                "positive": [[*n.tolist(), int(t)] for t, n in zip(tokens, noise, strict=True)],
            },
            schema=pa.schema(
                [("id", pa.string()), ("anchor", pa.list_(pa.int32())), ("positive", pa.list_(pa.int32()))]
            ),
        )


def new_learner(config: Config) -> Learner:
    torch.manual_seed(0)
    encoder = Encoder(SHAPE)
    encoder.zero_residual_branches()
    decoder = None
    if config.objective.needs_decoder:
        decoder = Decoder(DecoderShape(64, 16, 1, 2, 24, dropout=0.2, memory_width=16), encoder.token_table)
    special = Special(start=2, end=3, mask=4, kept=frozenset(range(5)), vocab_size=64)
    return Learner(EmbeddingModel(encoder), config.objective, special, decoder)


def new_run(config: Config, save: object = lambda run, state, is_best: None, stop: int = 12) -> Run:
    validation = Validation(to_batch(next(rows(0, 1))), lambda ids: [str(each) for each in ids], generated_texts=2)
    hooks = Hooks(save, lambda metrics: None)  # type: ignore[arg-type]
    return build_run(config, new_learner(config), lambda a, b: rows(a, min(b, stop)), validation, 12, hooks)


def encoder_of(run: Run) -> Encoder:
    assert isinstance(run.learner.model.backbone, Encoder)
    return run.learner.model.backbone


def saver(folder: Path):  # type: ignore[no-untyped-def]
    def save(run: Run, state: TrainState, is_best: bool) -> None:
        target = folder / "attempt-001" / step_folder(state.step)
        target.mkdir(parents=True, exist_ok=True)
        save_checkpoint(target, run, state, "{}")
        if is_best:
            link_best(target, folder, (target / "state.json").read_text())

    return save


HYBRID = [
    "objective.contrastive.learn_temperature=true",
    "objective.denoising.weight=0.5",
    "objective.mlm.weight=0.5",
    "training.gradient_accumulation_steps=2",
]


@pytest.mark.parametrize(("killed_at", "options"), [(3, []), (6, []), (7, HYBRID), (11, [])])
def test_resumed_weights_are_bit_identical(killed_at: int, options: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, "checkpointing.every_steps=3", "training.table_warmup_fraction=0.5", *options)
    whole = new_run(config, saver(tmp_path / "whole"))
    state = train(whole, TrainState())
    assert state.step == 12

    train(new_run(config, saver(tmp_path / "killed"), stop=killed_at), TrainState())  # its feed ends: nothing is saved
    point = newest_valid(tmp_path / "killed")
    assert point.folder is not None
    resumed, start = new_run(config), point.state
    load_checkpoint(point.folder, resumed)
    assert killed_at - 4 < start.step <= killed_at
    assert train(resumed, start).step == 12
    for name, tensor in whole.learner.state_dict().items():
        assert torch.equal(tensor, resumed.learner.state_dict()[name]), name


def test_the_loss_falls_and_layers_join(tmp_path: Path) -> None:
    """On one batch, again and again."""
    seen: list[tuple[float, int]] = []
    run = new_run(config_of(tmp_path, "training.table_warmup_fraction=0.5", "training.log_every_steps=1"))
    run.batches = lambda start, stop: (next(rows(0, 1)) for _ in range(start, stop))

    def note(metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            seen.append((metrics["loss"], encoder_of(run).active_layers))

    run.hooks.report = note
    train(run, TrainState())
    losses, active = zip(*seen, strict=True)
    assert losses[-1] < 0.3 * losses[0]
    assert active == (0,) * 6 + (1,) * 6
    assert encoder_of(run).layers[0].mlp.down_proj.weight.abs().sum() > 0


def test_validation_of_a_hybrid(tmp_path: Path) -> None:
    config = config_of(tmp_path, *HYBRID, "objective.seq2seq.weight=1")
    state = train(new_run(config), TrainState())
    metrics = {name.removeprefix("validation_") for name in state.metrics}
    assert metrics >= {"loss", "ndcg@10", "recall@1"}
    for name in ("denoising", "seq2seq", "mlm"):
        assert state.metrics[f"validation_{name}_perplexity"] == pytest.approx(
            math.exp(state.metrics[f"validation_{name}_nll"])
        )
    assert metrics >= {f"{name}_{score}" for name in ("denoising", "seq2seq") for score in ("bleu", "rougeL")}
    assert state.best_metric is not None


def test_without_pairs_the_best_has_the_least_loss(tmp_path: Path) -> None:
    state = train(new_run(config_of(tmp_path, "objective.mlm.weight=0.5")), TrainState())
    assert state.best_metric == pytest.approx(-0.5 * state.metrics["validation_mlm_nll"], abs=0.1)
    assert "validation_ndcg@10" not in state.metrics


def test_a_time_limit_ends_with_a_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path, "training.max_time_s=1e-9", "training.log_every_steps=2")
    saved: list[int] = []
    state = train(new_run(config, lambda run, state, is_best: saved.append(state.step)), TrainState())
    assert state.step == 2
    assert saved == [2]
    assert "validation_ndcg@10" in state.metrics


def test_checkpoints_by_steps_and_by_minutes(tmp_path: Path) -> None:
    saved: list[int] = []
    plain = ["training.log_every_steps=3", "training.validate_every_steps=100", "checkpointing.every_steps=5"]
    train(new_run(config_of(tmp_path, *plain), lambda run, state, is_best: saved.append(state.step)), TrainState())
    assert saved == [5, 10, 12]
    saved.clear()
    often = config_of(tmp_path, *plain, "checkpointing.every_minutes=1e-9")
    train(new_run(often, lambda run, state, is_best: saved.append(state.step)), TrainState())
    assert saved == [3, 5, 6, 9, 10, 12]


def test_asked_to_stop_a_run_ends_with_a_checkpoint_and_asked_to_save_goes_on(tmp_path: Path) -> None:
    saved: list[int] = []
    run = new_run(config_of(tmp_path), lambda run, state, is_best: saved.append(state.step))
    run.hooks.control_flags = lambda step: ControlFlags(stop=step == 6, save=step == 1)
    state = train(run, TrainState())
    assert saved == [2, 4, 7]
    assert state.step == 7


def test_patience_ends_a_run(tmp_path: Path) -> None:
    impatient = ["training.early_stopping={patience: 1, min_delta: 0.9}", "training.validate_every_steps=2"]
    state = train(new_run(config_of(tmp_path, *impatient)), TrainState())
    assert state.ended_early
    assert state.step == 4


def test_losses_that_are_no_numbers_are_skipped_and_then_stop_the_run(tmp_path: Path) -> None:
    """The third step's texts give no finite loss; at last none does."""
    run = new_run(config_of(tmp_path, "training.max_skipped_steps=3", "checkpointing.every_steps=2"))
    alerts: list[str] = []
    run.hooks.alert = lambda title, text, step: alerts.append(text)
    compare, steps = run.learner.compare, iter(range(12))

    def broken(*args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = compare(*args)
        return loss * (math.nan if next(steps) in (2, 4, 5, 6) else 1), metrics

    run.learner.compare = broken  # type: ignore[method-assign, assignment]
    state = TrainState()
    with pytest.raises(TrainingStopped, match=r"step 6: the loss .* 3 steps in a row.* of step 6.* 6-0, 6-1, 6-2"):
        train(run, state)
    assert state.skipped_steps == 4
    assert alerts == [f"step {k}: the loss is NaN or infinite" for k in (2, 4, 5)]
    assert all(bool(torch.isfinite(p).all()) for p in run.learner.parameters())


def test_fp16_scales_the_loss_and_gives_up_scales_that_are_too_large(tmp_path: Path) -> None:
    run = new_run(config_of(tmp_path, "training.precision=fp16", "training.log_every_steps=1"))
    losses: list[float] = []
    run.hooks.report = lambda metrics: losses.append(metrics["loss"]) if "loss" in metrics else None
    run.batches = lambda start, stop: (next(rows(0, 1)) for _ in range(start, stop))
    state = train(run, TrainState())
    assert 0 < state.skipped_steps < 12
    assert state.scaler["scale"] < 2.0**16
    assert losses[-1] < losses[0]


def test_decay_is_on_matrices_of_layers_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, "training.table_learning_rate=2e-3", "training.weight_decay=0.1")
    learner = new_learner(config)
    optimizer = build_optimizer(learner, config.training)
    decayed = [p.shape for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert len(decayed) == 7
    assert all(len(shape) == 2 for shape in decayed)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(learner.parameters()))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 4, 8 and 12."""
    config = config_of(tmp_path, "checkpointing.every_steps=4")
    train(new_run(config, saver(tmp_path / "run")), TrainState())
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "missing", "no state"])
def test_a_damaged_checkpoint_is_passed_over_by_name(damage: str, run_dir: Path) -> None:
    newest = run_dir / "attempt-001" / step_folder(12)
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "state.json").write_text("{")
    point = newest_valid(run_dir)
    assert (point.folder, point.state.step) == (run_dir / "attempt-001" / step_folder(8), 8)
    assert len(point.skipped) == 1
    assert str(newest) in point.skipped[0]
    prune(run_dir, keep=1, newest=point.folder)
    assert [folder.name for folder in (run_dir / "attempt-001").iterdir()] == [step_folder(8)]


def test_a_checkpoint_is_resumed_with_the_rates_and_the_decay_of_the_config(run_dir: Path, tmp_path: Path) -> None:
    """Also where they make groups of the optimizer equal. The moments stay those of each parameter."""
    checkpoint = run_dir / "attempt-001" / step_folder(8)
    options = ["training.learning_rate=3e-3", "training.table_learning_rate=5e-3", "training.betas=[0.8, 0.9]"]
    same, other = new_run(config_of(tmp_path)), new_run(config_of(tmp_path, "training.weight_decay=0", *options))
    for run in (same, other):
        load_checkpoint(checkpoint, run)
    pairs = zip(same.learner.named_parameters(), other.learner.named_parameters(), strict=True)
    for (name, kept), (_, resumed) in pairs:
        assert torch.equal(kept, resumed)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(same.optimizer.state[kept][moment], other.optimizer.state[resumed][moment]), name
    table = other.learner.model.token_table.weight
    for group in other.optimizer.param_groups:
        is_table = any(parameter is table for parameter in group["params"])
        assert (group["peak"], group["weight_decay"], group["betas"]) == (5e-3 if is_table else 3e-3, 0, (0.8, 0.9))


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_starts_from_the_checkpoint_of_another(broken: bool, run_dir: Path, tmp_path: Path) -> None:
    """Its best score stays its own, like its best model."""
    other = tmp_path / "other"
    train(new_run(config_of(tmp_path, "checkpointing.every_steps=4"), saver(other), stop=8), TrainState())
    own, source = newest_valid(other).state, run_dir / "attempt-001" / step_folder(12)
    if broken:
        (source / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"its model\.safetensors is missing"):
            start_from(other, source)
        assert newest_valid(other).state == own
        return
    start_from(other, source)
    (copied,) = other.glob("attempt-*/step-*")
    assert newest_valid(other).state == replace(read_state(source), best_metric=own.best_metric)
    for file in source.iterdir():
        assert file.name == "state.json" or (copied / file.name).read_bytes() == file.read_bytes()
    start_from(other, None)
    assert newest_valid(other).folder is None


def test_a_planted_pickle_is_not_run(run_dir: Path) -> None:
    planted = run_dir / "planted"

    class Payload:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (planted,))

    checkpoint = run_dir / "attempt-001" / step_folder(12)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        load_optimizer(checkpoint, torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), torch.device("cpu"))
    assert not planted.exists()


def test_best_is_one_whole_folder_and_outlives_the_attempt(run_dir: Path) -> None:
    best = best_checkpoint(run_dir)
    assert best is not None
    assert best.parent == run_dir / "best"
    assert [f.name for f in (run_dir / "best").iterdir()] == [best.name]
    prune(run_dir, keep=0)
    assert not list(run_dir.glob("attempt-*"))
    assert best_checkpoint(run_dir) == best
    assert read_state(best).metrics["validation_ndcg@10"] == read_state(best).best_metric


def test_prune_keeps_the_newest_whole_ones_of_all_attempts(run_dir: Path) -> None:
    assert next_attempt(run_dir) == "attempt-002"
    (run_dir / "attempt-002").mkdir()
    (run_dir / "attempt-001" / step_folder(8)).rename(run_dir / "attempt-002" / step_folder(8))
    (run_dir / "attempt-002" / step_folder(16)).mkdir()  # empty: it was never finished
    (run_dir / "attempt-003").mkdir()
    prune(run_dir, keep=2)
    left = sorted(str(f.relative_to(run_dir)) for f in run_dir.glob("attempt-*/*"))
    assert left == [f"attempt-001/{step_folder(12)}", f"attempt-002/{step_folder(8)}"]
    assert not (run_dir / "attempt-003").exists()
