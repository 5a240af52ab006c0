"""Scaled dot-product attention between packed sequences.

    mixed = attend(q, k, v, layout, layout, AttentionOptions(causal=True))         # (T, H, K), for T packed tokens

On a CPU, attention runs one kernel call per sequence length, without padding. Cost for 128 package descriptions of 60
lengths up to 128 tokens, 12 heads of width 32, forward and backward on one core: 64 ms; padded to multiples of 8, 16 or
32: 66, 98 or 82 ms; padded to the longest sequence: 220 ms. On a GPU, 16-bit types use flash attention without padding;
other types, and dropout, are padded to the longest sequence.
"""

# Shapes: T packed queries, S packed keys, H heads, J key-value heads (H is a multiple of J), K head width, N sequences,
# L queries and M keys of a sequence.
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.packing import Layout, gather_rows, scatter_rows

FLASH_CAPABILITY = (8, 0)  # Ampere: the first GPUs that torch's flash attention runs on
FLASH_HEAD_WIDTH = 256  # the widest head that it supports; widths must also be multiples of 8


@dataclass(frozen=True)
class AttentionOptions:
    """Which keys a query sees, and how their scores become weights."""

    causal: bool = False
    """A query sees only keys at its own position and before."""
    window: int | None = None
    """A query sees only keys at most this many positions away."""
    dropout: float = 0.0
    scale: float | None = None
    """Multiplies the scores. None: 1 / sqrt(K)."""

    def band(self, L: int, M: int, device: torch.device) -> Tensor | None:
        """(L, M) bool: the key positions that each query position sees, or None if it sees all."""
        ahead = torch.arange(M, device=device) - torch.arange(L, device=device)[:, None]
        if self.window is None or self.window >= max(L, M) - 1:
            return ahead <= 0 if self.causal else None
        near = ahead.abs() <= self.window
        return near & (ahead <= 0) if self.causal else near

    def sdpa(self, q_NHLK: Tensor, k_NJMK: Tensor, v_NJMK: Tensor, **mask: Any) -> Tensor:
        gqa = q_NHLK.shape[1] != k_NJMK.shape[1]
        return F.scaled_dot_product_attention(
            q_NHLK, k_NJMK, v_NJMK, dropout_p=self.dropout, scale=self.scale, enable_gqa=gqa, **mask
        )


DEFAULTS = AttentionOptions()


def attend(
    q_THK: Tensor, k_SJK: Tensor, v_SJK: Tensor, queries: Layout, keys: Layout, options: AttentionOptions = DEFAULTS
) -> Tensor:
    """Attention of each query to the keys of its own sequence, (T, H, K).

    `queries` and `keys` are layouts of the same number of sequences; pass the same object for self-attention. A query
    that sees no key gets zeros.
    """
    return _attend(q_THK, k_SJK, v_SJK, queries, keys, options)


def _attend(
    q_THK: Tensor, k_SJK: Tensor, v_SJK: Tensor, queries: Layout, keys: Layout, options: AttentionOptions
) -> Tensor:
    # Rotary positions leave queries and keys in float32 under autocast.
    q_THK, k_SJK = q_THK.to(v_SJK.dtype), k_SJK.to(v_SJK.dtype)
    if not q_THK.is_cuda:
        path = _grouped
    elif _flash_supports(q_THK, queries, keys, options):
        path = _flash
    else:
        path = _padded
    return path(q_THK, k_SJK, v_SJK, queries, keys, options)


@cache
def keep_from_compiler() -> None:
    """Exclude `attend` from torch.compile. Call it only before compiling, because it makes torch load its compiler."""
    global _attend
    _attend = torch.compiler.disable(_attend)


def _grouped(
    q_THK: Tensor, k_SJK: Tensor, v_SJK: Tensor, queries: Layout, keys: Layout, options: AttentionOptions
) -> Tensor:
    """One kernel call per pair of query and key lengths."""
    groups = queries.groups(keys)
    if groups.query_rows is not None:
        q_THK = gather_rows(q_THK, groups.query_rows)
    if groups.key_rows is not None:
        k_SJK, v_SJK = gather_rows(k_SJK, groups.key_rows), gather_rows(v_SJK, groups.key_rows)
    q_sizes, k_sizes = [n * L for n, L, _ in groups.shapes], [n * M for n, _, M in groups.shapes]
    # NOTE: the gradient of `split` copies each part once; slices would each add up a gradient of T rows.
    parts = zip(groups.shapes, q_THK.split(q_sizes), k_SJK.split(k_sizes), v_SJK.split(k_sizes), strict=True)
    mixed = [_one_length((q, k, v), shape, options) for shape, q, k, v in parts]
    out = torch.cat(mixed) if mixed else torch.zeros_like(q_THK)
    return out if groups.query_rows is None else scatter_rows(out, groups.query_rows, queries.num_tokens)


def _one_length(qkv: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int, int], options: AttentionOptions) -> Tensor:
    """Attention in n sequences of L queries and M keys each, (n * L, H, K). `shape`: (n, L, M)."""
    n, L, M = shape
    if not L or not M:
        return torch.zeros_like(qkv[0])
    q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in qkv)
    if options.causal and options.window is None:
        mixed = options.sdpa(q, k, v, is_causal=True)
    else:
        mixed = options.sdpa(q, k, v, attn_mask=options.band(L, M, q.device))
    return mixed.transpose(1, 2).flatten(0, 1)


def _padded(
    q_THK: Tensor, k_SJK: Tensor, v_SJK: Tensor, queries: Layout, keys: Layout, options: AttentionOptions
) -> Tensor:
    if not keys.longest:
        return torch.zeros_like(q_THK)
    allowed = keys.mask[:, None, None, :]
    band = options.band(queries.longest, keys.longest, q_THK.device)
    allowed = allowed if band is None else allowed & band
    # NOTE: a fused kernel may return NaN for a query that sees no key, so it sees all keys here and is zeroed below.
    sees = allowed.any(dim=-1, keepdim=True)
    q, k, v = (side.pad(x).transpose(1, 2) for side, x in ((queries, q_THK), (keys, k_SJK), (keys, v_SJK)))
    mixed = torch.where(sees, options.sdpa(q, k, v, attn_mask=allowed | ~sees), 0.0)
    return queries.unpad(mixed.transpose(1, 2))


def _flash_supports(q_THK: Tensor, queries: Layout, keys: Layout, options: AttentionOptions) -> bool:
    width, by_position = q_THK.shape[-1], options.causal or options.window is not None
    return (
        q_THK.dtype in (torch.bfloat16, torch.float16)
        and not options.dropout
        and width % 8 == 0
        and width <= FLASH_HEAD_WIDTH
        and (queries is keys or not by_position)  # flash aligns the ends of queries and keys, not their starts
        and torch.cuda.get_device_capability(q_THK.device) >= FLASH_CAPABILITY
    )


def _flash(
    q_THK: Tensor, k_SJK: Tensor, v_SJK: Tensor, queries: Layout, keys: Layout, options: AttentionOptions
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler, which takes 2 s

    reach = -1 if options.window is None else options.window
    return varlen_attn(  # type: ignore[return-value]
        q_THK,
        k_SJK,
        v_SJK,
        queries.offsets.int(),
        keys.offsets.int(),
        queries.longest,
        keys.longest,
        scale=options.scale,
        window_size=(reach, 0 if options.causal else reach),
        enable_gqa=q_THK.shape[1] != k_SJK.shape[1],
    )
