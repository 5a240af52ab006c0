"""How long a run is, and whether it is at its end."""

from __future__ import annotations

import math

from pipeline.config import Config
from pipeline.data.plan import Plan
from pipeline.training.checkpoints import TrainState

DEFAULT_EPOCHS = 3


def steps_of(config: Config, plan: Plan) -> int:
    """Optimizer steps of the whole run: whichever limit comes first."""
    steps, epochs = config.training.max_steps, config.training.max_epochs
    if epochs is None:
        if steps is not None:
            return steps
        epochs = DEFAULT_EPOCHS
    by_epochs = max(1, math.ceil(epochs * plan.batches_per_epoch))
    return min(by_epochs, steps or by_epochs)


def is_finished(config: Config, total_steps: int, state: TrainState) -> bool:
    limit = config.training.max_time_s
    out_of_time = limit is not None and state.train_seconds >= limit
    return state.ended_early or out_of_time or state.step >= total_steps
