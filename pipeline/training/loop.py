"""The training loop: batches in, metrics and checkpoints out. It knows torch.distributed, and nothing of Ray.

    run = Run(learner, config, feed.batches, validation, total_steps, save=save, report=print)
    state = train(run, TrainState())               # from the first step, or from a checkpoint's

Every choice that depends on chance or time is made alike on all workers: seeds follow from (seed, step, rank), and the
clock's verdict, like validation's, is shared before it is acted on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Config
from pipeline.model.compiled import compile_layers
from pipeline.model.transformer import Encoder
from pipeline.objectives.batch import Batch
from pipeline.objectives.collectives import rank, total, world_size
from pipeline.objectives.learner import Learner
from pipeline.training.batch import to_batch
from pipeline.training.checkpoints import TrainState
from pipeline.training.optimizer import Schedule, build_optimizer
from pipeline.training.step import backward
from pipeline.training.validation import Validation, validate, with_perplexity


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

    def __post_init__(self) -> None:
        settings = self.config.training
        self.learner.to(self.device)
        self.table_steps = round(settings.table_warmup_fraction * self.total_steps)
        self.schedule = Schedule(self.total_steps, settings.warmup_fraction, self.table_steps)
        self.optimizer = build_optimizer(
            self.learner,
            learning_rate=settings.learning_rate,
            table_learning_rate=settings.table_learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.autocast = autocast_type(settings.precision, self.device)
        if settings.compile:
            for stack in self.learner.stacks:
                compile_layers(stack)

    def batch(self, rows: pa.Table) -> Batch:
        return to_batch(rows, self.learner.hard_negatives)


def train(run: Run, state: TrainState) -> TrainState:
    """Train from `state` to the end of the run, or to its time limit. Ends with a validation and a checkpoint."""
    settings, checkpointing = run.config.training, run.config.checkpointing
    model = _parallel(run, state.step)
    meter, saved_at = _Meter(run, state), state.train_seconds
    for rows in run.batches(state.step, run.total_steps):
        if state.step == run.table_steps:
            model = _parallel(run, state.step)
        batch = run.batch(rows)
        chance = _seed(settings.seed, state.step)
        run.schedule.apply(run.optimizer, state.step)
        run.optimizer.zero_grad(set_to_none=True)
        metrics = backward(
            run.learner,
            model,
            batch,
            seed=chance,
            micro_batches=settings.gradient_accumulation_steps,
            autocast=run.autocast,
            device=run.device,
        )
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(run.learner.parameters(), settings.max_grad_norm)
        run.optimizer.step()
        state.step += 1

        out_of_time = meter.count(batch, metrics)
        ended = out_of_time or state.step == run.total_steps
        is_best = (ended or state.step % settings.validate_every_steps == 0) and _validate(run, state)
        overdue = state.train_seconds - saved_at >= 60 * (checkpointing.every_minutes or math.inf)
        if ended or is_best or overdue or state.step % checkpointing.every_steps == 0:
            run.save(run, state, is_best)
            saved_at = state.train_seconds
        if ended:
            break
    return state


def _parallel(run: Run, step: int) -> nn.Module:
    """What to call at `step`: the table alone while it warms up, then all layers; gradients averaged over workers."""
    encoder = run.learner.model.backbone
    if isinstance(encoder, Encoder):
        layers_join = step >= run.table_steps
        encoder.active_layers = encoder.shape.num_layers if layers_join else 0
        encoder.layers.requires_grad_(layers_join)
    run.learner.train()
    if world_size() == 1:
        return run.learner
    return DistributedDataParallel(run.learner, device_ids=[run.device] if run.device.type == "cuda" else None)


class _Meter:
    """Sums between two reports; also where workers agree on the time."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state = run, state
        self.pairs = self.tokens = 0
        self.last = time.monotonic()

    def count(self, batch: Batch, metrics: dict[str, Tensor]) -> bool:
        """Take a step into account; on a reporting step, report. Returns whether the time limit has passed."""
        self.pairs += len(batch)
        self.tokens += batch.tokens
        if self.state.step % self.run.config.training.log_every_steps and self.state.step < self.run.total_steps:
            return False
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        names = sorted(metrics)
        own = [*(float(metrics[name]) for name in names), seconds, self.pairs, self.tokens]
        shared = (total(torch.tensor(own, dtype=torch.float64, device=self.run.device)) / world_size()).tolist()
        values = dict(zip(names, shared, strict=False))
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise FloatingPointError(
                f"step {self.state.step}: the loss is {values['loss']} and the gradient's norm {values['grad_norm']}; "
                "a lower training.learning_rate may keep them finite"
            )
        seconds, pairs, tokens = shared[len(names) :]
        self.pairs = self.tokens = 0
        self.state.train_seconds += seconds
        rates = {"pairs_per_s": pairs * world_size() / seconds, "tokens_per_s": tokens * world_size() / seconds}
        rate = self.run.optimizer.param_groups[0]["lr"]
        self._report({"step": self.state.step, **with_perplexity(values), "learning_rate": rate, **rates})
        limit = self.run.config.training.max_time_s
        return limit is not None and self.state.train_seconds >= limit

    def _report(self, metrics: dict[str, float]) -> None:
        if rank() == 0:
            self.run.report({**metrics, "train_seconds": round(self.state.train_seconds, 2)})


def _validate(run: Run, state: TrainState) -> bool:
    """Score held-out records; note the metrics. Returns whether they are the best so far."""
    run.learner.eval()
    metrics, score = validate(run.learner, run.validation, run.device)
    run.learner.train()
    state.metrics = {f"validation_{name}": value for name, value in metrics.items()}
    if rank() == 0:
        run.report({"step": state.step, **state.metrics})
    is_best = state.best_metric is None or score > state.best_metric
    if is_best:
        state.best_metric = score
    return is_best


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in, or None for float32 throughout."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and capable) else None


def _seed(seed: int, step: int) -> int:
    """Seed dropout for this worker and step. Returns a seed for what must be alike on all workers."""
    alike, own = (np.random.SeedSequence([seed, step, *who]).generate_state(1)[0] for who in ((), (rank(),)))
    torch.manual_seed(int(own))
    return int(alike)
