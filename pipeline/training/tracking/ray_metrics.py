"""Ray's metrics endpoint: gauges that Prometheus collects from each node, and Ray's dashboard and Grafana show.

text_embedding_loss{run="default"} 1.9             # and text_embedding_validation_ndcg_10, and so on
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.training.tracking.tracker import Metrics, Tracker

PREFIX = "text_embedding_"


class RayMetrics(Tracker):
    """A gauge a metric, with the run's name as its tag. Ray must have been started."""

    name = "ray"

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.gauges: dict[str, Any] = {}

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._gauge(name).set(float(value), self.tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self.gauges:
            description = f"{name} of a training run, as in its metrics.jsonl"
            self.gauges[name] = Gauge(PREFIX + re.sub(r"\W", "_", name), description, tag_keys=("run",))
        return self.gauges[name]
