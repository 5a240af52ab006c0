"""The terms that all trials of a sweep share: the metric, the budget, when they are compared; and a trial's config.

terms = Terms.of(config, total_steps=900)         # Terms("ndcg@10", True, 900, 100): compared at 100, 300 and 900 steps
trial_config(config, terms, 3, {"training.learning_rate": 1e-3}).run_dir          # <root>/runs/<run>/tune/trials/0003
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.training.run_folder import fixed_keys
from pipeline.training.stopping import lower_is_better
from pipeline.tuning.space import Space


@dataclass(frozen=True)
class Terms:
    metric: str
    """As validation names it: ndcg@10."""
    higher_is_better: bool
    total_steps: int
    """Of a trial that goes to its end."""
    grace_steps: int
    data_fingerprint: str = ""

    @classmethod
    def of(cls, config: Config, total_steps: int, data_fingerprint: str = "") -> Terms:
        """Raises ConfigError where trials would end before they are compared."""
        wanted, metric = config.tune, metric_of(config)
        grace = wanted.grace_steps or -(-total_steps // wanted.reduction_factor**2)  # so that the end is no rung
        if grace > total_steps:
            raise ConfigError(
                f"tune.grace_steps: found {grace}; allowed are at most the {total_steps} steps of a whole trial"
            )
        higher = not lower_is_better(metric) if wanted.mode == "auto" else wanted.mode == "max"
        return cls(metric, higher, total_steps, grace, data_fingerprint)

    @property
    def sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def described(self, config: Config, space: Space) -> dict[str, Any]:
        """What may not change while a sweep goes on; more trials may come."""
        wanted = config.tune.model_dump(mode="json", exclude={"trials", "max_concurrent_trials", "space"})
        dimensions = {key: each.model_dump(exclude_none=True) for key, each in space.dimensions.items()}
        described = {
            **{f"tune.{key}": value for key, value in wanted.items()},
            **{f"tune.space.{key}": value for key, value in dimensions.items()},
            **fixed_keys(config),
            "data (the prepared data)": self.data_fingerprint,
        }
        return dict(json.loads(json.dumps(described)))


def metric_of(config: Config) -> str:
    """The validation metric that decides."""
    named = config.tune.metric or config.training.best_metric
    if named:
        return named.removeprefix("validation_")
    return "ndcg@10" if config.objective.contrastive else f"{next(iter(config.objective.named))}_nll"


def trial_config(config: Config, terms: Terms, number: int, values: dict[str, Any]) -> Config:
    """A trial as a run of its own, below the sweep's. Raises ConfigError where the values do not go together.

    Its newest checkpoint alone is kept, beside its best model's.
    """
    every = config.training.validate_every_steps if config.tune.scheduler == "none" else terms.grace_steps
    workers, steps = config.scaling.num_workers, config.tune.max_steps
    own = {
        "storage.run": f"{config.storage.run}/tune/trials/{number:04d}",
        "logging.save_dir": None,
        "training.max_steps": steps or config.training.max_steps,
        "training.max_epochs": None if steps else config.training.max_epochs,
        "training.best_metric": terms.metric,
        "training.validate_every_steps": every,
        "checkpointing.every_steps": min(config.checkpointing.every_steps, every),
        "checkpointing.max_checkpoints": 1,
        "scaling.num_workers": 1 if workers == "auto" else workers,
    }
    return config.changed(values | own, f"trial {number}")
