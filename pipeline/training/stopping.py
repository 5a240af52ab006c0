"""Which validation is the best so far, and when there have been enough without a better one.

    judge = Judge(config.training, learner.weights)
    judge.score({"ndcg@10": 0.71, "loss": 1.3})      # 0.71: the higher the better, whatever the metric
    is_best = judge.is_best(metrics, state)          # notes in `state` what the next validation must beat

`training.best_metric` decides. Without it NDCG@10 does where anchors look for their positives, else the weighted sum of
the objectives' negative log likelihoods of a token.

The best model and the end of patience are told apart, as in transformers' EarlyStoppingCallback: any better score is
the best, and one that is better by more than `early_stopping.min_delta` is a gain. So the model that is kept is the
best there was, and gains too small to wait for end a run even where each is one. A score that is no number is never
better.

Everything here is a function of numbers that all workers share, so they stop together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.config import ConfigError
from pipeline.config.training import Training
from pipeline.training.checkpoints import TrainState

LOWER_IS_BETTER = ("loss", "nll", "perplexity")


def lower_is_better(name: str) -> bool:
    """Whether a metric of this name falls as the model gets better: `loss`, `mlm_nll`, `seq2seq_perplexity`."""
    return any(part in name for part in LOWER_IS_BETTER)


def count_without_gain(score: float, best: float | None, so_far: int, min_delta: float) -> int:
    """Validations in a row without a gain, now that one has `score` where the best before it, if any, had `best`.

    0 where it is better by more than `min_delta`, else one more than `so_far`.
    """
    return 0 if score - (-math.inf if best is None else best) > min_delta else so_far + 1


class Judge:
    """`weights` are the objectives' own, by name."""

    def __init__(self, settings: Training, weights: Mapping[str, float]) -> None:
        self.stopping, self.weights = settings.early_stopping, weights
        self.metric = settings.best_metric or ("ndcg@10" if "contrastive" in weights else None)

    def score(self, metrics: Mapping[str, float]) -> float:
        """The one number by which models are compared, higher for the better, of a validation's metrics.

        Raises ConfigError where `training.best_metric` is none of them.
        """
        if self.metric is None:
            return -sum(weight * metrics[f"{name}_nll"] for name, weight in self.weights.items())
        name = self.metric.removeprefix("validation_")  # as metrics.jsonl and checkpoints have it
        if name not in metrics:
            raise ConfigError(
                f"training.best_metric: found {self.metric!r}; allowed are the metrics of this run's validation, "
                f"{', '.join(sorted(metrics))}"
            )
        return -metrics[name] if lower_is_better(name) else metrics[name]

    def is_best(self, metrics: Mapping[str, float], state: TrainState) -> bool:
        """Whether a validation is the best so far. Notes in the state its score, the validations without a gain, and
        whether patience has ended with them. Raises ConfigError as `score` does."""
        score, best = self.score(metrics), state.best_metric
        without_gain = count_without_gain(score, best, state.validations_without_gain, self.stopping.min_delta)
        is_best = score > (-math.inf if best is None else best)
        state.best_metric = score if is_best else best
        state.validations_without_gain = without_gain
        state.ended_early = self.stopping.patience is not None and without_gain >= self.stopping.patience
        return is_best
