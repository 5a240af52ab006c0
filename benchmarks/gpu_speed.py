"""How fast a model trains and embeds on a device, in the largest micro-batch that fits.

    speed = measure(Case("base", "512", "bf16"), torch.device("cuda"), Bounds())
    speed.mfu, speed.tokens_per_s

A step is training's own, batches made ready by a thread beside it included. The micro-batch is doubled until memory
runs out; each size is tried on every batch that is then timed, so that all is allocated and compiled before.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from benchmarks.gpu_training import Trainer, encoder_of, learner_of, pairs, shape_of
from pipeline.model.batch import MicroBatch
from pipeline.model.transformer import compile_layers
from pipeline.training.meter import memory, peak_flops, step_flops
from pipeline.training.optimizer import autocast_type
from pipeline.training.prefetch import Prefetch, to_batch, to_device
from pipeline.training.step import OutOfMemory

DISTINCT = 2  # batches that are timed, in turn
FORWARD = 1 / 3  # of a step's operations


@dataclass(frozen=True)
class Case:
    """What is measured: of which model, on texts of which lengths, in which precision."""

    size: str
    texts: str
    precision: str
    """fp32, bf16, fp16 as in `training.precision`, or tf32."""
    compiled: bool = False
    trains: bool = True
    """Training steps; else vectors alone, without a gradient."""

    @property
    def autocast(self) -> str:
        return "fp32" if self.precision == "tf32" else self.precision

    def __str__(self) -> str:
        work, mode = "train" if self.trains else "embed", "compiled" if self.compiled else "eager"
        return f"{work} {self.size} {self.texts} {self.precision} {mode}"


@dataclass(frozen=True)
class Bounds:
    """How long is measured, and how large the micro-batches are."""

    seconds: float = 3.0
    steps: int = 5
    """At least so many are timed."""
    fewest_tokens: int = 1 << 14
    """Of the first micro-batch that is tried."""
    max_tokens: int = 1 << 19
    """No larger ones are tried: there is nothing to gain from them."""
    backend: str = "inductor"
    """torch.compile's."""


@dataclass(frozen=True)
class Speed:
    """What was found. Rates are of real tokens, and of pairs of texts."""

    case: Case
    pairs: int
    """Of a micro-batch."""
    tokens: float
    """Of a micro-batch, on average."""
    steps: int
    seconds: float
    mfu: float | None
    """Without a gradient it is of a forward pass; None where the device's peak is not known."""
    peak_bytes: float
    """While the steps ran; on a CPU since the process began."""
    first_step_s: float
    """Seconds from a fresh model to the end of the first step, compilation included."""
    wait_share: float
    """Share of the time in which the device's loop waited for the next batch."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens * self.steps / self.seconds

    @property
    def pairs_per_s(self) -> float:
        return self.pairs * self.steps / self.seconds


def measure(case: Case, device: torch.device, bounds: Bounds) -> Speed:
    """Raises OutOfMemory where not even the smallest micro-batch fits."""
    with matmul_precision("high" if case.precision == "tf32" else "highest"):
        runner = _Runner(case, device, bounds)
        fitting, first_step_s = _fitting(runner, bounds)
        while fitting:
            try:
                return _timed(runner, fitting.pop(), bounds, first_step_s)
            except (OutOfMemory, torch.OutOfMemoryError):  # two batches wait in memory beside the one that is run
                pass
            release(device)
    raise OutOfMemory


def profile(case: Case, device: torch.device, bounds: Bounds) -> str:
    """A table of the operations that take most of the device's time, over three steps."""
    runner = _Runner(case, device, bounds)
    fitting, _ = _fitting(runner, bounds)
    ready = runner.ready(fitting[-1][0])
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(3):
            runner.run(ready)
    column = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60)


@contextmanager
def matmul_precision(wanted: str) -> Iterator[None]:
    """ "high" lets float32 products be TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def release(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Ready:
    parts: list[MicroBatch]
    tokens: int
    flops: float


class _Runner:
    """A fresh model, and what is to be done with a batch."""

    def __init__(self, case: Case, device: torch.device, bounds: Bounds) -> None:
        torch.compiler.reset()
        self.case, self.device = case, device
        with device:
            self.learner = learner_of(shape_of(case.size), device)
        if case.compiled:
            compile_layers(encoder_of(self.learner), bounds.backend)
        self.trainer = Trainer(self.learner, case.autocast, device) if case.trains else None
        self.learner.train(case.trains)

    def tables(self, count: int) -> list[pa.Table]:
        vocab_size = shape_of(self.case.size).vocab_size
        return [pairs(self.case.texts, count, vocab_size, seed) for seed in range(DISTINCT)]

    def ready(self, rows: pa.Table) -> _Ready:
        """As training's loop makes a batch ready."""
        batch = to_batch(rows)
        parts = [self.learner.prepare(batch, seed=0)]
        flops = step_flops(self.learner, parts) * (1 if self.case.trains else FORWARD)
        return _Ready(to_device(parts, self.device), batch.tokens, flops)

    def run(self, ready: _Ready) -> None:
        """Ends when the device has: a step reads the gradient's norm, and vectors come to the host."""
        if self.trainer is not None:
            self.trainer.step(ready.parts)
            return
        dtype = autocast_type(self.case.autocast, self.device)
        precision: Any = torch.autocast(self.device.type, dtype) if dtype else nullcontext()
        with torch.inference_mode(), precision:
            for part in ready.parts:
                self.learner.embed(part).cpu()


def _fitting(runner: _Runner, bounds: Bounds) -> tuple[list[list[pa.Table]], float]:
    """Batches of ever more pairs, as far as memory goes; and the first step's seconds."""
    per_pair = sum(runner.ready(rows).tokens for rows in runner.tables(16)) / (16 * DISTINCT)
    count = 2 ** max(1, round(bounds.fewest_tokens / per_pair).bit_length() - 1)
    found: list[list[pa.Table]] = []
    first_step_s = 0.0
    while not found or count * per_pair <= bounds.max_tokens:
        tables = runner.tables(count)
        try:
            for rows in tables:
                began = time.perf_counter()
                runner.run(runner.ready(rows))
                first_step_s = first_step_s or time.perf_counter() - began
        except (OutOfMemory, torch.OutOfMemoryError):
            break
        found.append(tables)
        count *= 2
    release(runner.device)
    return found, first_step_s


def _timed(runner: _Runner, tables: list[pa.Table], bounds: Bounds, first_step_s: float) -> Speed:
    device, steps, tokens, flops = runner.device, 0, 0, 0.0
    feed = Prefetch(itertools.cycle(tables), runner.ready, device)
    with closing(feed):
        runner.run(next(feed))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        began, waited_s = time.perf_counter(), feed.waited_s
        while steps < bounds.steps or time.perf_counter() - began < bounds.seconds:
            ready = next(feed)
            runner.run(ready)
            steps, tokens, flops = steps + 1, tokens + ready.tokens, flops + ready.flops
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the optimizer's step
        seconds = time.perf_counter() - began
    peak = peak_flops(device, autocast_type(runner.case.autocast, device))
    return Speed(
        runner.case,
        tables[0].num_rows,
        tokens / steps,
        steps,
        seconds,
        flops / seconds / peak if peak else None,
        memory(device)["memory_peak_bytes"],
        first_step_s,
        (feed.waited_s - waited_s) / seconds,
    )
