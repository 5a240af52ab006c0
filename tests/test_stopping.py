"""Which validation is the best, and when patience ends: against transformers' own callback, and by hand."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import EarlyStoppingCallback

from pipeline.config import ConfigError
from pipeline.config.training import EarlyStopping, Training
from pipeline.training.checkpoints import TrainState
from pipeline.training.stopping import BestModel, lower_is_better

PAIRS = {"contrastive": 1.0}


def best_model(metric: str | None = None, weights: dict[str, float] = PAIRS, **stopping: float) -> BestModel:
    return BestModel(Training(best_metric=metric, early_stopping=EarlyStopping(**stopping)), weights)  # type: ignore[arg-type]


METRICS = {"loss": 1.5, "ndcg@10": 0.7, "recall@1": 0.5, "sts_spearman": 0.6, "mlm_nll": 3.0, "denoising_nll": 4.0}
METRICS |= {"mlm_perplexity": 20.0, "seq2seq_bleu": 12.0}


def test_the_metric_that_decides_and_its_direction() -> None:
    for metric, weights, expected in (
        (None, PAIRS, 0.7),
        (None, {"contrastive": 1.0, "mlm": 2.0}, 0.7),
        (None, {"mlm": 2.0, "denoising": 0.5}, -(2.0 * 3.0 + 0.5 * 4.0)),
        ("sts_spearman", PAIRS, 0.6),
        ("recall@1", {"mlm": 1.0}, 0.5),
        ("loss", PAIRS, -1.5),
        ("mlm_nll", PAIRS, -3.0),
        ("mlm_perplexity", PAIRS, -20.0),
        ("seq2seq_bleu", PAIRS, 12.0),
        ("validation_loss", PAIRS, -1.5),
    ):
        assert best_model(metric, weights).score(METRICS) == pytest.approx(expected), (metric, weights)
    assert all(lower_is_better(name) for name in ("validation_loss", "causal_perplexity"))
    assert not lower_is_better("seq2seq_rougeL")


def test_a_metric_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError) as refusal:
        best_model("spearman").score({"ndcg@10": 0.7, "loss": 1.0})
    assert str(refusal.value) == (
        "training.best_metric: found 'spearman'; allowed are the metrics of this run's validation, loss, ndcg@10"
    )


def test_the_best_and_the_gains_of_a_run() -> None:
    """The third score is the best, though no gain; the fourth is a gain over it; the last two end patience."""
    state, best = TrainState(), best_model(patience=2, min_delta=0.1)
    seen = []
    for score in (0.5, 0.4, 0.55, 0.7, 0.7, 0.75):
        is_best = best.record({"ndcg@10": score}, state)
        seen.append((is_best, state.best_metric, state.validations_without_gain, state.ended_early))
    assert seen == [
        (True, 0.5, 0, False),
        (False, 0.5, 1, False),
        (True, 0.55, 2, True),
        (True, 0.7, 0, False),
        (False, 0.7, 1, False),
        (True, 0.75, 2, True),
    ]


def test_a_gain_is_more_than_min_delta() -> None:
    for score, expected in ((0.75, 5), (math.nextafter(0.75, 1), 0), (0.5, 5), (math.nan, 5)):
        state = TrainState(best_metric=0.5, validations_without_gain=4)
        best_model(min_delta=0.25).record({"ndcg@10": score}, state)
        assert state.validations_without_gain == expected, score


def test_a_score_that_is_no_number_is_never_better() -> None:
    state, best = TrainState(), best_model(patience=2)
    assert not best.record({"ndcg@10": math.nan}, state)
    assert (state.best_metric, state.validations_without_gain) == (None, 1)
    assert best.record({"ndcg@10": 0.1}, state)
    assert not best.record({"ndcg@10": math.nan}, state)
    assert (state.best_metric, state.validations_without_gain, state.ended_early) == (0.1, 1, False)
    assert not best_model("loss").record({"loss": math.inf}, TrainState())


def test_without_patience_a_run_never_ends_early() -> None:
    state, best = TrainState(), best_model()
    for _ in range(100):
        best.record({"ndcg@10": 0.5}, state)
    assert state.validations_without_gain == 99
    assert not state.ended_early


@pytest.mark.parametrize("metric", ["ndcg@10", "loss"])
def test_as_transformers_callback_does(metric: str) -> None:
    args: Any = SimpleNamespace(metric_for_best_model=metric, greater_is_better=metric != "loss")  # all that it reads
    better = min if metric == "loss" else max
    for seed, min_delta in itertools.product(range(5), (0.0, 0.05)):
        chance = random.Random(seed)
        callback, theirs, control = EarlyStoppingCallback(4, min_delta), TrainerState(), TrainerControl()
        ours, best = TrainState(), best_model(metric, patience=4, min_delta=min_delta)
        for value in [round(chance.random(), 2) for _ in range(30)]:
            previous = theirs.best_metric
            callback.on_evaluate(args, theirs, control, metrics={f"eval_{metric}": value})
            is_best = best.record({metric: value}, ours)
            # transformers' Trainer notes the best after its callbacks have seen it
            theirs.best_metric = value if previous is None else better(previous, value)
            assert is_best == (theirs.best_metric != previous)
            assert ours.validations_without_gain == callback.early_stopping_patience_counter
            assert ours.ended_early == control.should_training_stop
            if ours.ended_early:
                break
