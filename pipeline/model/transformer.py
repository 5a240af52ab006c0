"""The unified transformer's encoder: rotary positions, RMSNorm, scaled dot-product attention, gated GELU feed-forward.

The architecture is the one transformers ships as EuroBERT (`hidden_act: gelu`), so that its weights can be written in
those names. Residual branches begin at zero: a fresh encoder of any depth is exactly its token table, mean-pooled,
which is what lets training warm the table up alone, at many times the speed, before the layers join in
(`Encoder.active_layers`).

    encoder = Encoder(EncoderShape(vocab_size=16000, d_model=256, num_layers=1, num_heads=4, d_ff=768))
    batch = pack([[5, 6, 7], [8]])
    states = encoder.hidden(batch, Layout.of(batch))            # (4, 256)

Cost: 2 x parameters x tokens multiply-adds in the layers; attention pads inside itself alone (see `packing`).
"""

# Shapes: T packed tokens, N sequences, L longest sequence, D model width, H heads, K head width, F feed-forward width.
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.attention import attend
from pipeline.model.packing import Layout, Packed

INIT_STD = 0.02  # BERT, section A.2, and every encoder since


@dataclass(frozen=True)
class EncoderShape:
    """The numbers that fix an encoder's parameters."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1.0

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads or (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f"model.d_model={self.d_model} over model.num_heads={self.num_heads} must be a whole, even head width"
            )


class RMSNorm(nn.Module):
    """Scale each row by its root mean square. With `eps` far above a row's mean square the row's length survives.

    NOTE: token tables learn a token's weight as its length, as inverse document frequency does in BM25; an
    ordinary `eps` erases it before the mean is taken. `norm_eps` of 1 keeps it; see benchmarks/README.md.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary(position: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, K) of each token's rotation angles, halves repeated as in Llama."""
    exponent = torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width
    angle = position.float()[:, None] * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x_THK.chunk(2, dim=-1)
    return (x_THK * cos + torch.cat([-high, low], dim=-1) * sin).to(x_THK.dtype)


class Attention(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.num_heads, self.dropout = shape.num_heads, shape.dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.d_model, shape.d_model, bias=False) for _ in range(4)
        )

    def forward(self, x_TD: Tensor, layout: Layout, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (len(x_TD), self.num_heads, -1)
        q = rotate(self.q_proj(x_TD).view(heads), cos, sin)
        k = rotate(self.k_proj(x_TD).view(heads), cos, sin)
        v = self.v_proj(x_TD).view(heads)
        mixed = attend(q, k, v, layout, layout, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(mixed.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Layer(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.dropout = nn.Dropout(shape.dropout)
        self.apply(_initialise)
        nn.init.zeros_(self.self_attn.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)

    def forward(self, x_TD: Tensor, layout: Layout, cos: Tensor, sin: Tensor) -> Tensor:
        x_TD = x_TD + self.dropout(self.self_attn(self.input_layernorm(x_TD), layout, cos, sin))
        return x_TD + self.dropout(self.mlp(self.post_attention_layernorm(x_TD)))


class Encoder(nn.Module):
    """Packed token ids in, a state for each out.

    `active_layers` is how many layers run: training's warm-up sets it to 0 while the residual branches are still
    zero, where skipping them changes nothing.
    """

    architecture = "unified"

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.active_layers = shape.num_layers
        _initialise(self.embed_tokens)

    @property
    def width(self) -> int:
        return self.shape.d_model

    @property
    def token_table(self) -> nn.Embedding:
        return self.embed_tokens

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    def hidden(self, batch: Packed, layout: Layout) -> Tensor:
        """The last layer's normalised states, (T, D)."""
        x_TD = self.embed_tokens(batch.ids)
        if self.active_layers:
            cos, sin = rotary(layout.position, self.shape.d_model // self.shape.num_heads, self.shape.rope_theta)
            for layer in self.layers[: self.active_layers]:
                x_TD = layer(x_TD, layout, cos, sin)
        return self.norm(x_TD)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
