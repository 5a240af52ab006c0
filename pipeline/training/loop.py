"""The training loop: batches in, metrics and checkpoints out. It knows torch.distributed, and nothing of Ray.

    run = Run(encoder, config, feed.batches, validation, total_steps, save=save, report=print)
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
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Config
from pipeline.model.packing import Packed
from pipeline.model.transformer import Encoder
from pipeline.objectives.contrastive import contrastive_loss, gather
from pipeline.training.batch import PairBatch, pair_batch
from pipeline.training.checkpoints import TrainState
from pipeline.training.optimizer import Schedule, build_optimizer
from pipeline.training.step import backward

BEST_METRIC = "validation_ndcg@10"
VALIDATION_TEXTS = 256  # encoded at once


@dataclass
class Run:
    """What a run is made of."""

    encoder: Encoder
    config: Config
    batches: Callable[[int, int], Iterator[pa.Table]]
    """This worker's rows of steps `start` to `stop`, a table a step."""
    validation: PairBatch
    total_steps: int
    save: Callable[[Run, TrainState, bool], None]
    """Called on every worker with this run, its state, and whether it is the best so far."""
    report: Callable[[dict[str, float]], None]
    """Called on rank 0 every `training.log_every_steps`, and after each validation."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        settings = self.config.training
        self.encoder.to(self.device)
        self.table_steps = round(settings.table_warmup_fraction * self.total_steps)
        self.schedule = Schedule(self.total_steps, settings.warmup_fraction, self.table_steps)
        self.optimizer = build_optimizer(
            self.encoder,
            learning_rate=settings.learning_rate,
            table_learning_rate=settings.table_learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.autocast = autocast_type(settings.precision, self.device)

    def loss(self, anchors: Tensor, positives: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        objective = self.config.objective.contrastive
        loss, metrics = contrastive_loss(
            anchors, positives, temperature=objective.temperature, symmetric=objective.symmetric
        )
        return objective.weight * loss, metrics


def train(run: Run, state: TrainState) -> TrainState:
    """Train from `state` to the end of the run, or to its time limit. Ends with a validation and a checkpoint."""
    settings, checkpointing = run.config.training, run.config.checkpointing
    model = _parallel(run, state.step)
    meter, saved_at = _Meter(run, state), state.train_seconds
    for rows in run.batches(state.step, run.total_steps):
        if state.step == run.table_steps:
            model = _parallel(run, state.step)
        batch = pair_batch(rows).to(run.device)
        _seed(settings.seed, state.step)
        run.schedule.apply(run.optimizer, state.step)
        run.optimizer.zero_grad(set_to_none=True)
        metrics = backward(model, batch, run.loss, settings.gradient_accumulation_steps, run.autocast)
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(run.encoder.parameters(), settings.max_grad_norm)
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
    layers_join = step >= run.table_steps
    run.encoder.active_layers = run.encoder.shape.num_layers if layers_join else 0
    run.encoder.layers.requires_grad_(layers_join)
    run.encoder.train()
    if _world_size() == 1:
        return run.encoder
    return DistributedDataParallel(run.encoder, device_ids=[run.device] if run.device.type == "cuda" else None)


class _Meter:
    """Sums between two reports; also where workers agree on the time."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.run, self.state = run, state
        self.pairs = self.tokens = 0
        self.last = time.monotonic()

    def count(self, batch: PairBatch, metrics: dict[str, Tensor]) -> bool:
        """Take a step into account; on a reporting step, report. Returns whether the time limit has passed."""
        self.pairs += len(batch)
        self.tokens += batch.tokens
        if self.state.step % self.run.config.training.log_every_steps and self.state.step < self.run.total_steps:
            return False
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        names = sorted(metrics)
        own = [*(float(metrics[name]) for name in names), seconds, self.pairs, self.tokens]
        shared = _mean(torch.tensor(own, dtype=torch.float64, device=self.run.device)).tolist()
        values = dict(zip(names, shared, strict=False))
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise FloatingPointError(
                f"step {self.state.step}: the loss is {values['loss']} and the gradient's norm {values['grad_norm']}; "
                "a lower training.learning_rate may keep them finite"
            )
        seconds, pairs, tokens = shared[len(names) :]
        self.pairs = self.tokens = 0
        self.state.train_seconds += seconds
        rates = {"pairs_per_s": pairs * _world_size() / seconds, "tokens_per_s": tokens * _world_size() / seconds}
        rate = self.run.optimizer.param_groups[0]["lr"]
        self._report({"step": self.state.step, **values, "learning_rate": rate, **rates})
        limit = self.run.config.training.max_time_s
        return limit is not None and self.state.train_seconds >= limit

    def _report(self, metrics: dict[str, float]) -> None:
        if _rank() == 0:
            self.run.report({**metrics, "train_seconds": round(self.state.train_seconds, 2)})


def _validate(run: Run, state: TrainState) -> bool:
    """Rank held-out pairs against each other; note the metrics. Returns whether they are the best so far."""
    run.encoder.eval()
    anchors, positives = (_encode_shared(run, t) for t in (run.validation.anchors, run.validation.positives))
    run.encoder.train()
    metrics = ranking_metrics(anchors, positives, run.config.objective.contrastive.temperature)
    values = torch.tensor([metrics[name] for name in sorted(metrics)], dtype=torch.float64, device=run.device)
    if _world_size() > 1:
        dist.broadcast(values, 0)
    state.metrics = {f"validation_{name}": float(v) for name, v in zip(sorted(metrics), values, strict=True)}
    if _rank() == 0:
        run.report({"step": state.step, **state.metrics})
    is_best = state.best_metric is None or state.metrics[BEST_METRIC] > state.best_metric
    if is_best:
        state.best_metric = state.metrics[BEST_METRIC]
    return is_best


@torch.no_grad()
def _encode_shared(run: Run, texts: Packed) -> Tensor:
    """(N, D) vectors of all texts, each worker encoding its share. The last share is filled up with zeros."""
    share = math.ceil(len(texts) / _world_size())
    begin, end = _rank() * share, min((_rank() + 1) * share, len(texts))
    vectors = [
        run.encoder(texts.slice(i, min(i + VALIDATION_TEXTS, end)).to(run.device))
        for i in range(begin, end, VALIDATION_TEXTS)
    ]
    own = torch.zeros(share, run.encoder.shape.d_model, device=run.device)
    if vectors:
        own[: max(end - begin, 0)] = torch.cat(vectors)
    return gather(own)[: len(texts)]


def ranking_metrics(anchors: Tensor, positives: Tensor, temperature: float) -> dict[str, float]:
    """`loss`, `ndcg@10` and `recall@1` when anchor i looks for positive i among all positives; (N, D) unit vectors."""
    losses, ranks = [], []
    own = torch.arange(len(anchors), device=anchors.device)
    for rows in own.split(1024):
        scores = anchors[rows] @ positives.T
        losses.append(nn.functional.cross_entropy(scores / temperature, rows, reduction="sum"))
        own_score = scores.gather(1, rows[:, None])
        ahead = (~(scores <= own_score)).sum(dim=1)  # so written, a score that is not a number comes last
        ties = ((scores == own_score).sum(dim=1) - 1).clamp(min=0)  # shared out, or vectors all alike would win
        ranks.append(1 + ahead + ties / 2)
    rank = torch.cat(ranks).double()
    gain = torch.where(rank <= 10, 1 / torch.log2(rank + 1), 0.0)
    return {
        "loss": float(torch.stack(losses).sum()) / len(anchors),
        "ndcg@10": float(gain.mean()),
        "recall@1": float((rank == 1).double().mean()),
    }


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in, or None for float32 throughout."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and capable) else None


def _seed(seed: int, step: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, step, _rank()]).generate_state(1)[0]))


def _mean(values: Tensor) -> Tensor:
    if _world_size() > 1:
        dist.all_reduce(values)
    return values / _world_size()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
