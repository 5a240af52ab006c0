"""Scaled dot-product attention between packed sequences: the only place where padding is computed.

mixed = attend(q, k, v, layout, layout, causal=True)         # (T, H, K), for T packed tokens
"""

# Shapes: T packed queries, S packed keys, H heads, J key-value heads (H is a multiple of J), K head width, N sequences.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.packing import Layout


def attend(
    q_THK: Tensor,
    k_SJK: Tensor,
    v_SJK: Tensor,
    queries: Layout,
    keys: Layout,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """What each query takes from the keys of its own sequence, (T, H, K).

    `queries` and `keys` are layouts of equally many sequences, one and the same for self-attention. `causal`: only keys
    at the query's position or before. `window`: only keys at most so many positions away. A sequence without keys gives
    zeros.
    """
    q_NHLK, k_NJLK, v_NJLK = (
        layout.pad(x).transpose(1, 2) for layout, x in ((queries, q_THK), (keys, k_SJK), (keys, v_SJK))
    )
    allowed = keys.mask[:, None, None, :]
    if causal or window is not None:
        ahead = torch.arange(keys.mask.shape[1], device=q_THK.device) - torch.arange(
            queries.mask.shape[1], device=q_THK.device
        ).unsqueeze(1)
        if causal:
            allowed = allowed & (ahead <= 0)
        if window is not None:
            allowed = allowed & (ahead.abs() <= window)
    mixed = F.scaled_dot_product_attention(
        q_NHLK,
        k_NJLK,
        v_NJLK,
        attn_mask=allowed,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_SJK.shape[1],
    )
    return queries.unpad(mixed.transpose(1, 2))
