"""What a run tells of itself while it trains: losses, rates, use of the device, time left; the workers' common clock.

    meter = Meter(settings, total_steps, device, state)
    metrics = meter.count(batch, flops, outcome.metrics, feed.waited_s, last=False)      # None between two reports

pairs_per_s, tokens_per_s     of all workers
real_token_share              real tokens over rows of the linear layers; 1 where nothing is padded
mfu                           model FLOP/s over the device's peak (PaLM, appendix B), recomputation not counted
data_wait_share               share of the time in which a worker waited for its next batch
eta_s                         seconds to the last step, at the rate since the last report
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from pipeline.config.training import Training
from pipeline.objectives.batch import Batch
from pipeline.training.checkpoints import TrainState
from pipeline.training.collectives import all_reduce_sum, world_size
from pipeline.training.flops import device_utilisation, memory, peak_flops
from pipeline.training.optimizer import autocast_type
from pipeline.training.validation import with_perplexity

ZERO = {"seconds": 0.0, "pairs": 0.0, "tokens": 0.0, "computed_tokens": 0.0, "flops": 0.0, "waited_s": 0.0}


class Meter:
    """Sums between two reports; `state.train_seconds` is kept up to date at each."""

    def __init__(self, settings: Training, total_steps: int, device: torch.device, state: TrainState) -> None:
        self.settings, self.total_steps = settings, total_steps
        self.device, self.state = device, state
        dtype = autocast_type(settings.precision, device) or torch.float32
        self.peak = peak_flops(device, dtype)
        self.sums, self.last_step, self.last, self.waited_s = dict(ZERO), state.step, time.monotonic(), 0.0

    def count(
        self, batch: Batch, flops: float, metrics: dict[str, Tensor], waited_s: float, *, last: bool
    ) -> dict[str, float] | None:
        """Take a step into account; on a reporting step, the metrics, the same on all workers.

        `flops`: operations of this worker's step. `waited_s`: seconds that it has waited for batches since the loop
        began.
        """
        self._add(batch, flops)
        if self.state.step % self.settings.log_every_steps and not last:
            return None
        now = time.monotonic()
        self.sums["seconds"], self.last = now - self.last, now
        self.sums["waited_s"], self.waited_s = waited_s - self.waited_s, waited_s
        values, sums = self._shared(metrics)
        steps, self.last_step, self.sums = self.state.step - self.last_step, self.state.step, dict(ZERO)
        seconds = sums["seconds"] / world_size()
        self.state.train_seconds += seconds
        found = {
            **with_perplexity(values),
            "pairs_per_s": sums["pairs"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "real_token_share": sums["tokens"] / max(sums["computed_tokens"], 1.0),
            "data_wait_share": sums["waited_s"] / sums["seconds"],
            "eta_s": (self.total_steps - self.state.step) * seconds / max(steps, 1),
            "train_seconds": round(self.state.train_seconds, 2),
            **memory(self.device),
        }
        if self.peak:
            found["mfu"] = sums["flops"] / seconds / (self.peak * world_size())
        utilisation = device_utilisation(self.device)
        return found if utilisation is None else found | {"device_utilisation": utilisation}

    def _add(self, batch: Batch, flops: float) -> None:
        packed = [*batch.fields.values(), batch.negatives]
        self.sums["pairs"] += len(batch)
        self.sums["tokens"] += sum(int(each.lengths.sum()) for each in packed)
        self.sums["computed_tokens"] += sum(len(each.ids) for each in packed)
        self.sums["flops"] += flops

    def _shared(self, metrics: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the metrics over workers, and the workers' sums."""
        names = sorted(metrics)
        own = [*(float(metrics[name]) for name in names), *self.sums.values()]
        shared = all_reduce_sum(torch.tensor(own, dtype=torch.float64, device=self.device)).tolist()
        totals, sums = shared[: len(names)], shared[len(names) :]
        means = {name: value / world_size() for name, value in zip(names, totals, strict=True)}
        return means, dict(zip(self.sums, sums, strict=True))
