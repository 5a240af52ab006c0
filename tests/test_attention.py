"""Attention over packed sequences against softmax(q k) v written out, a sequence at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model import attention
from pipeline.model.attention import AttentionOptions, attend
from pipeline.model.packing import Layout, pack

SELF = [5, 1, 2, 0, 9, 5, 1, 13, 2, 2]
CROSS = [3, 1, 0, 2, 9, 3, 7, 1, 2, 2]

CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "window": {"window": 2},
    "causal window": {"causal": True, "window": 3},
    "wide window": {"window": 100},
    "causal wide window": {"causal": True, "window": 100},
    "scale": {"scale": 0.7},
    "shared heads": {"key_heads": 2},
    "other keys": {"keys": CROSS},
    "other keys, causal, shared heads": {"keys": CROSS, "causal": True, "key_heads": 1},
    "other keys, window": {"keys": CROSS, "window": 1},
    "single keys": {"keys": [1] * len(SELF)},
    "no keys": {"keys": [0] * len(SELF)},
    "nothing": {"queries": [0, 0], "keys": [0, 0]},
    "no sequences": {"queries": [], "keys": []},
}


@pytest.fixture(params=["_grouped", "_padded"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of the CPU, and that of a GPU where flash attention does not take over."""
    monkeypatch.setattr(attention, "_grouped", getattr(attention, request.param))
    return str(request.param)


def layout_of(lengths: list[int]) -> Layout:
    return Layout.of(pack([[0] * n for n in lengths]))


def written_out(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: list[int],
    keys: list[int],
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    rows = []
    for q_n, k_n, v_n in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        for i in range(len(q_n)):
            seen = [j for j in range(len(k_n)) if not (causal and j > i) and (window is None or abs(i - j) <= window)]
            scores = torch.einsum("hk,jhk->hj", q_n[i], k_n[seen]) * (q.shape[-1] ** -0.5 if scale is None else scale)
            rows.append(torch.einsum("hj,jhk->hk", scores.softmax(-1), v_n[seen]))
    return torch.stack(rows) if rows else torch.zeros_like(q)


def states(queries: int, keys: int, heads: int = 4, key_heads: int = 4, width: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((queries, heads, width), (keys, key_heads, width), (keys, key_heads, width))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case: dict[str, Any], path: str) -> None:
    options = dict(case)
    queries = options.pop("queries", SELF)
    keys = options.pop("keys", None)
    q_layout = layout_of(queries)
    k_layout = q_layout if keys is None else layout_of(keys)
    keys = queries if keys is None else keys
    qkv = states(sum(queries), sum(keys), key_heads=options.pop("key_heads", 4))
    ours, oracle = (
        attend(*qkv, q_layout, k_layout, AttentionOptions(**options)),
        written_out(*qkv, queries, keys, **options),
    )
    torch.testing.assert_close(ours, oracle)
    weights = torch.randn_like(ours)
    for found, expected in zip(gradients(ours, weights, qkv), gradients(oracle, weights, qkv), strict=True):
        torch.testing.assert_close(found, expected)


def gradients(mixed: Tensor, weights: Tensor, qkv: list[Tensor]) -> tuple[Tensor, ...]:
    """Zeros where no query sees a key."""
    untouched = sum(x.sum() for x in qkv) * 0
    return torch.autograd.grad((mixed * weights).sum() + untouched, qkv)


def test_float32_of_random_lengths(path: str) -> None:
    chance = random.Random(0)
    lengths = [chance.randrange(1, 60) for _ in range(40)]
    qkv = [x.detach().float() for x in states(sum(lengths), sum(lengths))]
    layout = layout_of(lengths)
    torch.testing.assert_close(attend(*qkv, layout, layout), written_out(*qkv, lengths, lengths), atol=1e-5, rtol=1e-5)


def test_the_order_of_sequences_changes_nothing_but_the_order() -> None:
    layout = layout_of(SELF)
    qkv = [x.detach() for x in states(sum(SELF), sum(SELF))]
    found = layout.by_length
    assert found is not None
    rows, ordered = found
    torch.testing.assert_close(
        attend(*(x[rows] for x in qkv), ordered, ordered), attend(*qkv, layout, layout)[rows], atol=0, rtol=0
    )


def test_the_same_bits_each_time() -> None:
    layout = layout_of(SELF)

    def run() -> list[Tensor]:
        qkv = [x.detach().float().requires_grad_() for x in states(sum(SELF), sum(SELF))]
        out = attend(*qkv, layout, layout)
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_dropout_drops_weights_and_keeps_their_mean(path: str) -> None:
    """Each query of equal scores and values of one gets the sum of what is kept of its weights, rescaled."""
    layout = layout_of([4] * 500)
    q, v = torch.zeros(2000, 2, 8), torch.ones(2000, 2, 8)
    torch.manual_seed(0)
    mixed = attend(q, q, v, layout, layout, AttentionOptions(dropout=0.5))
    kept = mixed[..., 0] * 4 * 0.5  # of four weights of a quarter, doubled where kept
    assert set(kept.unique().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert mixed.mean().item() == pytest.approx(1.0, abs=0.05)
    torch.manual_seed(0)
    torch.testing.assert_close(attend(q, q, v, layout, layout, AttentionOptions(dropout=0.5)), mixed, atol=0, rtol=0)


def test_queries_and_keys_follow_the_values_type() -> None:
    """Rotary positions under autocast: float32 angles make float32 queries and keys of 16-bit projections."""
    layout = layout_of(SELF)
    q, k, v = (x.detach().float() for x in states(sum(SELF), sum(SELF)))
    mixed = attend(q, k, v.bfloat16(), layout, layout)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), attend(q, k, v, layout, layout), atol=0.05, rtol=0.05)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for torch's flash attention of packed sequences on a GPU; gives the calls it got."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        calls.append({"max_q": max_q, "max_k": max_k, "types": (cu_q.dtype, cu_k.dtype), **options})
        before, after = options["window_size"]
        window = None if before < 0 else before
        assert after in (0, before)  # causal, or as far ahead as back
        plain = (x.as_subclass(torch.Tensor) for x in (q, k, v))
        lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
        causal = after == 0 and before != 0
        return written_out(*plain, *lengths, causal=causal, window=window, scale=options["scale"])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return calls


FLASH_CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "self": ({}, (-1, -1)),
    "scale": ({"scale": 0.5}, (-1, -1)),
    "causal": ({"causal": True}, (-1, 0)),
    "window": ({"window": 2}, (2, 2)),
    "causal window": ({"causal": True, "window": 3}, (3, 0)),
}


@pytest.mark.parametrize(("options", "window_size"), FLASH_CASES.values(), ids=FLASH_CASES)
def test_flash_attention_gets_packed_sequences(
    options: dict[str, Any], window_size: tuple[int, int], flash: list[dict[str, Any]]
) -> None:
    layout = layout_of(SELF)
    qkv = [x.detach().bfloat16() for x in states(sum(SELF), sum(SELF), key_heads=2)]
    mixed = attend(*(x.as_subclass(Elsewhere) for x in qkv), layout, layout, AttentionOptions(**options))
    torch.testing.assert_close(mixed.as_subclass(torch.Tensor), written_out(*qkv, SELF, SELF, **options))
    assert flash == [
        {
            "max_q": 13,
            "max_k": 13,
            "types": (torch.int32, torch.int32),
            "scale": options.get("scale"),
            "window_size": window_size,
            "enable_gqa": True,
        }
    ]


def test_flash_attention_takes_other_keys_of_any_length(flash: list[dict[str, Any]]) -> None:
    qkv = [x.detach().half().as_subclass(Elsewhere) for x in states(sum(SELF), sum(CROSS))]
    attend(*qkv, layout_of(SELF), layout_of(CROSS))
    assert [(call["max_q"], call["max_k"]) for call in flash] == [(13, 9)]


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"dtype": torch.float32}, {}),
        ({"width": 12}, {}),
        ({"width": 264}, {}),
        ({}, {"dropout": 0.1}),
        ({"keys": CROSS}, {"causal": True}),
        ({"keys": CROSS}, {"window": 2}),
        ({"capability": (7, 5)}, {}),
    ],
)
def test_what_flash_attention_does_not_take_is_padded(
    change: dict[str, Any], options: dict[str, Any], flash: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = change.get("capability", (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    padded: list[int] = []
    monkeypatch.setattr(attention, "_padded", lambda q, *rest: padded.append(len(q)))
    keys = change.get("keys")
    qkv = states(sum(SELF), sum(keys or SELF), width=change.get("width", 8))
    q, k, v = (x.detach().to(change.get("dtype", torch.float16)).as_subclass(Elsewhere) for x in qkv)
    layout = layout_of(SELF)
    attend(q, k, v, layout, layout_of(keys) if keys else layout, AttentionOptions(**options))
    assert not flash
    assert padded == [sum(SELF)]
