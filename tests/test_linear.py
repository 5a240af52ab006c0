"""oneDNN's linear layers against torch's own."""

from __future__ import annotations

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
    theirs, ours = nn.Linear(inputs, outputs, bias), Linear(inputs, outputs, bias)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.shape[-1]).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (16, 16), (8, 1)])
@pytest.mark.parametrize("rows", [(50,), (1, 50), (2, 5, 3), (1,)])
def test_outputs_and_gradients(
    rows: tuple[int, ...], inputs: int, outputs: int, bias: bool, products: list[tuple[int, ...]]
) -> None:
    theirs, ours = both(inputs, outputs, bias)
    x = torch.randn(*rows, inputs)
    for found, expected in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(products) == 3


def test_factors_of_any_strides() -> None:
    theirs, ours = both(24, 40)
    x = torch.randn(24, 50).t()
    for found, expected in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(layer(x).sum(), list(layer.parameters())) for layer in (ours, theirs)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_only_the_gradients_that_are_wanted_are_computed(products: list[tuple[int, ...]]) -> None:
    _, ours = both(24, 40)
    ours.weight.requires_grad_(False)
    ours(torch.randn(7, 24)).sum().backward()
    assert ours.bias.grad is not None
    assert products == [(7, 24, 40)]


def test_the_same_bits_each_time() -> None:
    _, ours = both(64, 96)
    x = torch.randn(333, 64)
    for first, second in zip(run(ours, x), run(ours, x), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_torchs_way(dtype: torch.dtype, products: list[tuple[int, ...]]) -> None:
    theirs, ours = (layer.to(dtype) for layer in both(24, 40))
    x = torch.randn(7, 24, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))
    assert not products


def test_autocast_goes_torchs_way(products: list[tuple[int, ...]]) -> None:
    theirs, ours = both(24, 40)
    x = torch.randn(7, 24)
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
        for found, expected in zip(run(compiled, x), run(ours, x), strict=True):
            torch.testing.assert_close(found, expected)


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
    names = list(model.state_dict())
    use_onednn(model)
    assert [type(m) is Linear for m in model.modules() if isinstance(m, nn.Linear)] == [used] * 2
    assert list(model.state_dict()) == names
