"""The `tune` section: a sweep's search space, its searcher and scheduler, and the length of its trials."""

from __future__ import annotations

from itertools import count, takewhile
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
SteppedInterval = Annotated[list[float], Field(min_length=3, max_length=3)]
Integers = Annotated[list[int], Field(min_length=2, max_length=3)]


class Dimension(Section):
    """The values that one key may take. Set exactly one of the following."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values, of any type."""
    uniform: Interval | None = None
    """[lowest, highest]: any number between the two."""
    loguniform: Interval | None = None
    """[lowest, highest]: any number between the two, uniform on a log scale."""
    quniform: SteppedInterval | None = None
    """[lowest, highest, step]: lowest, lowest + step, and so on up to highest."""
    integer: Integers | None = None
    """[lowest, highest] or [lowest, highest, step]: integers."""

    @model_validator(mode="after")
    def _one_valid_kind(self) -> Dimension:
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"one of {', '.join(type(self).model_fields)}, such as {{loguniform: [1e-5, 1e-2]}}, not "
                f"{' and '.join(kinds) or 'none'}"
            )
        if self.choice is not None:
            return self
        low, high, *step = self.ends
        if low >= high or (self.loguniform and low <= 0):
            raise ValueError(f"{kinds[0]} with a lowest value{' above 0' if self.loguniform else ''} and a higher one")
        if step and step[0] <= 0:
            raise ValueError(f"{kinds[0]} with a step above 0")
        return self

    @property
    def ends(self) -> list[float] | list[int]:
        """[lowest, highest], and the step if there is one; [] for a choice."""
        return self.uniform or self.loguniform or self.quniform or self.integer or []

    @property
    def values(self) -> list[Any] | None:
        """All values, or None if the dimension is continuous."""
        if self.choice is not None:
            return self.choice
        if self.uniform or self.loguniform:
            return None
        low, high, step = (*self.ends, 1)[:3]
        return list(takewhile(lambda value: value <= high + 1e-9 * step, (low + step * i for i in count())))

    @property
    def candidates(self) -> list[Any]:
        """The values to check: every choice, or both ends of the range."""
        return self.choice or [self.ends[0], self.values[-1] if self.values else self.ends[1]]


class Tune(Section):
    space: dict[str, Dimension] = {}
    """Config key → the values to try: `{training.learning_rate: {loguniform: [1e-4, 1e-2]}, model.num_layers: {choice:
    [0, 2]}}`. Keys of `model`, `objective` and `training`. Default: the learning rate within a factor of 5 of the
    config's, the warm-up fraction, and the temperature if the objective has one."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """optuna: TPE, which learns from earlier trials (Bergstra et al. 2011). grid: every combination; allows no
    continuous dimensions."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """When to stop a trial early. asha: if it is not among the best 1/`reduction_factor` of the trials that reached the
    same rung (`grace_steps`, `reduction_factor` times as many, and so on; Li et al. 2020). median: if its best is worse
    than the median of the other trials' running means, once there are three (Golovin et al. 2017, Vizier). pbt: none is
    stopped. Every `grace_steps`, the worst quarter of the trials copy weights and values from the best quarter, and
    multiply each value by 0.8 or 1.2, or draw it again with probability 0.25 (Population Based Training, Jaderberg et
    al. 2017, section 4.1.1; shares and probability are Ray Tune's defaults). The first values are random, or a grid."""
    trials: int | None = Field(None, ge=1)
    """Total number of trials; by default 16, or all combinations of a grid. Raise it to continue a sweep."""
    metric: str | None = Field(None, min_length=1)
    """Validation metric that ranks trials, each by its best validation. By default `training.best_metric`, else NDCG@10
    of pairs, else the first objective's likelihood."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether to maximize or minimize the metric. auto: min for names with loss, nll or perplexity, else max."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps of a full trial, over which its schedule runs; by default the config's own length."""
    grace_steps: int | None = Field(None, ge=1)
    """Minimum steps of a trial, and with asha, median and pbt the steps between validations; by default
    1/`reduction_factor`² of a full trial."""
    reduction_factor: int = Field(3, ge=2)
    """One in this many trials continues after each asha rung (3: Hyperband, Li et al. 2018, section 2)."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the search. All trials share the training seed, unless the space includes it."""
    max_concurrent_trials: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Maximum concurrent trials. auto: as many as fit on the cluster with all their workers."""

    @model_validator(mode="after")
    def _grid_is_finite(self) -> Tune:
        continuous = [key for key, dimension in self.space.items() if dimension.values is None]
        if self.searcher == "grid" and continuous:
            raise ValueError(f"searcher=grid with only choice, quniform and integer, unlike {continuous[0]}")
        if self.searcher == "grid" and not self.space:
            raise ValueError("searcher=grid with a `space`")
        return self

    @model_validator(mode="after")
    def _population_takes_turns(self) -> Tune:
        if self.scheduler == "pbt" and self.trials == 1:
            raise ValueError("scheduler=pbt with trials of at least 2, which copy each other")
        if self.scheduler == "pbt" and self.max_concurrent_trials != "auto":
            raise ValueError(
                "scheduler=pbt with max_concurrent_trials=auto, because all trials take turns; raise "
                "scaling.cpus_per_worker to run fewer at a time"
            )
        return self
