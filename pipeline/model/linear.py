import torch
import torch.nn.functional as F
from torch import Tensor, nn
MIN=1<<20
def available():
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
def _product(a, b, bias=None):
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return _product(x, w, b)
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx = _product(g, w.t()) if ctx.needs_input_grad[0] else None
        gw = _product(g.flatten(0,-2).t(), x.flatten(0,-2).t()) if ctx.needs_input_grad[1] else None
        gb = g.flatten(0,-2).sum(0) if ctx.needs_input_grad[2] else None
        return gx, gw, gb
class Linear(nn.Linear):
    def forward(self, x):
        return _Linear.apply(x, self.weight, self.bias)
def use(module):
    for m in module.modules():
        if type(m) is nn.Linear: m.__class__=Linear
