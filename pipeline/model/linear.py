"""Linear layers that compute matrix products with oneDNN on a CPU, forward and backward.

    use_onednn(model)                     # in place, if it is faster on this CPU; parameters keep their names

torch uses MKL for float32 products, and MKL uses only AVX2 on processors that are not Intel's. oneDNN uses AVX-512: 200
instead of 95 GFLOP/s for 5,137 tokens x 384 x 1,536 on one core of an EPYC (Zen 5), which nearly halves the time of a
fine-tuning step. On Intel's processors MKL is faster by a quarter. Both compute in float32 and are deterministic; their
results differ only in the order of summation.
"""

# Shapes: T rows, I inputs, O outputs.
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PRODUCTS = 1 << 23  # ours, measured: a call costs 50 us more, which pays off from 8 million multiplications


def use_onednn(module: nn.Module) -> None:
    """Replace each `nn.Linear` in the module by a `Linear` if oneDNN can use AVX-512 and MKL does not."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not is_intel():
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Linear(child))


def is_intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether Linux reports an Intel processor."""
    return cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()


class Linear(nn.Linear):
    """An `nn.Linear` that reuses another's parameters, and uses oneDNN for float32 on a CPU.

    Small products, other types and autocast use torch's default.
    """

    def __init__(self, replaced: nn.Linear) -> None:
        nn.Module.__init__(self)  # skips creating random parameters
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.weight = replaced.weight
        self.register_parameter("bias", replaced.bias)
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() * self.out_features >= MIN_PRODUCTS
            and not torch.is_autocast_enabled("cpu")
        ):
            return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def, override]
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()  # oneDNN is slow for expanded gradients, such as a sum's
        x_TI, gradient_TO = x.flatten(0, -2), gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t(), None) if of_x else None,
            _weight_gradient(gradient_TO, x_TI) if of_weight else None,
            gradient_TO.sum(dim=0) if of_bias else None,
        )


def _weight_gradient(gradient_TO: Tensor, x_TI: Tensor) -> Tensor:
    """(O, I). oneDNN copies the first factor to make it contiguous, so the smaller one goes first."""
    if gradient_TO.shape[1] <= x_TI.shape[1]:
        return _product(gradient_TO.t(), x_TI.t(), None)
    return _product(x_TI.t(), gradient_TO.t(), None).t()


# NOTE: a custom operator, because torch.compile expects oneDNN's own operator to have constant weights.
@torch.library.custom_op("pipeline::product", mutates_args=())
def _product(a_TI: Tensor, b_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """(T, O): a @ b.T + bias. torch has no public name for oneDNN's product of plain tensors."""
    return torch.ops.mkldnn._linear_pointwise(a_TI, b_OI, bias_O, "none", [], "")  # type: ignore[no-any-return]


@_product.register_fake
def _(a_TI: Tensor, b_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return a_TI.new_empty(*a_TI.shape[:-1], len(b_OI))
