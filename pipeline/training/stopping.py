"""Decides when a run ends, and which validation is the best so far.

    best = BestModel(config.training, learner.weights)
    best.score({"ndcg@10": 0.71, "loss": 1.3})       # 0.71: higher is better, whatever the metric
    is_best = best.record(metrics, state)            # updates the best score and the patience in `state`

Models are compared by `training.best_metric`. The default is NDCG@10 if the model's vectors are trained on pairs, else
the weighted sum of the objectives' losses: the negative log likelihood per token, and the distance to the teacher.

The best model and the patience are separate, as in transformers' EarlyStoppingCallback: any better score is a new best,
but only an improvement of more than `early_stopping.min_delta` resets the patience. NaN is never better.

All inputs are the same on all workers, so they stop together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.config import Config, ConfigError
from pipeline.config.training import Training
from pipeline.data.plan import BatchPlan
from pipeline.training.checkpoints import TrainState

DEFAULT_EPOCHS = 3
LOWER_IS_BETTER = ("loss", "nll", "perplexity")


def steps_of(config: Config, plan: BatchPlan) -> int:
    """Optimizer steps of the run: `max_steps` or `max_epochs`, whichever comes first."""
    steps, epochs = config.training.max_steps, config.training.max_epochs
    if epochs is None:
        if steps is not None:
            return steps
        epochs = DEFAULT_EPOCHS
    by_epochs = max(1, math.ceil(epochs * plan.batches_per_epoch))
    return min(by_epochs, steps or by_epochs)


def is_finished(config: Config, total_steps: int, state: TrainState) -> bool:
    limit = config.training.max_time_s
    out_of_time = limit is not None and state.train_seconds >= limit
    return state.ended_early or out_of_time or state.step >= total_steps


def lower_is_better(name: str) -> bool:
    """Whether lower values of this metric are better: `loss`, `mlm_nll`, `seq2seq_perplexity`."""
    return any(part in name for part in LOWER_IS_BETTER)


class BestModel:
    """Compares validations. `weights` are the objectives' weights, by name."""

    def __init__(self, settings: Training, weights: Mapping[str, float]) -> None:
        self.stopping, self.weights = settings.early_stopping, weights
        self.metric = settings.best_metric or ("ndcg@10" if "contrastive" in weights else None)

    def score(self, metrics: Mapping[str, float]) -> float:
        """A validation's score; higher is better. Raises ConfigError if it lacks `training.best_metric`."""
        if self.metric is None and not ("distillation" in self.weights and "ndcg@10" in metrics):
            return -sum(weight * metrics[loss_of(name)] for name, weight in self.weights.items())
        name = (self.metric or "ndcg@10").removeprefix("validation_")  # the prefix in metrics.jsonl and checkpoints
        if name not in metrics:
            raise ConfigError(
                f"training.best_metric: found {self.metric!r}; allowed are the metrics of this run's validation, "
                f"{', '.join(sorted(metrics))}"
            )
        return -metrics[name] if lower_is_better(name) else metrics[name]

    def record(self, metrics: Mapping[str, float], state: TrainState) -> bool:
        """Update the best score and the patience in `state`. Returns whether this validation is the best so far.

        Raises ConfigError as `score` does.
        """
        score, best = self.score(metrics), -math.inf if state.best_metric is None else state.best_metric
        is_gain, is_best = score - best > self.stopping.min_delta, score > best
        if is_best:
            state.best_metric = score
        state.validations_without_gain = 0 if is_gain else state.validations_without_gain + 1
        patience = self.stopping.patience
        state.ended_early = patience is not None and state.validations_without_gain >= patience
        return is_best


def loss_of(objective: str) -> str:
    """The name of an objective's loss in a validation."""
    return f"{objective}_loss" if objective == "distillation" else f"{objective}_nll"
