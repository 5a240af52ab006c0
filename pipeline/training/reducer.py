"""Gradients averaged over workers while the backward pass runs, in buckets whose layout never changes.

    reducer = Reducer(learner.parameters())
    reducer.start()                              # gradients are zero
    first_half.backward()                        # they add up, here alone
    with reducer.sending():
        second_half.backward()                   # a bucket is sent once its last gradient is there
    flags = reducer.finish([0.0, 1.0])           # gradients are the workers' means; flags are their sums

A gradient is a view into its bucket, so nothing is copied, and flags ride in the last bucket at no further collective.
Cost: the parameters' bytes for the buckets, which the gradients would take anyhow.

NOTE: torch's DistributedDataParallel lays its buckets out anew after the first step. Where an element stands in a
bucket decides in which order gloo adds the workers' numbers, so that from four workers on a resumed run would differ in
its last bits. It also cannot take a step back once a worker has run out of memory in a backward pass: here that worker
sends what it has, and a flag by which all know that the step does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.objectives.collectives import world_size

BUCKET_BYTES = 25 << 20  # as torch's DistributedDataParallel
MAX_FLAGS = 8


class Reducer:
    """Takes over the gradients of all `parameters` that want one. `compression` is the type they are sent in."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        compression: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # Gradients come from the last layer to the first.
        groups = list(_filled(reversed(trained), bucket_bytes))
        self.buckets = [_Bucket(group, compression, last=group is groups[-1]) for group in groups]
        self.bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.views}
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in trained]
        self.is_sending = False
        self.sent = 0

    def start(self) -> None:
        """Begin a step: all gradients are zero."""
        for bucket in self.buckets:
            bucket.reset()
        self.is_sending, self.sent = False, 0

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Within it, each gradient is added to for the last time."""
        self.is_sending = True
        yield
        self.is_sending = False

    def finish(self, flags: Sequence[float | Tensor]) -> Tensor:
        """Average what is left to average. Returns the workers' `flags` added up, (len(flags),), on the device."""
        self.is_sending = False
        last = self.buckets[-1]
        for slot, flag in zip(last.flags, flags, strict=False):
            slot.copy_(torch.as_tensor(flag))
        while self.sent < len(self.buckets):
            self._send_next()
        for bucket in self.buckets:
            bucket.receive()
        return last.flags[: len(flags)] * world_size()

    def remove(self) -> None:
        """Leave the parameters without hooks and gradients, for another reducer to take over."""
        for hook in self.hooks:
            hook.remove()
        for parameter in self.bucket_of:
            parameter.grad = None

    def _arrived(self, parameter: Tensor) -> None:
        if not self.is_sending:
            return
        self.bucket_of[parameter].waiting -= 1  # type: ignore[index]
        # All workers send in one order, whatever order gradients come in. The last bucket waits for the flags.
        while self.sent < len(self.buckets) - 1 and self.buckets[self.sent].waiting == 0:
            self._send_next()

    def _send_next(self) -> None:
        self.buckets[self.sent].send()
        self.sent += 1


class _Bucket:
    """Gradients end to end; behind those of the last bucket stand the flags."""

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
    """The parameters in buckets of one type and device, each as full as it gets."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_here = parameter.numel() * parameter.element_size()
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or size + bytes_here > bucket_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_here
    if bucket:
        yield bucket
