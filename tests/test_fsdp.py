"""fsdp against ddp, a single process and itself without a break; checkpoints that workers write together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException

from pipeline.config import Config, load
from pipeline.config.training import Training
from pipeline.model.batch import Special
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head
from pipeline.model.learner import Learner
from pipeline.model.pretrained import load_pretrained
from pipeline.model.transformer import Encoder, EncoderShape, compile_layers
from pipeline.training import saving
from pipeline.training.assembly import resume
from pipeline.training.checkpoints import TrainState, is_sharded, read_state
from pipeline.training.fsdp import FullySharded
from pipeline.training.loop import Hooks, Run, TrainingStopped, build_run, train
from pipeline.training.optimizer import build_optimizer
from pipeline.training.prefetch import to_batch
from pipeline.training.saving import LocalSaver, consolidate, load_sharded, load_weights, save_sharded
from pipeline.training.step import backward, micro_batch_ranges
from pipeline.training.strategy import DataParallel
from pipeline.training.trackers import Trackers
from pipeline.training.validation import Validation
from tests import test_training
from tests.gloo_workers import Result, run_workers
from tests.test_pretrained import saved
from tests.test_step import assert_equal, batch, gradients, learner_of, whole_gradients

CPU = torch.device("cpu")
STEPS = 20
HYBRID = [
    "objective.contrastive={learn_temperature: true, temperature: 0.1}",
    "objective.denoising.weight=0.5",
    "objective.mlm.weight=0.5",
]
VARIANTS: dict[str, list[str]] = {
    "hybrid": HYBRID,
    # Five rows of eight tokens make three parts, three rows two.
    "uneven": [*HYBRID, "training.micro_batch_tokens=16", "training.table_warmup_fraction=0.25"],
    "checkpointed, fp16": [
        *HYBRID,
        "model.gradient_checkpointing=true",
        "training.gradient_accumulation_steps=2",
        "training.precision=fp16",
    ],
    "bert": [*HYBRID, "training.micro_batch_tokens=16", "model.pretrained=bert"],
}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(learner: Learner) -> Result:
    return {name: whole(tensor) for name, tensor in learner.state_dict().items()}


def state_of(learner: Learner, optimizer: torch.optim.Optimizer) -> Result:
    """All that a checkpoint is to bring back."""
    if isinstance(learner, FSDPModule):
        learner.reshard()
    found = weights_of(learner)
    for name, parameter in learner.named_parameters():
        found |= {f"{name} {key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return found


def config_of(folder: Path, rank: int, *overrides: str) -> Config:
    file = folder / f"{rank}.yaml"  # each worker writes its own
    file.write_text(
        "training: {global_batch_size: 8, learning_rate: 1e-2, max_steps: 20, log_every_steps: 1,"
        " validate_every_steps: 10}\n"
    )
    return load(file, [f"storage.root={folder}", *overrides], environ={})


def learner_for(config: Config, folder: Path, dropout: float) -> Learner:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 24}
    if config.model.pretrained:
        backbone: Any = load_pretrained(folder / "bert")
    else:
        backbone = Encoder(EncoderShape(**shape, dropout=dropout))
        backbone.zero_residual_branches()
        backbone.gradient_checkpointing = config.model.gradient_checkpointing
    decoder = Decoder(DecoderShape(**shape, dropout=dropout, memory_width=32), backbone.token_table)
    decoder.gradient_checkpointing = config.model.gradient_checkpointing
    special = Special(start=2, end=3, mask=4, kept=frozenset(range(5)), vocab_size=64)
    return Learner(EmbeddingModel(backbone), config.objective, special, decoder)


def share(rank: int, world_size: int, table: pa.Table) -> pa.Table:
    """Five of eight rows, and three."""
    first = 5 * rank if world_size == 2 else 0
    return table.slice(first, (8, 5, 3)[rank + world_size - 1])


def run_of(rank: int, world_size: int, folder: Path, strategy: str, options: list[str], dropout: float = 0.0) -> Run:
    config = config_of(folder, rank, f"training.strategy={strategy}", *options)
    return build_run(
        config,
        learner_for(config, folder, dropout),
        lambda a, b: (share(rank, world_size, table) for table in test_training.rows(a, b)),
        Validation(to_batch(next(test_training.rows(0, 1)).slice(0, 7)), lambda ids: [str(each) for each in ids], 3),
        STEPS,
        Hooks(lambda run, state, is_best: None, lambda metrics: None),
    )


def _both(rank: int, world_size: int, folder: str, options: list[str]) -> Result:
    """Losses and validations of a run under either strategy."""
    found: Result = {}
    for strategy in ("ddp", "fsdp"):
        run, losses = run_of(rank, world_size, Path(folder), strategy, options), []
        assert isinstance(run.strategy, FullySharded) == (strategy == "fsdp")
        run.hooks.report = lambda metrics, losses=losses: losses.append(metrics["loss"]) if "loss" in metrics else None  # type: ignore[misc]
        state = train(run, TrainState())
        found[f"{strategy} losses"] = torch.tensor(losses)
        found |= {f"{strategy} {name}": torch.tensor(value) for name, value in state.metrics.items()}
        found[f"{strategy} temperature"] = run.learner.log_scale.detach().clone()
    return found


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=[pytest.mark.exhaustive] if i else []) for i, each in enumerate(VARIANTS)]
)
def test_a_run_has_the_losses_and_scores_of_ddp(variant: str, tmp_path: Path) -> None:
    """Clipping, a learned temperature, denoising and masked tokens beside; validations every ten steps."""
    saved(tmp_path / "bert", "bert", vocab_size=64)
    result = run_workers(2, _both, str(tmp_path), VARIANTS[variant])
    names = [name.removeprefix("ddp ") for name in result if name.startswith("ddp ")]
    assert {"losses", "validation_ndcg@10", "validation_denoising_bleu", "validation_mlm_nll"} <= set(names)
    assert len(result["ddp losses"]) == STEPS
    assert result["ddp losses"][-1] < result["ddp losses"][0]
    close = 1e-3 if "fp16" in variant else 1e-5  # what 16 bits can tell apart
    for name in names:
        torch.testing.assert_close(result[f"fsdp {name}"], result[f"ddp {name}"], rtol=close, atol=0.1 * close)


def _gradients(rank: int, world_size: int, name: str, options: set[str]) -> Result:
    """A step's gradients, made whole, of uneven shares in uneven numbers of micro-batches; their norm."""
    learner = learner_of(name)
    for stack in learner.stacks:
        stack.gradient_checkpointing = "checkpointing" in options
        if "compile" in options:
            compile_layers(stack, "aot_eager")
    strategy = FullySharded(learner, CPU)
    strategy.attach(learner)
    rows = batch().slice(*((0, 3), (3, 8))[rank])
    parts = [learner.prepare(rows.slice(*ends), 7) for ends in micro_batch_ranges(rows, 1 + 2 * rank)]
    metrics = backward(learner, strategy, parts).metrics
    found = {key: whole(gradient) for key, gradient in gradients(learner).items()}
    loss = metrics["loss"].double()
    dist.all_reduce(loss)
    return {**found, "loss": loss / world_size, "norm": strategy.clip(1e-3), "clipped": strategy.clip(1.0)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hybrid", {"checkpointing"}),
        pytest.param("contrastive", set(), marks=pytest.mark.exhaustive),
        pytest.param("seq2seq", {"compile"}, marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_are_those_of_a_single_process(name: str, options: set[str]) -> None:
    expected, metrics = whole_gradients(name)
    found = run_workers(2, _gradients, name, options)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(found.pop("loss"), metrics["loss"].double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.pop("norm"), norm)
    torch.testing.assert_close(found.pop("clipped"), torch.tensor(1e-3, dtype=norm.dtype), atol=1e-6, rtol=0)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "pooling",
    ["last", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("mean", "cls", "weighted", "max"))],
)
def test_an_empty_part_changes_no_gradient(pooling: str) -> None:
    found = []
    for empty in (0, 2):
        learner = learner_of("hybrid")
        learner.model.head = Head(pooling)
        strategy = DataParallel()
        strategy.attach(learner)
        part = learner.prepare(batch(), 7)
        parts = [part, *[part.emptied()] * empty]
        backward(learner, strategy, parts)
        found.append(gradients(learner))
    assert_equal(*found)


def test_vectors_of_no_texts_lead_to_every_layer(tmp_path: Path) -> None:
    """A worker without texts must meet the others in each layer of a pretrained model."""
    model = EmbeddingModel(load_pretrained(saved(tmp_path, "bert")), Head("cls"))
    none = batch().fields["anchor"].slice(0, 0)
    vectors = model(none)
    assert vectors.shape == (0, 32)
    vectors.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def _out_of_memory(rank: int, world_size: int, folder: str) -> Result:
    """The last worker has no memory for its fourth forward pass; the others wait for it."""
    run, passes = run_of(rank, world_size, Path(folder), "fsdp", []), iter(range(100))

    def hook(*_: object) -> None:
        if rank == world_size - 1 and next(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run.learner.model.register_forward_pre_hook(hook)
    train(run, TrainState())
    return {}


def _started_again(rank: int, world_size: int, folder: str) -> Result:
    run = run_of(rank, world_size, Path(folder), "fsdp", [])
    return {"oom_splits": torch.tensor(resume(run).oom_splits)}


def test_out_of_memory_on_one_worker_halves_the_micro_batches_of_the_next_start(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="micro-batches half as large"):
        run_workers(2, _out_of_memory, str(tmp_path))
    assert run_workers(2, _started_again, str(tmp_path))["oom_splits"] == 1


def _saved(rank: int, world_size: int, folder: str) -> Result:
    learner = learner_of("hybrid")
    strategy = FullySharded(learner, CPU)
    strategy.attach(learner)
    optimizer = build_optimizer(learner, Training())
    for seed in range(2):
        backward(learner, strategy, [learner.prepare(batch().slice(4 * rank, 4 * rank + 4), seed)])
        strategy.clip(1.0)
        optimizer.step()
    with torch.no_grad():
        learner.embed(learner.prepare(batch(), 0))  # as a validation does, before the checkpoint
    save_sharded(Path(folder), learner, optimizer)
    with pytest.raises(OSError, match=r"worker \d raised"):
        save_sharded(Path(folder) / "file", learner, optimizer)
    return state_of(learner, optimizer)


def _loaded(rank: int, world_size: int, folder: str, again: str) -> Result:
    learner = strangers(learner_of("hybrid"))
    FullySharded(learner, CPU)
    optimizer = build_optimizer(learner, Training())
    load_sharded(Path(folder), learner, optimizer)
    save_sharded(Path(again), learner, optimizer)
    return state_of(learner, optimizer)


def strangers(learner: Learner) -> Learner:
    """With other weights."""
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1)
    return learner


def assert_identical(found: Result, expected: Result) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.slow
def test_checkpoints_of_two_workers_load_on_one_and_on_three(tmp_path: Path) -> None:
    """Bit by bit, into fsdp, into a lone process, and made whole."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "file").write_text("in the way")
    expected = run_workers(2, _saved, str(tmp_path / "two"))
    assert any(name.endswith("exp_avg") for name in expected)
    for workers in (1, 3):
        again = tmp_path / str(workers)
        assert_identical(run_workers(workers, _loaded, str(tmp_path / "two"), str(again)), expected)
        assert len(list(again.rglob("*"))) == 2 + 2 * workers
        assert all(path.suffix == ".safetensors" for path in again.rglob("*") if path.is_file())

    alone = strangers(learner_of("hybrid"))
    optimizer = build_optimizer(alone, Training())
    load_sharded(tmp_path / "3", alone, optimizer)
    assert_identical(state_of(alone, optimizer), expected)

    assert is_sharded(tmp_path / "3")
    consolidate(tmp_path / "3")
    from_whole = strangers(learner_of("hybrid"))
    load_weights(tmp_path / "3", from_whole)
    for name, tensor in from_whole.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def saver_of(run: Run) -> LocalSaver:
    return LocalSaver(run.config, "{}", "", Trackers.open(run.config, 0, leader=False))


def _saved_by_a_slow_leader(rank: int, world_size: int, folder: str) -> Result:
    """Rank 0 is held up between emptying the folder of a checkpoint and making it."""
    run = run_of(rank, world_size, Path(folder), "fsdp", [])
    run.strategy.attach(run.learner)
    if rank == 0:
        empty = saving.shutil.rmtree

        def slow(*args: Any, **kwargs: Any) -> None:
            empty(*args, **kwargs)
            time.sleep(0.5)

        saving.shutil.rmtree = slow  # type: ignore[assignment]
    saver_of(run).save(run, TrainState(step=1), False)
    return {}


def test_the_parts_of_all_workers_are_one_checkpoint(tmp_path: Path) -> None:
    run_workers(2, _saved_by_a_slow_leader, str(tmp_path))
    (state,) = tmp_path.rglob("state.json")
    assert not list(tmp_path.glob("runs/*/incoming/*/step-*"))
    assert read_state(state.parent).step == 1
    assert len(list(state.parent.glob("weights/shard-*"))) == 2


def _saved_with_a_file_in_the_way(rank: int, world_size: int, folder: str) -> Result:
    run = run_of(rank, world_size, Path(folder), "fsdp", [])
    saver = saver_of(run)
    if rank == 0:
        saver.incoming.parent.mkdir(parents=True, exist_ok=True)
        saver.incoming.write_text("in the way")
    try:
        saver.save(run, TrainState(step=1), False)
    except TrainingStopped as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    return {}


def test_what_keeps_one_worker_from_writing_stops_all(tmp_path: Path) -> None:
    run_workers(2, _saved_with_a_file_in_the_way, str(tmp_path))
    said = [Path(tmp_path, f"{rank}.txt").read_text() for rank in range(2)]
    for text, reason in zip(said, ("Not a directory", "see another worker's error"), strict=True):
        assert text.startswith("step 1: cannot write the checkpoint to ")
        assert f"({reason}); make room there" in text
