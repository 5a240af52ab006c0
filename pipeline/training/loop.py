"""The training loop: batches in, metrics and checkpoints out. It uses torch.distributed, and not Ray.

    run = build_run(config, learner, feed.batches, validation, total_steps, Hooks(save=saver.save, report=print))
    state = train(run, TrainState())               # from the first step, or from a checkpoint's

Every decision that depends on chance or time is the same on all workers: seeds are functions of (seed, step, rank), and
the clock and the validation scores are shared before they are acted on.
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
from pipeline.model.batch import Batch, Part
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, compile_layers
from pipeline.training.checkpoints import TrainState, note_oom_splits
from pipeline.training.collectives import rank, world_size
from pipeline.training.meter import Meter, step_flops
from pipeline.training.optimizer import Precision, Schedule, build_optimizer
from pipeline.training.prefetch import Prefetch, to_batch, to_device
from pipeline.training.step import Outcome, OutOfMemory, backward, cut
from pipeline.training.stopping import BestModel
from pipeline.training.strategy import Strategy, build_strategy
from pipeline.training.validation import Validation, validate

Batches = Callable[[int, int], Iterator[pa.Table]]
"""A worker's rows of the steps from `start` to `stop`, one table a step."""


class TrainingStopped(RuntimeError):  # noqa: N818  # no fault of the code's: the run cannot go on
    """Training cannot go on: what was found, at which step, and from where to resume."""


@dataclass(frozen=True)
class ControlFlags:
    """What a worker is asked to do from outside, at some step."""

    stop: bool = False
    """Write a checkpoint and end."""
    save: bool = False
    """Write a checkpoint and go on."""


@dataclass
class Hooks:
    """What the loop calls."""

    save: Callable[[Run, TrainState, bool], None]
    """On every worker, with the run, its state, and whether it is the best so far."""
    report: Callable[[dict[str, float]], None]
    """On rank 0, every `training.log_every_steps` and after each validation."""
    alert: Callable[[str, str, int], None] = lambda title, text, step: log.warning("%s: %s", title, text)
    """On rank 0, with a title, a sentence and the step, when something is wrong."""
    control_flags: Callable[[int], ControlFlags] = lambda step: ControlFlags()
    """On every worker, at each step."""


@dataclass(frozen=True)
class Ready:
    """A step's rows, cut into micro-batches, on the device."""

    batch: Batch
    parts: list[Part]
    flops: float
    oom_splits: int


@dataclass
class Run:
    """What a run is made of; `build_run` makes one."""

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

    def ready(self, batch: Batch, step: int, oom_splits: int) -> Ready:
        """Cut a batch and prepare its micro-batches; the corruption of texts depends on the step."""
        settings = self.config.training
        ranges = cut(batch, settings.gradient_accumulation_steps, settings.micro_batch_tokens, oom_splits)
        seed = _seed(settings.seed, step)
        parts = [self.learner.prepare(batch.slice(*ends), seed) for ends in ranges]
        return Ready(batch, to_device(parts, self.device), step_flops(self.learner, parts), oom_splits)


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
    """Train from `state` to the end of the run, or to its time limit. Ends with a validation and a checkpoint.

    Asked to stop, it ends with a checkpoint and no validation. Raises TrainingStopped where it cannot go on, and
    OutOfMemory where the workers of a sharded model must restart from the newest checkpoint.
    """
    settings, checkpointing = run.config.training, run.config.checkpointing
    run.saved_step = state.step or None
    run.precision.load(state.scaler)
    _join_layers(run, state.step)
    steps = iter(range(state.step, run.total_steps))
    feed = Prefetch(
        run.batches(state.step, run.total_steps),
        lambda rows: run.ready(to_batch(rows, run.learner.hard_negatives), next(steps), state.oom_splits),
        run.device,
    )
    meter, saved_at = Meter(settings, run.total_steps, run.device, state), state.train_seconds
    with closing(feed):
        for ready in feed:
            if state.step == run.schedule.table_steps:
                _join_layers(run, state.step)
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


def _join_layers(run: Run, step: int) -> None:
    """Train the token table alone while it warms up, then all layers."""
    encoder = run.learner.model.backbone
    if isinstance(encoder, Encoder):
        layers_join = step >= run.schedule.table_steps
        encoder.active_layers = encoder.shape.num_layers if layers_join else 0
        encoder.layers.requires_grad_(layers_join)
    run.learner.train()
    run.strategy.attach(run.learner)


def _gradients(run: Run, ready: Ready, state: TrainState) -> Outcome:
    """Compute the step's gradients, on all workers in smaller micro-batches if one of them runs out of memory."""
    flags = run.hooks.control_flags(state.step)
    while True:
        if ready.oom_splits != state.oom_splits:
            ready = run.ready(ready.batch, state.step, state.oom_splits)
        _seed_dropout(run.config.training.seed, state.step)
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
        _split(run, state)


def _split(run: Run, state: TrainState) -> None:
    """Use smaller micro-batches from here on. Raises TrainingStopped if a single record does not fit."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    state.oom_splits += 1
    if 2 ** (state.oom_splits - 1) >= run.config.training.global_batch_size:
        raise TrainingStopped(
            f"step {state.step}: out of memory with one record a micro-batch; a smaller tokenizer.max_length, "
            "model.gradient_checkpointing=true or a smaller model may fit"
        )
    if rank() == 0:
        run.hooks.alert(
            "out of memory", f"step {state.step} is repeated with micro-batches half as large, which stay", state.step
        )


def _update(run: Run, ready: Ready, outcome: Outcome, state: TrainState) -> None:
    """Let the optimizer step, or skip it, on all workers, if the loss or the gradient is NaN or infinite."""
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
            f"step {state.step}: {found} is NaN or infinite, {state.skipped_in_a_row} steps in a row, all of them "
            f"skipped; the last good checkpoint is of step {run.saved_step or 'none'}, from which a lower "
            "training.learning_rate (checkpointing.accept_changes=[training.learning_rate]) may go on; the records of "
            f"this step were {_ids(ready.batch)}"
        )
    if rank() == 0:
        run.hooks.alert("step skipped", f"step {state.step}: {found} is NaN or infinite", state.step)


def _ids(batch: Batch) -> str:
    """The ids of the global batch's records, in rank order."""
    everyone: list[list[str]] = [[] for _ in range(world_size())]
    if world_size() > 1:
        dist.all_gather_object(everyone, batch.ids)
    else:
        everyone[0] = batch.ids
    return ", ".join(one for ids in everyone for one in ids)


def _report(run: Run, metrics: dict[str, float]) -> None:
    if rank() == 0:
        run.hooks.report(metrics)


def _validate(run: Run, state: TrainState) -> bool:
    """Score held-out records and record the metrics in the state. Returns whether they are the best so far."""
    run.learner.eval()
    metrics = validate(run.learner, run.validation, run.device, is_sharded=run.strategy.is_sharded)
    run.learner.train()
    state.metrics = {f"validation_{name}": value for name, value in metrics.items()}
    _report(run, {"step": state.step, **state.metrics})
    return BestModel(run.config.training, run.learner.weights).record(metrics, state)


def _seed(seed: int, step: int, *who: int) -> int:
    return int(np.random.SeedSequence([seed, step, *who]).generate_state(1)[0])


def _seed_dropout(seed: int, step: int) -> None:
    """Seed dropout by the step and the worker."""
    torch.manual_seed(_seed(seed, step, rank()))
