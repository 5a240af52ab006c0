"""oneDNN's linear layers against torch's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.model import linear
from pipeline.model.linear import Linear, use_onednn

if not torch.backends.mkldnn.is_available():
    pytest.skip("torch without oneDNN", allow_module_level=True)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """However small, products are oneDNN's; gives the shapes of those so far."""
    calls: list[tuple[int, ...]] = []
    product = linear._product

    def counting(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        calls.append((*a.shape, len(b)))
        return product(a, b, bias)

    monkeypatch.setattr(linear, "MIN_PRODUCTS", 1)
    monkeypatch.setattr(linear, "_product", counting)
    return calls


def both(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Linear, Linear]:
    torch.manual_seed(0)
    theirs = nn.Linear(inputs, outputs, bias)
    return theirs, Linear(copy.deepcopy(theirs))


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.shape[-1]).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | None = 1e-5) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (16, 16), (8, 1)])
def test_outputs_and_gradients(inputs: int, outputs: int, bias: bool, products: list[tuple[int, ...]]) -> None:
    theirs, ours = both(inputs, outputs, bias)
    for rows in ((50,), (1, 50), (2, 5, 3), (1,)):
        x = torch.randn(*rows, inputs)
        products.clear()
        assert_close(run(ours, x), run(theirs, x))
        assert len(products) == 3


def test_factors_of_any_strides() -> None:
    theirs, ours = both(24, 40)
    x = torch.randn(24, 50).t()
    assert_close(run(ours, x), run(theirs, x))
    assert_close(*(torch.autograd.grad(layer(x).sum(), list(layer.parameters())) for layer in (ours, theirs)))


def test_only_the_gradients_that_are_wanted_are_computed(products: list[tuple[int, ...]]) -> None:
    _, ours = both(24, 40)
    ours.weight.requires_grad_(False)
    ours(torch.randn(7, 24)).sum().backward()
    assert ours.bias.grad is not None
    assert products == [(7, 24, 40)]


def test_the_same_bits_each_time() -> None:
    _, ours = both(64, 96)
    x = torch.randn(333, 64)
    assert all(map(torch.equal, run(ours, x), run(ours, x)))


def test_other_types_and_autocast_go_torchs_way(products: list[tuple[int, ...]]) -> None:
    x = torch.randn(7, 24)
    for dtype in (torch.float64, torch.bfloat16):
        theirs, ours = (layer.to(dtype) for layer in both(24, 40))
        assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))
    theirs, ours = both(24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x)
        torch.testing.assert_close(found, theirs(x), atol=0, rtol=0)
    assert found.dtype == torch.bfloat16
    assert not products


def test_small_products_go_torchs_way(monkeypatch: pytest.MonkeyPatch, products: list[tuple[int, ...]]) -> None:
    theirs, ours = both(24, 40)
    monkeypatch.setattr(linear, "MIN_PRODUCTS", 8 * 24 * 40)
    x = torch.randn(8, 24)
    for rows in (0, 7):
        assert torch.equal(ours(x[:rows]), theirs(x[:rows]))
    assert not products
    ours(x)
    assert products == [(8, 24, 40)]


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(linear, "MIN_PRODUCTS", 1)
    _, ours = both(24, 40)
    compiled = torch.compile(ours, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (50, 7):
        x = torch.randn(rows, 24)
        assert_close(run(compiled, x), run(ours, x), tolerance=None)


@pytest.mark.parametrize(
    ("capability", "vendor", "used"),
    [("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False)],
)
def test_it_is_used_where_it_has_avx512_and_mkl_has_not(
    capability: str, vendor: str, used: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpuinfo, is_intel = tmp_path / "cpuinfo", linear.is_intel
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(linear, "is_intel", lambda: is_intel(cpuinfo))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
    model[1].requires_grad_(False)
    parameters = dict(model.eval().named_parameters())
    random = torch.get_rng_state()
    use_onednn(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [type(m) is Linear for m in model.modules() if isinstance(m, nn.Linear)] == [used] * 2
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert not any(m.training for m in model.modules())
