"""Checks a sweep's search space: every key must exist, and every value must give a valid config.

    check_space(config, "configs/tune.yaml: tune.space")
    # ConfigError: configs/tune.yaml: tune.space: training.learning_rat: unknown key; did you mean learning_rate?

Checks both ends of each range and every choice. A value that is invalid alone may be valid together with a value of
another key (a width and its heads, for example), so pairs are tried before the value is refused.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.objective import Objective
from pipeline.config.tree import Config
from pipeline.core.outcome import ConfigError

SECTIONS = ("model", "objective", "training")
PREPARED = "it would change the prepared data, which all trials share"
FIXED = {
    "data": PREPARED,
    "tokenizer": PREPARED,
    "model.pretrained": f"it brings its own tokenizer, so {PREPARED}",
    "training.max_steps": "all trials have the same number of steps, tune.max_steps",
    "training.max_epochs": "all trials have the same number of steps, tune.max_steps",
    "training.max_time_s": "all trials have the same number of steps, tune.max_steps",
    "training.validate_every_steps": "trials are compared at the same steps, tune.grace_steps",
    "training.validation_pairs": "trials are scored on the same records",
    "training.best_metric": "trials are compared by one metric, tune.metric",
}
"""Key or section → why it cannot differ between trials."""
MUTABLE = (
    "model.dropout",
    "objective.contrastive.temperature",
    "objective.contrastive.false_negative_margin",
    *(f"objective.{name}.weight" for name in Objective.model_fields),
    *(f"objective.{name}.label_smoothing" for name in ("seq2seq", "denoising", "causal")),
    "objective.denoising.ratio",
    "objective.denoising.mean_span",
    "objective.mlm.ratio",
    "training.learning_rate",
    "training.table_learning_rate",
    "training.weight_decay",
    "training.betas",
    "training.adam_eps",
    "training.schedule",
    "training.warmup_fraction",
    "training.warmup_steps",
    "training.decay_fraction",
    "training.final_rate_fraction",
    "training.max_grad_norm",
)
"""Keys that may change while a model is trained: they change neither a shape nor the order of the data."""


def check_space(config: Config, where: str) -> None:
    """Raise ConfigError for the first key or value of `tune.space` that is invalid in every trial."""
    space = config.tune.space
    if config.tune.scheduler == "pbt":
        _check_population(config, where)
    for key, dimension in space.items():
        _check_key(key, where)
        for value in dimension.candidates:
            others = ((other, each) for other in space if other != key for each in space[other].candidates)
            error = _error_of(config, {key: value}, where)
            if error and all(_error_of(config, {key: value, other: each}, where) for other, each in others):
                raise error


def _check_key(key: str, where: str) -> None:
    section = key.partition(".")[0]
    reason = FIXED.get(key) or FIXED.get(section)
    if reason:
        raise ConfigError(f"{where}: {key} cannot be tuned: {reason}")
    if section not in SECTIONS or "." not in key:
        raise ConfigError(
            f"{where}: {key} cannot be tuned; allowed are keys of {', '.join(SECTIONS)}, such as training.learning_rate"
        )


def _check_population(config: Config, where: str) -> None:
    """Raise ConfigError if pbt cannot change a key of the space while it trains, or cannot pause the trials."""
    fixed = [key for key in config.tune.space if key not in MUTABLE]
    if fixed:
        raise ConfigError(
            f"{where}: {', '.join(fixed)} cannot change while a model is trained, as scheduler=pbt does; use "
            f"scheduler=asha, or only {', '.join(MUTABLE)}"
        )
    contrastive, temperature = config.objective.contrastive, "objective.contrastive.temperature"
    if temperature in config.tune.space and contrastive and contrastive.learn_temperature:
        raise ConfigError(f"{where}: {temperature} is trained (learn_temperature=true), so scheduler=pbt cannot set it")
    workers, strategy = config.scaling.num_workers, config.training.strategy
    if workers not in ("auto", 1) or strategy != "ddp":
        raise ConfigError(
            f"tune.scheduler: found pbt with scaling.num_workers={workers} and training.strategy={strategy}; allowed "
            "are trials of one worker, num_workers=1 with ddp, or another scheduler"
        )


def _error_of(config: Config, values: dict[str, Any], where: str) -> ConfigError | None:
    try:
        config.changed(values, where)
    except ConfigError as error:
        return error
    return None
