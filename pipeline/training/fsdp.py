"""fsdp: each worker holds a shard of every weight, gradient and optimizer state (torch's fully_shard).

    strategy = FullySharded(learner, device)     # from here on, each parameter holds this worker's shard
    optimizer = build_optimizer(learner, ...)    # must come second

A layer's weights are gathered before its forward and backward pass and freed afterwards. Weights outside the layers,
mainly the token table, stay gathered from the forward pass to the end of the backward pass. All workers must run the
same passes in the same order, because each pass waits for all of them.

Cost over ddp: for `n` bytes of weights, a worker receives n more in each forward and each backward pass. Gradients are
reduced once per step: with one micro-batch layer by layer; with several, each worker holds unsharded gradients until
the last one. Under autocast, the 16-bit copies of the weights live as long as the graph, unless you checkpoint layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pipeline.model.learner import Learner
from pipeline.training.collectives import all_reduce_sum, world_size


class FullySharded:
    """A `Strategy` that shards the learner's parameters along their first dimension.

    Every worker has a copy of the few parameters that only the losses use, such as a learned temperature. Their
    gradients are reduced together with the flags. torch.distributed must be initialised.
    """

    is_sharded = True

    def __init__(self, learner: Learner, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (world_size(),))
        self.device = device
        self.replicated = learner.replicated
        self.sharded: list[nn.Parameter] = []
        for stack in learner.stacks:
            for layer in stack.layers:
                fully_shard(layer, mesh=mesh)
        self.learner: FSDPModule = fully_shard(learner, mesh=mesh, ignored_params=set(self.replicated))
        # A worker with an empty micro-batch has no gradient for some weights and must send zeros.
        self.learner.set_reduce_scatter_unused_params(True)
        for name in learner.entries:
            register_fsdp_forward_method(learner, name)

    def attach(self, learner: Learner) -> None:
        # NOTE: fully_shard checks which weights require a gradient when a module is gathered for the first time. Gather
        # all here, so that it includes the layers that start to train after the token table's warm-up.
        for module in learner.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()
        copies = set(self.replicated)
        self.sharded = [each for each in learner.parameters() if each not in copies and each.requires_grad]

    def start(self) -> None:
        for parameter in (*self.sharded, *self.replicated):
            parameter.grad = None
        self.learner.set_requires_gradient_sync(False)

    @contextmanager
    def gradient_sync(self) -> Iterator[None]:
        self.learner.set_requires_gradient_sync(True)
        yield

    def finish(self, flags: Sequence[bool | Tensor]) -> list[float]:
        """Reduce the flags and the gradients of the copies in one collective."""
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.replicated]
        values = [torch.as_tensor(flag, dtype=torch.float64, device=self.device).reshape(1) for flag in flags]
        sums = all_reduce_sum(torch.cat([*values, *(each.double().flatten() for each in gradients)]))
        of_flags, *of_copies = sums.split([len(flags), *(each.numel() for each in gradients)])
        for parameter, summed in zip(self.replicated, of_copies, strict=True):
            parameter.grad = (summed / world_size()).view_as(parameter).to(parameter.dtype)
        return of_flags.tolist()  # type: ignore[no-any-return]

    def clip(self, max_norm: float) -> Tensor:
        parts = [parameter.grad.to_local() for parameter in self.sharded if isinstance(parameter.grad, DTensor)]
        square = all_reduce_sum(nn.utils.get_total_norm(parts).square())
        of_copies = [each.grad.square().sum() for each in self.replicated if each.grad is not None]
        norm = torch.stack([square, *of_copies]).sum().sqrt()
        for parameters in (self.sharded, self.replicated):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
