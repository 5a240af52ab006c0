"""torch.compile, a layer at a time.

    compile_layers(model.backbone)                # in place: the next batch compiles, in a minute or so

A layer is compiled for batches of any size, once for training and once for evaluation, and all layers of a kind share
the code: a batch of another size compiles nothing. Attention stays as it is, and what is round it is fused. Names of
parameters, and so checkpoints, do not change.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from pipeline.model.attention import keep_from_compiler


class Layered(Protocol):
    """An Encoder, a PretrainedEncoder, a Decoder."""

    @property
    def layers(self) -> nn.ModuleList: ...


def compile_layers(stack: Layered, backend: str = "inductor") -> None:
    """Compile each layer. `backend` is torch.compile's; "inductor" needs a C++ compiler on a CPU, Triton on a GPU."""
    keep_from_compiler()
    for layer in stack.layers:
        layer.compile(dynamic=True, backend=backend)
