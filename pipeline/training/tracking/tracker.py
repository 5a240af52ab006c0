"""What a tracker is: somewhere that metrics and alerts go while a model trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

Metrics = dict[str, float]
"""`step`, and figures of the training or, all named `validation_*`, of a validation at that step."""

VALIDATION = "validation_"


class Tracker(ABC):
    """Takes metrics in order of step, until it is closed; after a restart of workers, steps come that came before.

    Any method may raise: `Trackers` then leaves the tracker out and goes on.
    """

    name = "tracker"

    @abstractmethod
    def log(self, metrics: Metrics) -> None: ...

    def alert(self, row: dict[str, Any]) -> None:  # noqa: B027
        """Take an alert: `step`, `title`, `text`. Most trackers have no place for one."""

    def close(self, failed: bool) -> None:  # noqa: B027
        """Write what is still held back. `failed`: the run ends with an error."""


def grouped(metrics: Metrics) -> Metrics:
    """The figures under the names that interfaces sort into groups: `train/loss`, `validation/ndcg@10`."""
    return {
        f"validation/{name.removeprefix(VALIDATION)}" if name.startswith(VALIDATION) else f"train/{name}": value
        for name, value in metrics.items()
        if name != "step"
    }
