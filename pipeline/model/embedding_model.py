"""Token ids in, vectors out: a backbone's states, pooled, normalised and cut to a size.

    model = EmbeddingModel(Encoder(shape), Head(pooling="mean"))
    vectors = model(pack([[5, 6, 7], [8]]))                      # (2, D) float32, unit length
    shorten(vectors, 64)                                         # (2, 64), unit length again

A backbone is any module with a `width`, `hidden(batch, layout)`, the states of packed tokens, and a `token_table`: our
`Encoder`, or a `PretrainedEncoder`. The head has no parameters, so a model's weights are its backbone's.
"""

# Shapes: T packed tokens, N sequences, D width.
from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.card import Head, Pooling
from pipeline.model.packing import Layout, Packed


class Backbone(Protocol):
    """What turns packed token ids into states."""

    @property
    def width(self) -> int:
        """D, the numbers in a state."""

    @property
    def token_table(self) -> nn.Embedding: ...

    def hidden(self, batch: Packed, layout: Layout) -> Tensor:
        """(T, D) states of the batch's tokens, in their order."""


class EmbeddingModel(nn.Module):
    """A backbone and the head on it."""

    def __init__(self, backbone: nn.Module, head: Head | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head or Head()

    @property
    def width(self) -> int:
        return int(self.backbone.width)  # type: ignore[arg-type]

    @property
    def token_table(self) -> nn.Embedding:
        return self.backbone.token_table  # type: ignore[return-value]

    def hidden(self, batch: Packed, layout: Layout) -> Tensor:
        return self.backbone.hidden(batch, layout)  # type: ignore[operator, no-any-return]

    def forward(self, batch: Packed) -> Tensor:
        """(N, D) in float32; a sequence without tokens gives the zero vector."""
        layout = Layout.of(batch)
        return self.pooled(self.hidden(batch, layout), layout)

    def pooled(self, states_TD: Tensor, layout: Layout) -> Tensor:
        """(N, D), what the head makes of states."""
        exact = states_TD if states_TD.dtype == torch.float64 else states_TD.float()
        vectors = pool(exact, layout, self.head.pooling)
        return F.normalize(vectors, dim=-1) if self.head.normalize else vectors


def pool(states_TD: Tensor, layout: Layout, pooling: Pooling) -> Tensor:
    """(N, D): one row a sequence, zeros for a sequence without tokens."""
    lengths = layout.lengths
    if pooling in ("cls", "last"):
        end = lengths.cumsum(0)
        rows = (end - lengths if pooling == "cls" else end - 1).clamp(0, max(len(states_TD) - 1, 0))
        # Without a token a sum of none stands in: zeros, with a graph that leads to the layers.
        picked = states_TD[rows] if len(states_TD) else states_TD.sum(dim=0).expand(len(lengths), -1)
        return torch.where(lengths[:, None] > 0, picked, 0.0)
    total = lengths
    if pooling == "weighted":
        states_TD = states_TD * (layout.position + 1)[:, None]
        total = lengths * (lengths + 1) // 2
    summed = states_TD.new_zeros(len(lengths), states_TD.shape[-1]).index_add_(0, layout.sequence, states_TD)
    return summed / total.clamp(min=1)[:, None]


def shorten(vectors: Tensor, dimensions: int) -> Tensor:
    """The first `dimensions` numbers of each vector, at unit length again (Matryoshka, Kusupati et al. 2022)."""
    return F.normalize(vectors[..., :dimensions], dim=-1)
