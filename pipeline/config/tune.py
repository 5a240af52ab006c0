"""The `tune` section: what a sweep tries, how it chooses, and how long a trial may take."""

from __future__ import annotations

from itertools import count, takewhile
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section

Ends = Annotated[list[float], Field(min_length=2, max_length=2)]
Stepped = Annotated[list[float], Field(min_length=3, max_length=3)]
Whole = Annotated[list[int], Field(min_length=2, max_length=3)]


class Dimension(Section):
    """The values that one key may take: one of the following."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these, whatever their type."""
    uniform: Ends | None = None
    """Any number between the two."""
    loguniform: Ends | None = None
    """Any number between the two, each order of magnitude alike."""
    quniform: Stepped | None = None
    """[lowest, highest, step]: lowest, lowest + step, and so on up to highest."""
    integer: Whole | None = None
    """[lowest, highest], or [lowest, highest, step]: whole numbers."""

    @model_validator(mode="after")
    def _one_that_rises(self) -> Dimension:
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
            raise ValueError(f"{kinds[0]} of a lowest{' above 0' if self.loguniform else ''} and a higher value")
        if step and step[0] <= 0:
            raise ValueError(f"{kinds[0]} with a step above 0")
        return self

    @property
    def ends(self) -> list[float] | list[int]:
        """[lowest, highest], with a step where there is one; [] of a choice."""
        return self.uniform or self.loguniform or self.quniform or self.integer or []

    @property
    def values(self) -> list[Any] | None:
        """All values, where they can be counted."""
        if self.choice is not None:
            return self.choice
        if self.uniform or self.loguniform:
            return None
        low, high, step = (*self.ends, 1)[:3]
        return list(takewhile(lambda value: value <= high + 1e-9 * step, (low + step * i for i in count())))

    @property
    def candidates(self) -> list[Any]:
        """The values that must be valid for all to be: every choice, or both ends."""
        return self.choice or [self.ends[0], self.values[-1] if self.values else self.ends[1]]


class Tune(Section):
    space: dict[str, Dimension] = {}
    """Config key → the values to try: `{training.learning_rate: {loguniform: [1e-4, 1e-2]}, model.num_layers: {choice:
    [0, 2]}}`. Keys of `model`, `objective` and `training`. By default the learning rate within a factor of 5 of the
    config's, the share of steps that warm it up, and the temperature where the objective has one."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """optuna: TPE, which learns from the trials so far (Bergstra et al. 2011). grid: every combination, of values that
    can be counted."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """When a trial ends early. asha: when it is not among the best 1/`reduction_factor` of those that came so far, at
    `grace_steps`, at `reduction_factor` times as many, and so on (Li et al. 2020). median: when its best is worse than
    the median of the others' means so far, once there are three others (Golovin et al. 2017, Vizier)."""
    trials: int | None = Field(None, ge=1)
    """Trials in all; by default 16, and of a grid all combinations. It may be raised to go on with a sweep."""
    metric: str | None = Field(None, min_length=1)
    """Validation metric that trials are compared by, each by its best validation. By default `training.best_metric`,
    else NDCG@10 of pairs, else the first objective's likelihood."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Which end of the metric is good. auto: min of names with loss, nll or perplexity, else max."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps of a whole trial, over which its schedule runs; by default the config's own length."""
    grace_steps: int | None = Field(None, ge=1)
    """Steps that every trial gets, and between two validations with asha and median; by default 1/`reduction_factor`²
    of the whole."""
    reduction_factor: int = Field(3, ge=2)
    """One trial in so many continues after each rung of asha (3: Hyperband, Li et al. 2018, section 2)."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of what is tried. Training's own seed is the same in all trials, unless the space has it."""
    max_concurrent_trials: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Trials at the same time, at most. auto: as many as the cluster holds with all their workers."""

    @model_validator(mode="after")
    def _grid_is_finite(self) -> Tune:
        endless = [key for key, dimension in self.space.items() if dimension.values is None]
        if self.searcher == "grid" and endless:
            raise ValueError(f"searcher=grid with choice, quniform and integer alone, not as {endless[0]} has it")
        if self.searcher == "grid" and not self.space:
            raise ValueError("searcher=grid with a `space` to go through")
        return self
