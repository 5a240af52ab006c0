"""The training loop: batches in, metrics and checkpoints out. It knows torch.distributed, and nothing of Ray.

    run = Run(learner, config, feed.batches, validation, total_steps, save=save, report=print)
    state = train(run, TrainState())               # from the first step, or from a checkpoint's

Every choice that depends on chance or time is made alike on all workers: seeds follow from (seed, step, rank), and the
clock's verdict, like validation's, is shared before it is acted on.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.model.batch import Batch, Part
from pipeline.model.learner import Learner
from pipeline.model.transformer import Encoder, compile_layers
from pipeline.objectives.collectives import rank, world_size
from pipeline.runtime.console import log
from pipeline.training.batch import to_batch
from pipeline.training.checkpoints import TrainState, note_halvings
from pipeline.training.flops import step_flops
from pipeline.training.meter import Meter
from pipeline.training.optimizer import build_optimizer
from pipeline.training.precision import Precision
from pipeline.training.prefetch import Prefetch, to_device
from pipeline.training.schedule import Schedule
from pipeline.training.step import Outcome, OutOfMemory, backward, cut
from pipeline.training.stopping import Judge
from pipeline.training.strategy import build_strategy
from pipeline.training.validation import Validation, validate


class TrainingStopped(RuntimeError):  # noqa: N818  # no fault of the code's: the run cannot go on
    """Training cannot go on: what was found, at which step, and from where to go on."""


@dataclass(frozen=True)
class Wishes:
    """What a worker is asked for from outside, at some step."""

    stop: bool = False
    """End here, with a checkpoint."""
    save: bool = False
    """Write a checkpoint and go on."""


@dataclass(frozen=True)
class Ready:
    """A step's rows, cut into micro-batches, on the device."""

    batch: Batch
    parts: list[Part]
    flops: float
    halvings: int


@dataclass
class Run:
    """What a run is made of."""

    learner: Learner
    config: Config
    batches: Callable[[int, int], Iterator[pa.Table]]
    """This worker's rows of steps `start` to `stop`, a table a step."""
    validation: Validation
    total_steps: int
    save: Callable[[Run, TrainState, bool], None]
    """Called on every worker with this run, its state, and whether it is the best so far."""
    report: Callable[[dict[str, float]], None]
    """Called on rank 0 every `training.log_every_steps`, and after each validation."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wishes: Callable[[int], Wishes] = lambda step: Wishes()
    """Asked on every worker at each step."""
    alert: Callable[[str, str, int], None] = lambda title, text, step: log.warning("%s: %s", title, text)
    """Called on rank 0 with a title, a sentence and the step, when something is wrong."""

    def __post_init__(self) -> None:
        settings = self.config.training
        self.saved_step: int | None = None
        self.learner.to(self.device)
        self.schedule = Schedule.of(settings, self.total_steps)
        self.precision = Precision(settings.precision, self.device)
        self.judge = Judge(settings, self.learner.weights)
        if settings.compile:
            for stack in self.learner.stacks:
                compile_layers(stack)
        self.strategy = build_strategy(self.config, self.learner, self.device)
        self.optimizer = build_optimizer(self.learner, settings)

    def batch(self, rows: pa.Table) -> Batch:
        return to_batch(rows, self.learner.hard_negatives)

    def ready(self, batch: Batch, step: int, halvings: int) -> Ready:
        """A batch cut and prepared; texts are corrupted by the step."""
        settings = self.config.training
        ranges = cut(batch, settings.gradient_accumulation_steps, settings.micro_batch_tokens, halvings)
        seed = _seed(settings.seed, step)
        parts = [self.learner.prepare(batch.slice(*ends), seed) for ends in ranges]
        return Ready(batch, to_device(parts, self.device), step_flops(self.learner, parts), halvings)


def train(run: Run, state: TrainState) -> TrainState:
    """Train from `state` to the end of the run, or to its time limit. Ends with a validation and a checkpoint.

    Asked to stop, it ends with a checkpoint alone. Raises TrainingStopped where it cannot go on, and OutOfMemory
    where workers in lockstep must begin anew from the newest checkpoint.
    """
    settings, checkpointing = run.config.training, run.config.checkpointing
    run.saved_step = state.step or None
    run.precision.load(state.scaler)
    _join_layers(run, state.step)
    steps = iter(range(state.step, run.total_steps))
    feed = Prefetch(
        run.batches(state.step, run.total_steps),
        lambda rows: run.ready(run.batch(rows), next(steps), state.halvings),
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
            stop, save = (bool(each) for each in outcome.wishes)
            ended |= settings.max_time_s is not None and state.train_seconds >= settings.max_time_s
            is_best = False
            if not stop and (ended or state.step % settings.validate_every_steps == 0):
                is_best = _validate(run, state)
            overdue = state.train_seconds - saved_at >= 60 * (checkpointing.every_minutes or math.inf)
            ended |= stop or state.ended_early
            if ended or save or is_best or overdue or state.step % checkpointing.every_steps == 0:
                state.scaler = run.precision.state()
                run.save(run, state, is_best)
                saved_at, run.saved_step = state.train_seconds, state.step
            if ended:
                break
    return state


def _join_layers(run: Run, step: int) -> None:
    """The table alone while it warms up, then all layers."""
    encoder = run.learner.model.backbone
    if isinstance(encoder, Encoder):
        layers_join = step >= run.schedule.table_steps
        encoder.active_layers = encoder.shape.num_layers if layers_join else 0
        encoder.layers.requires_grad_(layers_join)
    run.learner.train()
    run.strategy.take(run.learner)


def _gradients(run: Run, ready: Ready, state: TrainState) -> Outcome:
    """The step's gradients; in smaller micro-batches where memory is short, on all workers alike."""
    wishes = run.wishes(state.step)
    while True:
        if ready.halvings != state.halvings:
            ready = run.ready(ready.batch, state.step, state.halvings)
        _seed_dropout(run.config.training.seed, state.step)
        try:
            return backward(
                run.learner,
                run.strategy,
                ready.parts,
                autocast=run.precision.autocast,
                loss_scale=run.precision.loss_scale,
                wishes=(wishes.stop, wishes.save),
            )
        except OutOfMemory:
            if run.strategy.lockstep:
                note_halvings(run.config.run_dir, state.halvings + 1)
                raise
        _halve(run, state)


def _halve(run: Run, state: TrainState) -> None:
    """Smaller micro-batches from here on; raises TrainingStopped where a single record does not fit."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    state.halvings += 1
    if 2 ** (state.halvings - 1) >= run.config.training.global_batch_size:
        raise TrainingStopped(
            f"step {state.step}: out of memory with one record a micro-batch; a smaller tokenizer.max_length, "
            "model.gradient_checkpointing=true or a smaller model may fit"
        )
    if rank() == 0:
        run.alert(
            "out of memory", f"step {state.step} is done again in micro-batches half as large, and so on", state.step
        )


def _update(run: Run, ready: Ready, outcome: Outcome, state: TrainState) -> None:
    """Let the optimizer step, or skip it where the loss or the gradient is no finite number, on all workers alike."""
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
            f"step {state.step}: {found} is no finite number, {state.skipped_in_a_row} steps in a row, all of them "
            f"skipped; the last good checkpoint is of step {run.saved_step or 'none'}, from which a lower "
            "training.learning_rate (checkpointing.accept_changes=[training.learning_rate]) may go on; the records of "
            f"this step were {_ids(ready.batch)}"
        )
    if rank() == 0:
        run.alert("step skipped", f"step {state.step}: {found} is no finite number", state.step)


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
        run.report(metrics)


def _validate(run: Run, state: TrainState) -> bool:
    """Score held-out records; note the metrics. Returns whether they are the best so far."""
    run.learner.eval()
    metrics = validate(run.learner, run.validation, run.device, together=run.strategy.lockstep)
    run.learner.train()
    state.metrics = {f"validation_{name}": value for name, value in metrics.items()}
    _report(run, {"step": state.step, **state.metrics})
    return run.judge.is_best(metrics, state)


def _seed(seed: int, step: int, *who: int) -> int:
    return int(np.random.SeedSequence([seed, step, *who]).generate_state(1)[0])


def _seed_dropout(seed: int, step: int) -> None:
    """A step's dropout follows from its number, and differs between workers."""
    torch.manual_seed(_seed(seed, step, rank()))
