"""A search space for Optuna: config dimensions become distributions, and Optuna's draws become config values.

space = Space.of(config)
space.distributions                        # {"training.learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}
space.values({"training.betas": "[0.9, 0.98]"})          # {"training.betas": [0.9, 0.98]}
space.point(config)                        # the config's own values, None if they are outside the space
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from pipeline.config import Config, Dimension

RATE_FACTOR = 5.0
TEMPERATURES = (0.02, 0.2)  # SimCSE's 0.05 in the middle of the decade
WARMUPS = (0.0, 0.3)


@dataclass(frozen=True)
class Space:
    """The config keys to search, with their ranges or choices."""

    dimensions: dict[str, Dimension]

    @classmethod
    def of(cls, config: Config) -> Space:
        return cls(config.tune.space or default_space(config))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: _distribution(dimension) for key, dimension in self.dimensions.items()}

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's values; draws those that it lacks."""
        drawn = {}
        for key, dimension in self.dimensions.items():
            kind, arguments = _in_optuna(dimension)
            drawn[key] = getattr(trial, f"suggest_{kind.lower()}")(key, **arguments)
        return self.values(drawn)

    def values(self, drawn: dict[str, Any]) -> dict[str, Any]:
        return {key: _from_label(self.dimensions[key], value) for key, value in drawn.items()}

    def clamp(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values moved into their ranges: pbt multiplies them without limits."""
        ranges = {key: each.ends for key, each in self.dimensions.items() if each.values is None}
        return values | {key: min(max(values[key], low), high) for key, (low, high) in ranges.items()}

    def grid(self) -> Iterator[dict[str, Any]]:
        """All points as Optuna represents them; the last key varies fastest."""
        axes = [[_label(each, value) for value in each.values or []] for each in self.dimensions.values()]
        return (dict(zip(self.dimensions, values, strict=True)) for values in itertools.product(*axes))

    def labels(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values as Optuna represents them."""
        return {key: _label(each, values[key]) for key, each in self.dimensions.items()}

    def point(self, config: Config) -> dict[str, Any] | None:
        """The config's own values as Optuna represents them; None if one is outside the space."""
        values = self.labels({key: config.get(key) for key in self.dimensions})
        inside = all(_contains(each, values[key]) for key, each in self.dimensions.items())
        return values if inside else None


def default_space(config: Config) -> dict[str, Dimension]:
    """The keys that are worth searching for any data: learning rate, warm-up and temperature."""
    training, is_table = config.training, config.model.dimensions()["num_layers"] == 0 and not config.model.pretrained
    key = "learning_rate" if not is_table or training.table_learning_rate is None else "table_learning_rate"
    rate = getattr(training, key)
    space = {
        f"training.{key}": Dimension(loguniform=[rate / RATE_FACTOR, min(rate * RATE_FACTOR, 10.0)]),
        "training.warmup_fraction": Dimension(uniform=list(WARMUPS)),
    }
    contrastive = config.objective.contrastive
    if contrastive and not (config.tune.scheduler == "pbt" and contrastive.learn_temperature):
        space["objective.contrastive.temperature"] = Dimension(loguniform=list(TEMPERATURES))
    return space


def _distribution(dimension: Dimension) -> BaseDistribution:
    kind, arguments = _in_optuna(dimension)
    return getattr(optuna.distributions, f"{kind}Distribution")(**arguments)  # type: ignore[no-any-return]


def _in_optuna(dimension: Dimension) -> tuple[str, dict[str, Any]]:
    """Optuna's name for the kind of dimension, and the arguments of its distribution and its suggest method."""
    if dimension.choice is not None:
        return "Categorical", {"choices": [_label(dimension, value) for value in dimension.choice]}
    ends = dict(zip(("low", "high"), dimension.candidates, strict=True))
    if dimension.integer:
        return "Int", {**ends, "step": (*dimension.integer, 1)[2]}
    step = dimension.quniform[2] if dimension.quniform else None
    return "Float", {**ends, "step": step, "log": dimension.loguniform is not None}


def _label(dimension: Dimension, value: Any) -> Any:
    """A value as Optuna represents it: as JSON if one of the choices is a list or a mapping, which Optuna rejects."""
    plain = dimension.choice is None or not any(isinstance(each, list | dict) for each in dimension.choice)
    return value if plain else json.dumps(value)


def _from_label(dimension: Dimension, value: Any) -> Any:
    return value if dimension.choice is None else next(v for v in dimension.choice if _label(dimension, v) == value)


def _contains(dimension: Dimension, value: Any) -> bool:
    if dimension.values is not None:
        return value in [_label(dimension, each) for each in dimension.values]
    return isinstance(value, int | float) and dimension.ends[0] <= value <= dimension.ends[1]
