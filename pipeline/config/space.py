"""A sweep's space held against the config: every key must be one, and every value must make a config.

    check_space(config, "configs/tune.yaml: tune.space")
    # ConfigError: configs/tune.yaml: tune.space: training.learning_rat: unknown key; did you mean learning_rate?

Ends of ranges and all choices are tried, each in the config as it is; where a value is refused there, with any value of
any other key beside it, since widths and heads must fit each other. What fits in no such pair is refused.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.tree import Config
from pipeline.core.outcome import ConfigError

SECTIONS = ("model", "objective", "training")
PREPARED = "it would change the prepared data, of which all trials share one"
FIXED = {
    "data": PREPARED,
    "tokenizer": PREPARED,
    "model.pretrained": f"it brings a tokenizer of its own, and so {PREPARED}",
    "training.max_steps": "all trials have as many steps, tune.max_steps",
    "training.max_epochs": "all trials have as many steps, tune.max_steps",
    "training.max_time_s": "all trials have as many steps, tune.max_steps",
    "training.validate_every_steps": "trials are compared at the same steps, tune.grace_steps",
    "training.validation_pairs": "trials are scored on the same records",
    "training.best_metric": "trials are compared by one metric, tune.metric",
}
"""Key, or section → why no trial may have its own."""


def check_space(config: Config, where: str) -> None:
    """Raise ConfigError for the first key or value of `tune.space` that no trial could have."""
    space = config.tune.space
    for key, dimension in space.items():
        _check_key(key, where)
        for value in dimension.candidates:
            pairs = (
                {key: value, other: beside} for other in space if other != key for beside in space[other].candidates
            )
            error = _refusal(config, {key: value}, where)
            if error and not any(_refusal(config, pair, where) is None for pair in pairs):
                raise error


def _check_key(key: str, where: str) -> None:
    section = key.partition(".")[0]
    reason = FIXED.get(key) or FIXED.get(section)
    if reason:
        raise ConfigError(f"{where}: {key}: found a key that is the same in all trials; {reason}")
    if section not in SECTIONS or "." not in key:
        raise ConfigError(
            f"{where}: {key}: found a key that no trial is trained with; allowed are keys of {', '.join(SECTIONS)}, "
            "such as training.learning_rate"
        )


def _refusal(config: Config, values: dict[str, Any], where: str) -> ConfigError | None:
    try:
        config.changed(values, where)
    except ConfigError as error:
        return error
    return None
