"""Checks a sweep's search space: every key must exist, and every value must give a valid config.

    check_space(config, "configs/tune.yaml: tune.space")
    # ConfigError: configs/tune.yaml: tune.space: training.learning_rat: unknown key; did you mean learning_rate?

Checks both ends of each range and every choice. A value that is invalid alone may be valid together with a value of
another key (a width and its heads, for example), so pairs are tried before the value is refused.
"""

from __future__ import annotations

from typing import Any

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


def check_space(config: Config, where: str) -> None:
    """Raise ConfigError for the first key or value of `tune.space` that is invalid in every trial."""
    space = config.tune.space
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


def _error_of(config: Config, values: dict[str, Any], where: str) -> ConfigError | None:
    try:
        config.changed(values, where)
    except ConfigError as error:
        return error
    return None
