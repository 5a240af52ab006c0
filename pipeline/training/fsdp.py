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

    Scalars, such as a learned temperature, cannot be sharded: every worker has a copy, and their gradients are reduced
    together with the flags. torch.distributed must be initialised.
    """

    is_sharded = True

    def __init__(self, learner: Learner, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (world_size(),))
        self.device = device
        self.scalars = [parameter for parameter in learner.parameters() if not parameter.ndim]
        self.sharded: list[nn.Parameter] = []
        for stack in learner.stacks:
            for layer in stack.layers:
                fully_shard(layer, mesh=mesh)
        self.learner: FSDPModule = fully_shard(learner, mesh=mesh, ignored_params=set(self.scalars))
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
        self.sharded = [parameter for parameter in learner.parameters() if parameter.ndim and parameter.requires_grad]

    def start(self) -> None:
        for parameter in (*self.sharded, *self.scalars):
            parameter.grad = None
        self.learner.set_requires_gradient_sync(False)

    @contextmanager
    def gradient_sync(self) -> Iterator[None]:
        self.learner.set_requires_gradient_sync(True)
        yield

    def finish(self, flags: Sequence[bool | Tensor]) -> list[float]:
        """Reduce the flags and the scalars' gradients in one small collective."""
        gradients = [0.0 if scalar.grad is None else scalar.grad for scalar in self.scalars]
        values = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in (*flags, *gradients)]
        sums = all_reduce_sum(torch.stack(values))
        for scalar, summed in zip(self.scalars, sums[len(flags) :], strict=True):
            scalar.grad = (summed / world_size()).to(scalar.dtype)
        return sums[: len(flags)].tolist()  # type: ignore[no-any-return]

    def clip(self, max_norm: float) -> Tensor:
        parts = [parameter.grad.to_local() for parameter in self.sharded if isinstance(parameter.grad, DTensor)]
        square = all_reduce_sum(nn.utils.get_total_norm(parts).square())
        norm = torch.stack([square, *(scalar.grad.square() for scalar in self.scalars if scalar.grad is not None)])
        norm = norm.sum().sqrt()
        for parameters in (self.sharded, self.scalars):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
