"""The unified transformer's parts, and its encoder: rotary positions, RMSNorm, grouped-query attention, gated GELU.

The architecture and weight names are those of transformers' EuroBERT (`hidden_act: gelu`). The decoder uses the same
parts (model/decoder.py).

    encoder = Encoder(EncoderShape(vocab_size=16000, d_model=256, num_layers=1, num_heads=4, d_ff=768))
    batch = pack([[5, 6, 7], [8]])
    states = encoder.hidden(batch, Layout.of(batch))            # (4, 256)
    print(f"{parameter_count(encoder):,} parameters")           # 4,948,736 parameters

Weights are drawn from N(0, 0.02), the last matrix of each residual branch from N(0, 0.02 / sqrt(branches)), so that
states do not grow with depth (GPT-2, Radford et al. 2019, section 2.3).

Cost: 2 x parameters x tokens operations in the layers, and attention (model/attention.py).
"""

# Shapes: T packed tokens, D model width, H heads, J key-value heads (H is a multiple of J), K head width,
# S packed tokens that are attended to.
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.attention import AttentionOptions, attend, keep_from_compiler
from pipeline.model.linear import use_onednn
from pipeline.model.packing import Layout, Packed, gather_rows, scatter_rows

INIT_STD = 0.02  # BERT, section A.2, and every encoder since

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (T, 1, K) each."""


@dataclass(frozen=True)
class StackShape:
    """The shape of a token table and the layers on top of it."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_kv_heads: int | None = None
    """Key-value heads; each serves num_heads / num_kv_heads query heads (Ainslie et al. 2023). None: `num_heads`."""
    dropout: float = 0.0
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotate queries and keys (Su et al. 2021), or add rows of a learned table to the token embeddings."""
    max_positions: int | None = None
    """The longest sequence in tokens, which is also the size of a learned position table. None: no limit."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_layers and (self.d_model % self.num_heads or (self.d_model // self.num_heads) % 2):
            raise ValueError(f"model.d_model={self.d_model} / model.num_heads={self.num_heads} must be an even integer")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}")
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("model.positions=learned needs model.max_positions, the longest sequence in tokens")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads

    def position_table(self) -> nn.Embedding | None:
        if self.positions == "rotary" or self.max_positions is None:
            return None
        return nn.Embedding(self.max_positions, self.d_model)

    def rotation(self, position_T: Tensor) -> Rotation | None:
        return rotary(position_T, self.head_width, self.rope_theta) if self.positions == "rotary" else None

    def check_length(self, layout: Layout) -> None:
        """Raise ValueError if a sequence is too long; on a GPU, an index outside the table would crash."""
        if self.max_positions is not None and layout.longest > self.max_positions:
            raise ValueError(
                f"found a sequence of {layout.longest} tokens; the model's limit is max_positions={self.max_positions}"
            )


@dataclass(frozen=True)
class EncoderShape(StackShape):
    """An encoder's shape. The default epsilon suits token tables (see `RMSNorm`)."""

    norm_eps: float = 1.0


class RMSNorm(nn.Module):
    """Divides each row by its root mean square. An `eps` far above the mean square keeps the rows' relative lengths.

    NOTE: a token table learns a token's importance as the length of its row, much like BM25's inverse document
    frequency. The usual `eps` removes that length before pooling; `norm_eps=1` keeps it (benchmarks/README.md).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary(position: Tensor, head_width: int, theta: float) -> Rotation:
    """Cosines and sines, (T, 1, K) each, of the tokens' rotation angles; both halves are equal, as in Llama."""
    exponent = torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width
    angle = position.float()[:, None] * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_THK: Tensor, rotation: Rotation | None) -> Tensor:
    if rotation is None:
        return x_THK
    cos, sin = rotation
    low, high = x_THK.chunk(2, dim=-1)
    return (x_THK * cos + torch.cat([-high, low], dim=-1) * sin).to(x_THK.dtype)


class Attention(nn.Module):
    """Attention in three steps: queries, keys and values, and `forward`. Decoders cache the keys and values.

    `source_width`: width of the states that keys and values are computed from, by default the model's.
    """

    def __init__(self, shape: StackShape, source_width: int | None = None) -> None:
        super().__init__()
        self.head_width, self.dropout = shape.head_width, shape.dropout
        source_width, kv_width = source_width or shape.d_model, shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.k_proj = nn.Linear(source_width, kv_width, bias=False)
        self.v_proj = nn.Linear(source_width, kv_width, bias=False)
        self.o_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def queries(self, x_TD: Tensor, rotation: Rotation | None = None) -> Tensor:
        """(T, H, K)."""
        return rotate(self.q_proj(x_TD).unflatten(-1, (-1, self.head_width)), rotation)

    def keys_values(self, x_SD: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """(S, J, K) each."""
        heads = (-1, self.head_width)
        return rotate(self.k_proj(x_SD).unflatten(-1, heads), rotation), self.v_proj(x_SD).unflatten(-1, heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, causal: bool = False) -> Tensor:
        """(T, D)."""
        options = AttentionOptions(causal=causal, dropout=self.dropout if self.training else 0.0)
        mixed = attend(q, k, v, queries, keys, options)
        return self.o_proj(mixed.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Layer(nn.Module):
    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.dropout = nn.Dropout(shape.dropout)
        initialise(self, [self.self_attn.o_proj, self.mlp.down_proj], branches=2 * shape.num_layers)

    def forward(self, x_TD: Tensor, layout: Layout, rotation: Rotation | None) -> Tensor:
        states = self.input_layernorm(x_TD)
        q, (k, v) = self.self_attn.queries(states, rotation), self.self_attn.keys_values(states, rotation)
        x_TD = x_TD + self.dropout(self.self_attn(q, k, v, layout, layout))
        return x_TD + self.dropout(self.mlp(self.post_attention_layernorm(x_TD)))


class Encoder(nn.Module):
    """Packed token ids in, one state per token out.

    `active_layers`: the number of layers that run. Training's warm-up sets it to 0 while the residual branches are
    zero, which does not change the output. `gradient_checkpointing`: store only each layer's input and run the layer
    again in the backward pass: a third more computation for a fraction of the memory (Chen et al. 2016).
    """

    architecture = "unified"

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.embed_positions = shape.position_table()
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.active_layers = shape.num_layers
        self.gradient_checkpointing = False
        use_onednn(self)
        for table in filter(None, (self.embed_tokens, self.embed_positions)):
            nn.init.normal_(table.weight, std=INIT_STD)

    @property
    def width(self) -> int:
        return self.shape.d_model

    @property
    def token_table(self) -> nn.Embedding:
        return self.embed_tokens

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    def zero_residual_branches(self) -> None:
        """Make every layer add zero, so that the encoder equals its token table.

        Training can then warm up the table alone, many times faster, before it activates the layers (`active_layers`).
        """
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.zeros_(module.o_proj.weight)
            elif isinstance(module, FeedForward):
                nn.init.zeros_(module.down_proj.weight)

    def hidden(self, batch: Packed, layout: Layout) -> Tensor:
        """The last layer's normalised states, (T, D). Raises ValueError for a sequence beyond `max_positions`."""
        self.shape.check_length(layout)
        x_TD = self.embed_tokens(batch.ids)
        if self.embed_positions is not None:
            x_TD = x_TD + self.embed_positions(layout.position)
        if self.active_layers:
            x_TD = self._through_layers(x_TD, layout)
        return self.norm(x_TD)

    def _through_layers(self, x_TD: Tensor, layout: Layout) -> Tensor:
        rows = None
        if layout.by_length is not None:
            rows, layout = layout.by_length
            x_TD = gather_rows(x_TD, rows)
        rotation = self.shape.rotation(layout.position)
        x_TD = run_layers(self.layers[: self.active_layers], self.gradient_checkpointing, x_TD, layout, rotation)
        return x_TD if rows is None else scatter_rows(x_TD, rows, len(x_TD))


def run_layers(layers: Iterable[nn.Module], checkpointing: bool, x_TD: Tensor, *inputs: Any) -> Tensor:
    """(T, D) after all layers, each called with the same `inputs`. Checkpointing repeats the same dropout."""
    for layer in layers:
        if checkpointing and torch.is_grad_enabled():
            x_TD = checkpoint(layer, x_TD, *inputs, use_reentrant=False)
        else:
            x_TD = layer(x_TD, *inputs)
    return x_TD


class Layered(Protocol):
    """An Encoder, a PretrainedEncoder or a Decoder."""

    @property
    def layers(self) -> nn.ModuleList: ...


def compile_layers(stack: Layered, backend: str = "inductor") -> None:
    """Compile each layer in place, for batches of any size; layers of the same kind share the code.

    The first batches of training and of evaluation take about a minute longer. Attention is not compiled, and
    parameter names do not change. `backend` is torch.compile's; "inductor" needs a C++ compiler, or Triton on a GPU.
    """
    keep_from_compiler()
    for layer in stack.layers:
        layer.compile(dynamic=True, backend=backend)


def initialise(layer: nn.Module, branch_ends: Iterable[nn.Linear], branches: int) -> None:
    """N(0, 0.02), and N(0, 0.02 / sqrt(branches)) for the last matrix of each of the stack's residual branches."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
    for end in branch_ends:
        nn.init.normal_(end.weight, std=INIT_STD / math.sqrt(branches))


def gated_width(d_model: int) -> int:
    """8/3 of `d_model`, rounded up to a multiple of 64 for matrix units.

    A gated feed-forward of this width has as many parameters as an ungated one of width 4 x d_model (Shazeer 2020,
    section 3).
    """
    return -(-8 * d_model // (3 * 64)) * 64


def parameter_count(module: nn.Module) -> int:
    """The number of parameters; shared tables count once."""
    return sum(parameter.numel() for parameter in module.parameters())
