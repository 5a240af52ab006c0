"""A space in Optuna's terms: from dimensions to distributions, and from what Optuna draws back to a config's values.

space = Space.of(config)
space.distributions                        # {"training.learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}
space.values({"training.betas": "[0.9, 0.98]"})          # {"training.betas": [0.9, 0.98]}
space.point(config)                        # where the config itself lies, None where that is outside
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
    dimensions: dict[str, Dimension]

    @classmethod
    def of(cls, config: Config) -> Space:
        return cls(config.tune.space or default_space(config))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: _distribution(dimension) for key, dimension in self.dimensions.items()}

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's values, drawn where it has none yet."""
        drawn = {}
        for key, dimension in self.dimensions.items():
            kind, arguments = _in_optuna(dimension)
            drawn[key] = getattr(trial, f"suggest_{kind.lower()}")(key, **arguments)
        return self.values(drawn)

    def values(self, drawn: dict[str, Any]) -> dict[str, Any]:
        return {key: _from_label(self.dimensions[key], value) for key, value in drawn.items()}

    def grid(self) -> Iterator[dict[str, Any]]:
        """All points, as Optuna has them, the last key's values changing fastest."""
        axes = [[_label(each, value) for value in each.values or []] for each in self.dimensions.values()]
        return (dict(zip(self.dimensions, values, strict=True)) for values in itertools.product(*axes))

    def point(self, config: Config) -> dict[str, Any] | None:
        """The config's own values, as Optuna has them; None where one of them is not in the space."""
        found = {key: _label(each, config.get(key)) for key, each in self.dimensions.items()}
        inside = all(_contains(each, found[key]) for key, each in self.dimensions.items())
        return found if inside else None


def default_space(config: Config) -> dict[str, Dimension]:
    """What is worth trying whatever the data: the rate, its warm-up, the temperature."""
    training, table_alone = config.training, config.model.dimensions()["num_layers"] == 0
    of_table = table_alone and not config.model.pretrained and training.table_learning_rate is not None
    rate = training.table_learning_rate if of_table and training.table_learning_rate else training.learning_rate
    space = {
        "training.table_learning_rate" if of_table else "training.learning_rate": Dimension(
            loguniform=[rate / RATE_FACTOR, min(rate * RATE_FACTOR, 10.0)]
        ),
        "training.warmup_fraction": Dimension(uniform=list(WARMUPS)),
    }
    if config.objective.contrastive:
        space["objective.contrastive.temperature"] = Dimension(loguniform=list(TEMPERATURES))
    return space


def _distribution(dimension: Dimension) -> BaseDistribution:
    kind, arguments = _in_optuna(dimension)
    found: BaseDistribution = getattr(optuna.distributions, f"{kind}Distribution")(**arguments)
    return found


def _in_optuna(dimension: Dimension) -> tuple[str, dict[str, Any]]:
    """Its kind, and the arguments that both Optuna's distribution of that kind and its suggest method take."""
    if dimension.choice is not None:
        return "Categorical", {"choices": [_label(dimension, value) for value in dimension.choice]}
    ends = dict(zip(("low", "high"), dimension.candidates, strict=True))
    if dimension.integer:
        return "Int", {**ends, "step": (*dimension.integer, 1)[2]}
    step = dimension.quniform[2] if dimension.quniform else None
    return "Float", {**ends, "step": step, "log": dimension.loguniform is not None}


def _label(dimension: Dimension, value: Any) -> Any:
    """Choices go by their JSON where one of them is a list or a mapping, which Optuna does not take."""
    plain = dimension.choice is None or not any(isinstance(each, list | dict) for each in dimension.choice)
    return value if plain else json.dumps(value)


def _from_label(dimension: Dimension, value: Any) -> Any:
    return value if dimension.choice is None else next(v for v in dimension.choice if _label(dimension, v) == value)


def _contains(dimension: Dimension, value: Any) -> bool:
    if dimension.values is not None:
        return value in [_label(dimension, each) for each in dimension.values]
    return isinstance(value, int | float) and dimension.ends[0] <= value <= dimension.ends[1]
