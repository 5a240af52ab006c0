"""Distributed strategies: the interface, and ddp, where each worker holds a copy of the model.

    strategy = DataParallel(compression=None)
    strategy.attach(learner)
    strategy.start()                                   # gradients are zero
    first_part.backward()                              # gradients accumulate on this worker
    with strategy.gradient_sync():
        last_part.backward()                           # a bucket is sent when its last gradient is ready
    flags = strategy.finish([False, True])             # gradients are means over workers, flags are sums
    norm = strategy.clip(max_norm=1.0)

ddp averages gradients while the backward pass runs, in buckets whose layout never changes. A gradient is a view into
its bucket, so nothing is copied. The flags are sent in the last bucket, so they need no extra collective. Cost: no more
memory than the gradients.

NOTE: torch's DistributedDataParallel changes its buckets after the first step. The position of an element in a bucket
decides the order in which gloo adds the workers' numbers, so with four or more workers a resumed run would differ in
its last bits. It also cannot abandon a step after a worker runs out of memory in a backward pass; here that worker
sends what it has, with a flag that tells all workers not to use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.model.learner import Learner
from pipeline.training.collectives import world_size

BUCKET_BYTES = 25 << 20  # as torch's DistributedDataParallel
MAX_FLAGS = 8


class Strategy(Protocol):
    """Reduces gradients over workers, between the backward passes and the optimizer."""

    is_sharded: bool
    """Whether each worker holds a shard of every weight. All must then run the same number of passes."""

    def attach(self, learner: Learner) -> None:
        """Manage the gradients of the parameters that require one. Call it again when that set changes."""

    def start(self) -> None:
        """Begin a step with zero gradients."""

    def gradient_sync(self) -> AbstractContextManager[None]:
        """A context for the step's last backward pass, in which gradients are sent."""

    def finish(self, flags: Sequence[bool | Tensor]) -> list[float]:
        """Average the gradients over workers. Returns the sums of `flags` over workers."""

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm`. Returns their norm before, the same on all workers."""


class DataParallel:
    """Each worker holds a copy of the model. Gradients are averaged, in the type `compression` if given."""

    is_sharded = False

    def __init__(self, compression: torch.dtype | None = None, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.compression, self.bucket_bytes = compression, bucket_bytes
        self.parameters: list[nn.Parameter] = []
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.is_syncing, self.sent = False, 0

    def attach(self, learner: Learner) -> None:
        for hook in self.hooks:
            hook.remove()
        for parameter in self.parameters:
            parameter.grad = None
        self.parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        # Gradients come from the last layer to the first.
        groups = list(_filled(reversed(self.parameters), self.bucket_bytes))
        self.buckets = [_Bucket(group, self.compression, last=group is groups[-1]) for group in groups]
        self.bucket_of: dict[Tensor, _Bucket] = {each: bucket for bucket in self.buckets for each in bucket.views}
        self.hooks = [each.register_post_accumulate_grad_hook(self._arrived) for each in self.parameters]

    def start(self) -> None:
        for bucket in self.buckets:
            bucket.reset()
        self.is_syncing, self.sent = False, 0

    @contextmanager
    def gradient_sync(self) -> Iterator[None]:
        self.is_syncing = True
        yield
        self.is_syncing = False

    def finish(self, flags: Sequence[bool | Tensor]) -> list[float]:
        self.is_syncing = False
        last = self.buckets[-1]
        for i, flag in enumerate(flags):
            last.flags[i] = flag
        while self.sent < len(self.buckets):
            self._send_next()
        for bucket in self.buckets:
            bucket.receive()
        return (last.flags[: len(flags)] * world_size()).tolist()  # type: ignore[no-any-return]

    def clip(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def _arrived(self, parameter: Tensor) -> None:
        if not self.is_syncing:
            return
        self.bucket_of[parameter].waiting -= 1
        # All workers send buckets in the same order, whatever the order of gradients. The last one waits for the flags.
        while self.sent < len(self.buckets) - 1 and self.buckets[self.sent].waiting == 0:
            self._send_next()

    def _send_next(self) -> None:
        self.buckets[self.sent].send()
        self.sent += 1


class _Bucket:
    """Gradients in one flat tensor; the last bucket ends with the flags."""

    def __init__(self, parameters: Sequence[nn.Parameter], compression: torch.dtype | None, last: bool) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        first = parameters[0]
        self.flat = torch.zeros(sum(sizes) + MAX_FLAGS * last, dtype=first.dtype, device=first.device)
        *gradients, self.flags = self.flat.split([*sizes, MAX_FLAGS * last])
        self.views = {parameter: view.view_as(parameter) for parameter, view in zip(parameters, gradients, strict=True)}
        self.compression = compression
        self.waiting = 0
        self.message: Tensor | None = None
        self.work: dist.Work | None = None

    def reset(self) -> None:
        self.flat.zero_()
        self.waiting = len(self.views)
        for parameter, view in self.views.items():
            parameter.grad = view

    def send(self) -> None:
        if world_size() == 1:
            return
        self.flat /= world_size()
        self.message = self.flat if self.compression is None else self.flat.to(self.compression)
        self.work = dist.all_reduce(self.message, async_op=True)

    def receive(self) -> None:
        if self.work is None or self.message is None:
            return
        self.work.wait()
        if self.message is not self.flat:
            self.flat.copy_(self.message)
        self.work = self.message = None


def _filled(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Group the parameters into buckets of one type and device, of at most `bucket_bytes` unless one is larger."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        same_kind = bucket and (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not same_kind or size + parameter.nbytes > bucket_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def build_strategy(config: Config, learner: Learner, device: torch.device) -> Strategy:
    """The strategy of the config; ddp if torch.distributed is not initialised.

    fsdp replaces the learner's parameters, so build the optimizer afterwards.
    """
    settings = config.training
    if settings.strategy == "fsdp" and dist.is_initialized():
        from pipeline.training.fsdp import FullySharded

        return FullySharded(learner, device)
    compression = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.gradient_compression]
    if compression == torch.bfloat16 and world_size() > 1 and dist.get_backend() == "gloo":
        raise ConfigError(
            "training.gradient_compression: found 'bf16', which gloo, the backend of workers without GPUs, cannot add; "
            "allowed are 'none' and 'fp16'"
        )
    return DataParallel(compression)
