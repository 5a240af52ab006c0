"""Training metrics: losses, throughput, memory, model FLOPs utilisation (MFU) and time left.

    meter = Meter(settings, total_steps, device, state)
    metrics = meter.count(batch, flops, outcome.metrics, feed.waited_s, last=False)      # None between two reports

pairs_per_s, tokens_per_s     of all workers
real_token_share              real tokens / tokens that the linear layers process; 1 without padding
mfu                           model FLOP/s / the device's peak (PaLM, appendix B), without recomputation; left out of
                              models without layers
data_wait_share               share of the time that workers waited for their next batch
eta_s                         seconds to the last step, at the rate since the last report

    flops = step_flops(learner, parts)                            # of all objectives of a step
    mfu = flops / seconds / peak_flops(device, torch.bfloat16)

A multiply-add is two operations. A matrix of n numbers costs 2n per token forward and 4n backward; attention costs
12 x layers x width x length^2 per text (PaLM, Chowdhery et al. 2022, appendix B). Recomputation to save memory does not
count. Pooling and the similarities of the contrastive loss are not counted, and a causal mask or a window is counted as
full attention. The result is within 1% of torch's own count.
"""

from __future__ import annotations

import functools
import re
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.config.training import Training
from pipeline.model.batch import Batch, GenerativeTask, MicroBatch
from pipeline.model.decoder import Decoder
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.learner import Learner
from pipeline.model.linear import use_onednn
from pipeline.model.transformer import Encoder
from pipeline.training.checkpoints import TrainState
from pipeline.training.collectives import all_reduce_sum, world_size
from pipeline.training.optimizer import autocast_type
from pipeline.training.validation import with_perplexity

Lengths = Tensor | npt.NDArray[np.integer] | list[int]

MATRIX = 6  # operations per number and token: 2 forward, 4 backward
ATTENTION = 12  # operations per layer, unit of width, query and key: 4 forward (two products), 8 backward

MEASURED_FOR_S = 0.2
MEASURED_SIZES = (512, 1024)  # rows: small ones finish before another process interrupts; large ones use many cores

TERA = 1e12
PEAKS: dict[str, dict[str, float]] = {
    # From NVIDIA's data sheets, half of the figures for sparse matrices. The first name that torch's device name
    # contains is used, so longer names come first.
    "B200": {"fp16": 2250, "tf32": 1125, "fp32": 75},  # HGX B200, an eighth of the board
    "H200 NVL": {"fp16": 835.5, "tf32": 417.5, "fp32": 60},
    "H200": {"fp16": 989.5, "tf32": 494.5, "fp32": 67},
    "GH200": {"fp16": 989.5, "tf32": 494.5, "fp32": 67},
    "H100 PCIe": {"fp16": 756.5, "tf32": 378, "fp32": 51},
    "H100 NVL": {"fp16": 835.5, "tf32": 417.5, "fp32": 60},
    "H100": {"fp16": 989.5, "tf32": 494.5, "fp32": 67},  # SXM, which torch calls H100 80GB HBM3
    "A100": {"fp16": 312, "tf32": 156, "fp32": 19.5},  # SXM and PCIe alike
    "A40": {"fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A30": {"fp16": 165, "tf32": 82, "fp32": 10.3},
    "A10G": {"fp16": 70, "tf32": 35, "fp32": 35},  # Amazon's variant of the A10, with slower tensor cores
    "A10": {"fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"fp16": 362, "tf32": 183, "fp32": 91.6},
    "L40": {"fp16": 181, "tf32": 90.5, "fp32": 90.5},
    "L4": {"fp16": 121, "tf32": 60, "fp32": 30.3},
    "T4": {"fp16": 65, "fp32": 8.1},  # Turing: neither bf16 nor TF32
    "V100S": {"fp16": 130, "fp32": 16.4},
    "V100-PCIE": {"fp16": 112, "fp32": 14},
    "V100": {"fp16": 125, "fp32": 15.7},  # SXM2
    # From the architecture whitepapers, appendix A; 16 bits with float32 accumulation, as in torch.
    "RTX 4090": {"fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "RTX A6000": {"fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
}
"""Dense peaks in TFLOP/s. GPUs with a TF32 figure run bf16 as fast as fp16; the others have no bf16."""

OTHER_CHIP = (
    r"(?! (Ti|D|SUPER|Laptop)\b)(?!.*\bMIG\b)"  # another chip whose name starts with the same words, or a slice
)

ZERO = {"seconds": 0.0, "pairs": 0.0, "tokens": 0.0, "computed_tokens": 0.0, "flops": 0.0, "waited_s": 0.0}


class Meter:
    """Accumulates counts between two reports. Each report updates `state.train_seconds`."""

    def __init__(self, settings: Training, total_steps: int, device: torch.device, state: TrainState) -> None:
        self.settings, self.total_steps = settings, total_steps
        self.device, self.state = device, state
        dtype = autocast_type(settings.precision, device) or torch.float32
        self.peak = peak_flops(device, dtype)
        self.sums, self.last_step, self.last, self.waited_s = dict(ZERO), state.step, time.monotonic(), 0.0

    def count(
        self, batch: Batch, flops: float, metrics: dict[str, Tensor], waited_s: float, *, last: bool
    ) -> dict[str, float] | None:
        """Count a step. On a reporting step, return the metrics, which are the same on all workers.

        `flops`: operations of this worker's step. `waited_s`: total seconds it has waited for batches.
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
        report = {
            **with_perplexity(values),
            "pairs_per_s": sums["pairs"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "real_token_share": sums["tokens"] / max(sums["computed_tokens"], 1.0),
            "data_wait_share": sums["waited_s"] / sums["seconds"],
            "eta_s": (self.total_steps - self.state.step) * seconds / max(steps, 1),
            "train_seconds": round(self.state.train_seconds, 2),
            **memory(self.device),
        }
        mfu = sums["flops"] / seconds / (self.peak * world_size()) if self.peak else 0.0
        if 0 < mfu <= 1:  # a table has no products; above 1, the peak was measured while other processes were busy
            report["mfu"] = mfu
        utilisation = device_utilisation(self.device)
        return report if utilisation is None else report | {"device_utilisation": utilisation}

    def _add(self, batch: Batch, flops: float) -> None:
        packed = [*batch.texts, batch.negatives]
        self.sums["pairs"] += len(batch)
        self.sums["tokens"] += sum(int(each.lengths.sum()) for each in packed)
        self.sums["computed_tokens"] += sum(len(each.ids) for each in packed)
        self.sums["flops"] += flops

    def _shared(self, metrics: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics' means over workers, and the sums of `self.sums` over workers."""
        names = sorted(metrics)
        local = [*(float(metrics[name]) for name in names), *self.sums.values()]
        reduced = all_reduce_sum(torch.tensor(local, dtype=torch.float64, device=self.device)).tolist()
        totals, sums = reduced[: len(names)], reduced[len(names) :]
        means = {name: value / world_size() for name, value in zip(names, totals, strict=True)}
        return means, dict(zip(self.sums, sums, strict=True))


def forward_backward_flops(model: nn.Module, lengths: Lengths) -> float:
    """Operations of one forward and backward pass over texts of so many tokens, (N,).

    `model`: an `Encoder` (only active layers count), a `Decoder` (without cross-attention and output table) or a
    `PretrainedEncoder`. For an `EmbeddingModel` or a `Learner`, only the encoder counts; `step_flops` adds the rest.
    """
    stack, tokens = _stack(model), _floats(lengths)
    active = stack.active_layers if isinstance(stack, Encoder) else None
    numbers, attended = _size(stack, active)
    return float(MATRIX * numbers * tokens.sum() + ATTENTION * attended * (tokens**2).sum())


def step_flops(learner: Learner, parts: Iterable[MicroBatch]) -> float:
    """Operations of a step of this worker: encoders, decoders and the scores over the vocabulary.

    Call it before `parts` move to a GPU: reading their lengths there would wait for the device.
    """
    flops = 0.0
    for part in parts:
        if part.texts is not None:
            flops += forward_backward_flops(learner, part.texts.lengths)
        flops += sum(_task_flops(learner, task) for task in part.tasks.values())
    return flops


def _task_flops(learner: Learner, task: GenerativeTask) -> float:
    read = 0.0 if task.source is None else forward_backward_flops(learner, task.source.lengths)
    if task.inputs is None:
        assert learner.masked_head is not None
        scoring = _in_matrices(learner.masked_head) + learner.model.token_table.weight.numel()
        return read + float(MATRIX * scoring * len(task.labels))
    assert learner.decoder is not None
    written = forward_backward_flops(learner.decoder, task.inputs.lengths)
    scored = MATRIX * learner.decoder.output_table.numel() * len(task.labels)
    return read + written + scored + _memory_flops(learner.decoder, task)


def _memory_flops(decoder: Decoder, task: GenerativeTask) -> float:
    """Operations of a decoder's cross-attention to the source's states, or to one vector per text."""
    if task.source is None or task.inputs is None:
        return 0.0
    rows = _floats(task.source.lengths) if task.sees == "states" else np.ones(len(task.source))
    queries, layers = _floats(task.inputs.lengths), list(decoder.layers)
    per_token, per_row = (
        sum(_in_matrices(getattr(layer.cross_attn, name)) for layer in layers for name in names)
        for names in (("q_proj", "o_proj"), ("k_proj", "v_proj"))
    )
    matrices = MATRIX * (per_token * queries.sum() + per_row * rows.sum())
    return float(matrices + ATTENTION * len(layers) * decoder.shape.d_model * (queries * rows).sum())


def _stack(model: nn.Module) -> nn.Module:
    if isinstance(model, Learner):
        model = model.model
    return model.backbone if isinstance(model, EmbeddingModel) else model


def _size(stack: nn.Module, active_layers: int | None) -> tuple[int, int]:
    """Numbers in matrices, and layers x width. Cached, because a walk over the modules takes a millisecond."""
    sizes = _SIZES.setdefault(stack, {})
    if active_layers not in sizes:
        if isinstance(stack, Encoder):
            layers, width = stack.active_layers, stack.width
        elif isinstance(stack, Decoder):
            layers, width = len(stack.layers), stack.shape.d_model
        else:
            layers, width = len(stack.layers), int(stack.width)  # type: ignore[arg-type]
        sizes[active_layers] = _in_layers(stack), layers * width
    return sizes[active_layers]


_SIZES: WeakKeyDictionary[nn.Module, dict[int | None, tuple[int, int]]] = WeakKeyDictionary()


def _in_matrices(module: nn.Module, without: Iterable[Tensor] = ()) -> int:
    """Numbers in the module's matrices, without biases and norms."""
    skipped = {id(parameter) for parameter in without}
    matrices = (parameter for parameter in module.parameters() if parameter.ndim > 1)
    return sum(parameter.numel() for parameter in matrices if id(parameter) not in skipped)


def _in_layers(stack: nn.Module) -> int:
    """Numbers in the matrices that each token passes through: no embedding tables, no cross-attention."""
    if isinstance(stack, Encoder):
        return sum(_in_matrices(layer) for layer in stack.layers[: stack.active_layers])
    if isinstance(stack, Decoder):
        memory: list[Any] = [layer.cross_attn for layer in stack.layers if hasattr(layer, "cross_attn")]
        return _in_matrices(stack.layers) - sum(_in_matrices(attention) for attention in memory)
    return _in_matrices(stack, [module.weight for module in stack.modules() if isinstance(module, nn.Embedding)])


def _floats(lengths: Lengths) -> npt.NDArray[np.float64]:
    """Lengths as floats, because the sum of their squares may overflow an integer."""
    return np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths, dtype=np.float64)


def peak_flops(device: torch.device, dtype: torch.dtype | None = None) -> float | None:
    """The device's peak FLOP/s in dense matrix products of this type (default: float32).

    For a GPU, it is looked up in `PEAKS`; None if missing. float32 means TF32 if torch may use it. For a CPU, it is
    measured once per type and number of threads, in about 0.2 s.
    """
    dtype = dtype or torch.float32
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype)
    return _measured_peak(torch.get_num_threads(), dtype) if device.type == "cpu" else None


def gpu_peak(name: str, dtype: torch.dtype) -> float | None:
    """The peak of a GPU by its name: "NVIDIA A100-SXM4-80GB" has 312e12 in torch.bfloat16."""
    peaks = next((figures for part, figures in PEAKS.items() if re.search(rf"\b{part}\b{OTHER_CHIP}", name)), {})
    if dtype == torch.bfloat16 and "tf32" not in peaks:
        return None
    if dtype in (torch.bfloat16, torch.float16):
        column = "fp16"
    else:
        column = "tf32" if "tf32" in peaks and torch.get_float32_matmul_precision() != "highest" else "fp32"
    return peaks[column] * TERA if column in peaks else None


@functools.cache
def _measured_peak(threads: int, dtype: torch.dtype) -> float:
    """The fastest pass through square linear layers, computed as in the models. `threads` is only the cache's key."""
    return max(_measured(size, dtype) for size in MEASURED_SIZES)


@torch.no_grad()
def _measured(size: int, dtype: torch.dtype) -> float:
    layer, x = nn.Sequential(nn.Linear(size, size, bias=False, dtype=dtype)), torch.ones(size, size, dtype=dtype)
    use_onednn(layer)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < MEASURED_FOR_S / len(MEASURED_SIZES):  # the first pass warms up
        start = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def device_utilisation(device: torch.device) -> float | None:
    """Percent of the last sample (up to a second) in which the GPU was busy; None on a CPU or without NVML."""
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.utilization(device))
    except Exception:  # pynvml may be missing, too old for the driver, or lack permission
        return None


def memory(device: torch.device) -> dict[str, float]:
    """Memory in use now and at the peak, in bytes. For a CPU, it is the process's resident set.

    For a GPU, it adds `memory_reserved_bytes`, torch's peak reservation, and `memory_share`, its share of the device.
    """
    if device.type != "cuda":
        return _process_memory()
    reserved = torch.cuda.max_memory_reserved(device)
    return {
        "memory_bytes": torch.cuda.memory_allocated(device),
        "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
        "memory_reserved_bytes": reserved,
        "memory_share": reserved / torch.cuda.get_device_properties(device).total_memory,
    }


def _process_memory() -> dict[str, float]:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: getrusage(2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return {"memory_peak_bytes": peak}
    resident = int(statistics.read_text().split()[1]) * resource.getpagesize()
    return {"memory_bytes": resident, "memory_peak_bytes": max(peak, resident)}
