"""The training loop: batches in, metrics and checkpoints out. It uses torch.distributed, not Ray.

    run = build_run(config, learner, feed.batches, validation, total_steps, Hooks(save=saver.save, report=print))
    state = train(run, TrainState())               # from the first step; pass a checkpoint's state to resume

All workers make the same decisions: seeds are functions of (seed, step, rank), and workers share elapsed time and
validation scores before they act on them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.core.console import log
from pipeline.model.batch import Batch, MicroBatch
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, compile_layers
from pipeline.training.checkpoints import TrainState, note_oom_splits
from pipeline.training.collectives import rank, world_size
from pipeline.training.meter import Meter, step_flops
from pipeline.training.optimizer import Precision, Schedule, build_optimizer
from pipeline.training.prefetch import Prefetch, to_batch, to_device
from pipeline.training.step import OutOfMemory, StepResult, backward, micro_batch_ranges
from pipeline.training.stopping import BestModel
from pipeline.training.strategy import Strategy, build_strategy
from pipeline.training.validation import Validation, validate

Batches = Callable[[int, int], Iterator[pa.Table]]
"""Given `start` and `stop`, yields this worker's rows of those steps, one table per step."""


class TrainingStopped(RuntimeError):  # noqa: N818  # not a bug: the run cannot continue
    """Training cannot continue. The message gives the cause, the step, and the checkpoint to resume from."""


@dataclass(frozen=True)
class ControlFlags:
    """Requests from outside that the loop handles after a step."""

    stop: bool = False
    """Write a checkpoint and end."""
    save: bool = False
    """Write a checkpoint and continue."""


@dataclass
class Hooks:
    """Callbacks of the loop."""

    save: Callable[[Run, TrainState, bool], None]
    """Called on every worker with the run, its state, and whether it is the best so far."""
    report: Callable[[dict[str, float]], None]
    """Called on rank 0 with metrics, every `training.log_every_steps` and after each validation."""
    alert: Callable[[str, str, int], None] = lambda title, text, step: log.warning("%s: %s", title, text)
    """Called on rank 0 with a title, a sentence and the step when something is wrong."""
    control_flags: Callable[[int], ControlFlags] = lambda step: ControlFlags()
    """Called on every worker at each step."""


@dataclass(frozen=True)
class PreparedStep:
    """A step's batch, split into micro-batches on the device."""

    batch: Batch
    parts: list[MicroBatch]
    flops: float
    oom_splits: int


@dataclass
class Run:
    """Everything the loop needs; `build_run` makes one."""

    config: Config
    learner: Learner
    batches: Batches
    validation: Validation
    total_steps: int
    hooks: Hooks
    device: torch.device
    schedule: Schedule
    precision: Precision
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    saved_step: int | None = None

    def prepare_step(self, batch: Batch, step: int, oom_splits: int) -> PreparedStep:
        """Split a batch and prepare its micro-batches. How texts are corrupted depends on the step."""
        settings = self.config.training
        ranges = micro_batch_ranges(
            batch, settings.gradient_accumulation_steps, settings.micro_batch_tokens, oom_splits
        )
        seed = _seed(settings.seed, step)
        parts = [self.learner.prepare(batch.slice(*ends), seed) for ends in ranges]
        return PreparedStep(batch, to_device(parts, self.device), step_flops(self.learner, parts), oom_splits)


def build_run(
    config: Config,
    learner: Learner,
    batches: Batches,
    validation: Validation,
    total_steps: int,
    hooks: Hooks,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Run:
    """Move the learner to the device, compile and shard it as the config asks, and build its optimizer."""
    settings = config.training
    learner.to(device)
    if settings.compile:
        for stack in learner.stacks:
            compile_layers(stack)
    schedule, precision = Schedule.of(settings, total_steps), Precision(settings.precision, device)
    strategy = build_strategy(config, learner, device)
    optimizer = build_optimizer(learner, settings)
    return Run(
        config, learner, batches, validation, total_steps, hooks, device, schedule, precision, strategy, optimizer
    )


def train(run: Run, state: TrainState) -> TrainState:
    """Train from `state` to the end of the run or its time limit, then validate and write a checkpoint.

    When asked to stop, it writes a checkpoint without validating. Raises TrainingStopped if it cannot continue, and
    OutOfMemory if the workers of a sharded model must restart from the newest checkpoint.
    """
    settings, checkpointing = run.config.training, run.config.checkpointing
    run.saved_step = state.step or None
    run.precision.load(state.scaler)
    _set_trained_layers(run, state.step)
    steps = iter(range(state.step, run.total_steps))
    feed = Prefetch(
        run.batches(state.step, run.total_steps),
        lambda rows: run.prepare_step(
            to_batch(rows, run.learner.hard_negatives, run.learner.views), next(steps), state.oom_splits
        ),
        run.device,
    )
    meter, saved_at = Meter(settings, run.total_steps, run.device, state), state.train_seconds
    with closing(feed):
        for ready in feed:
            if state.step == run.schedule.table_steps:
                _set_trained_layers(run, state.step)
            run.schedule.apply(run.optimizer, state.step)
            outcome = _gradients(run, ready, state)
            _update(run, ready, outcome, state)
            state.step += 1

            ended = state.step == run.total_steps
            metrics = meter.count(ready.batch, ready.flops, outcome.metrics, feed.waited_s, last=ended)
            if metrics:
                rate = run.optimizer.param_groups[0]["lr"]
                _report(
                    run, {"step": state.step, **metrics, "learning_rate": rate, "skipped_steps": state.skipped_steps}
                )
            stop, save = (bool(each) for each in outcome.flags)
            ended |= settings.max_time_s is not None and state.train_seconds >= settings.max_time_s
            is_best = False
            if not stop and (ended or state.step % settings.validate_every_steps == 0):
                is_best = _validate(run, state)
            overdue = state.train_seconds - saved_at >= 60 * (checkpointing.every_minutes or math.inf)
            ended |= stop or state.ended_early
            if ended or save or is_best or overdue or state.step % checkpointing.every_steps == 0:
                state.scaler = run.precision.state()
                run.hooks.save(run, state, is_best)
                saved_at, run.saved_step = state.train_seconds, state.step
            if ended:
                break
    return state


def _set_trained_layers(run: Run, step: int) -> None:
    """Train the token table alone while it warms up, then all layers."""
    encoder = run.learner.model.backbone
    if isinstance(encoder, Encoder):
        layers_join = step >= run.schedule.table_steps
        encoder.active_layers = encoder.shape.num_layers if layers_join else 0
        encoder.layers.requires_grad_(layers_join)
    run.learner.train()
    run.strategy.attach(run.learner)


def _gradients(run: Run, ready: PreparedStep, state: TrainState) -> StepResult:
    """Compute the step's gradients. If a worker runs out of memory, all retry with smaller micro-batches."""
    flags = run.hooks.control_flags(state.step)
    while True:
        if ready.oom_splits != state.oom_splits:
            ready = run.prepare_step(ready.batch, state.step, state.oom_splits)
        torch.manual_seed(_seed(run.config.training.seed, state.step, rank()))  # of dropout
        try:
            return backward(
                run.learner,
                run.strategy,
                ready.parts,
                autocast=run.precision.autocast,
                loss_scale=run.precision.loss_scale,
                flags=(flags.stop, flags.save),
            )
        except OutOfMemory:
            if run.strategy.is_sharded:
                note_oom_splits(run.config.run_dir, state.oom_splits + 1)
                raise
        _halve_micro_batches(run, state)


def _halve_micro_batches(run: Run, state: TrainState) -> None:
    """Halve the micro-batches for the rest of the run. Raises TrainingStopped if a single record does not fit."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    state.oom_splits += 1
    if 2 ** (state.oom_splits - 1) >= run.config.training.global_batch_size:
        raise TrainingStopped(
            f"step {state.step}: out of memory with one record per micro-batch; lower tokenizer.max_length, set "
            "model.gradient_checkpointing=true or use a smaller model"
        )
    if rank() == 0:
        run.hooks.alert(
            "out of memory", f"step {state.step} is retried; micro-batches are half as large from now on", state.step
        )


def _update(run: Run, ready: PreparedStep, outcome: StepResult, state: TrainState) -> None:
    """Run the optimizer; if the loss or the gradient is NaN or infinite, all workers skip the step."""
    run.precision.unscale(run.optimizer)
    norm = float(run.strategy.clip(run.config.training.max_grad_norm))
    outcome.metrics["grad_norm"] = torch.tensor(norm, device=run.device)
    if math.isfinite(norm) and not outcome.bad_losses:
        run.precision.step(run.optimizer)
        state.skipped_in_a_row = 0
        return
    state.skipped_steps += 1
    state.skipped_in_a_row += not (run.precision.may_be_too_large and not outcome.bad_losses)
    run.precision.skip()
    found = "the loss" if outcome.bad_losses else "the gradient's norm"
    if state.skipped_in_a_row >= run.config.training.max_skipped_steps:
        raise TrainingStopped(
            f"step {state.step}: {found} is NaN or infinite; {state.skipped_in_a_row} steps in a row were skipped; "
            f"resume from the last good checkpoint, of step {run.saved_step or 'none'}, with a lower "
            "training.learning_rate and checkpointing.accept_changes=[training.learning_rate]; the records of this "
            f"step were {_ids(ready.batch)}"
        )
    if rank() == 0:
        run.hooks.alert("step skipped", f"step {state.step}: {found} is NaN or infinite", state.step)


def _ids(batch: Batch) -> str:
    """The ids of the global batch's records, in rank order."""
    gathered: list[list[str]] = [batch.ids] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, batch.ids)
    return ", ".join(record_id for ids in gathered for record_id in ids)


def _report(run: Run, metrics: dict[str, float]) -> None:
    if rank() == 0:
        run.hooks.report(metrics)


def _validate(run: Run, state: TrainState) -> bool:
    """Score held-out records and store the metrics in the state. Returns whether they are the best so far."""
    run.learner.eval()
    metrics = validate(run.learner, run.validation, run.device, is_sharded=run.strategy.is_sharded)
    run.learner.train()
    state.metrics = {f"validation_{name}": value for name, value in metrics.items()}
    _report(run, {"step": state.step, **state.metrics})
    return BestModel(run.config.training, run.learner.weights).record(metrics, state)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
