"""The unified transformer's decoder: causal self-attention, and cross-attention to a memory.

    decoder = Decoder(DecoderShape(16000, d_model=256, num_layers=2, num_heads=4, d_ff=768, memory_width=256))
    memory = Memory(encoder.hidden(source, layout), layout)      # or Memory.of_vectors(sentence_vectors)
    logits = decoder.logits(decoder.hidden(inputs, memory))      # (T, 16000), for the T tokens of packed inputs
    decoder.generate(memory, start_id=2, end_id=3, max_new_tokens=64)      # [[17, 9, 4], [8], ...]

A layer is causal self-attention, attention to the memory, and feed-forward, each after its norm (Vaswani et al. 2017,
section 3.1, with pre-norm). Without a memory the second is skipped: the decoder is then transformers' Llama with
`hidden_act: gelu`, whose names its weights have. Positions count the target's tokens only.

Cost: 2 x parameters x tokens operations, and the layers' key and value projections for each row of the memory.
Generation runs each token through the layers once and caches its keys and values.
"""

# Shapes: T packed tokens, N sequences, D model width, V vocabulary, S rows of memory, M memory width,
# J key-value heads, K head width.
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.linear import use_onednn
from pipeline.model.packing import Layout, Packed
from pipeline.model.transformer import (
    INIT_STD,
    Attention,
    FeedForward,
    RMSNorm,
    Rotation,
    StackShape,
    initialise,
    run_layers,
)


@dataclass(frozen=True)
class DecoderShape(StackShape):
    """The numbers that fix a decoder's parameters."""

    memory_width: int | None = None
    """M, the width of the memory's rows. None: no memory, and no parameters for cross-attention."""
    tie_head: bool = True
    """Score tokens by the token table (Press and Wolf 2017), or by a matrix of its own."""


class Memory(NamedTuple):
    """The states that each target sequence attends to: (S, M) rows, and the sequence of each row."""

    states: Tensor
    layout: Layout

    @classmethod
    def of_vectors(cls, vectors_NM: Tensor) -> Memory:
        """One row per sequence, such as a sentence embedding."""
        return cls(vectors_NM, _even_layout(len(vectors_NM), 1, vectors_NM.device))

    def select(self, chosen_N: Tensor) -> Memory:
        """The sequences where `chosen_N` is true."""
        offsets = F.pad(self.layout.lengths[chosen_N].cumsum(0), (1, 0))
        states = self.states[chosen_N[self.layout.sequence]]
        return Memory(states, Layout(offsets, len(states)))


@dataclass
class LayerCache:
    """Keys and values of one layer, for n sequences of t tokens: (n, t, J, K) their own, (S, J, K) the memory's."""

    own: tuple[Tensor, Tensor] | None = None
    memory: tuple[Tensor, Tensor] | None = None

    def extend(self, k_nJK: Tensor, v_nJK: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to each sequence. Returns all keys and values, (n * t, J, K)."""
        k, v = k_nJK.unsqueeze(1), v_nJK.unsqueeze(1)
        if self.own is not None:
            k, v = torch.cat([self.own[0], k], dim=1), torch.cat([self.own[1], v], dim=1)
        self.own = k, v
        return k.flatten(0, 1), v.flatten(0, 1)

    def select(self, chosen_n: Tensor, memory: Layout | None) -> None:
        """Drop the sequences where `chosen_n` is false."""
        if self.own is not None:
            self.own = self.own[0][chosen_n], self.own[1][chosen_n]
        if self.memory is not None and memory is not None:
            rows = chosen_n[memory.sequence]
            self.memory = self.memory[0][rows], self.memory[1][rows]


class DecoderLayer(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.dropout = nn.Dropout(shape.dropout)
        ends = [self.self_attn.o_proj, self.mlp.down_proj]
        if shape.memory_width is not None:
            self.cross_attention_layernorm = RMSNorm(shape.d_model, shape.norm_eps)
            self.cross_attn = Attention(shape, shape.memory_width)
            ends.append(self.cross_attn.o_proj)
        initialise(self, ends, branches=len(ends) * shape.num_layers)

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        rotation: Rotation | None,
        memory: Memory | None,
        cache: LayerCache | None = None,
        seen: Layout | None = None,
    ) -> Tensor:
        """(T, D). With a cache, `x_TD` is the next token of each sequence, `seen` the layout of all tokens so far."""
        states = self.input_layernorm(x_TD)
        q, (k, v) = self.self_attn.queries(states, rotation), self.self_attn.keys_values(states, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        # The next token sees the whole cache: only whole sequences need the causal mask.
        keys = layout if seen is None else seen
        x_TD = x_TD + self.dropout(self.self_attn(q, k, v, layout, keys, causal=cache is None))
        if memory is not None:
            q = self.cross_attn.queries(self.cross_attention_layernorm(x_TD))
            k, v = (cache and cache.memory) or self.cross_attn.keys_values(memory.states)
            if cache is not None:
                cache.memory = k, v
            x_TD = x_TD + self.dropout(self.cross_attn(q, k, v, layout, memory.layout))
        return x_TD + self.dropout(self.mlp(self.post_attention_layernorm(x_TD)))


class Decoder(nn.Module):
    """Packed token ids and a memory in, a state for each token out.

    `tie_to` is a token table to share, an encoder's: it stays that encoder's, which moves, saves and loads it, and is
    not among the decoder's own parameters. `gradient_checkpointing` as in `Encoder`.
    """

    def __init__(self, shape: DecoderShape, tie_to: nn.Embedding | None = None) -> None:
        super().__init__()
        self.shape = shape
        # In a tuple the table is not registered here, so a state dict of encoder and decoder has it once.
        self._borrowed = (tie_to,) if tie_to is not None else None
        if tie_to is None:
            self.embed_tokens = nn.Embedding(shape.vocab_size, shape.d_model)
            nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        elif tuple(tie_to.weight.shape) != (shape.vocab_size, shape.d_model):
            raise ValueError(
                f"a table of shape {tuple(tie_to.weight.shape)} cannot be shared by a decoder of "
                f"vocab_size={shape.vocab_size} and d_model={shape.d_model}; give both the same tokenizer and width"
            )
        self.embed_positions = shape.position_table()
        if self.embed_positions is not None:
            nn.init.normal_(self.embed_positions.weight, std=INIT_STD)
        # Sentence embeddings have unit length, encoder states do not: the norm gives both the same scale.
        self.memory_norm = None if shape.memory_width is None else RMSNorm(shape.memory_width, shape.norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        if not shape.tie_head:
            self.lm_head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=INIT_STD)
        self.gradient_checkpointing = False
        use_onednn(self)

    @property
    def token_table(self) -> nn.Embedding:
        return self._borrowed[0] if self._borrowed is not None else self.embed_tokens

    @property
    def output_table(self) -> Tensor:
        """(V, D): a token's logit is the product of a state and the token's row."""
        return self.token_table.weight if self.shape.tie_head else self.lm_head.weight

    def hidden(self, target: Packed, memory: Memory | None) -> Tensor:
        """The last layer's normalised states, (T, D).

        Sequence i of the target attends to sequence i of the memory. Raises ValueError for different numbers of
        sequences, for a memory without `memory_width`, and for a sequence longer than `max_positions`.
        """
        layout = Layout.of(target)
        self.shape.check_length(layout)
        x_TD = self._embed(target.ids, layout.position)
        rotation, memory = self.shape.rotation(layout.position), self._normalised(memory, len(target))
        return self.norm(run_layers(self.layers, self.gradient_checkpointing, x_TD, layout, rotation, memory))

    def logits(self, states_TD: Tensor) -> Tensor:
        """(T, V)."""
        return F.linear(states_TD, self.output_table)

    @torch.no_grad()
    def generate(self, memory: Memory | None, start_id: int, end_id: int, max_new_tokens: int) -> list[list[int]]:
        """Greedy decoding: a list of tokens for each sequence of the memory, or one list without a memory.

        The tokens include neither `start_id` nor `end_id`. Put the model into evaluation mode first. Raises ValueError
        as `hidden` does.
        """
        limit = self.shape.max_positions
        if limit is not None and max_new_tokens > limit:
            raise ValueError(f"max_new_tokens={max_new_tokens} is more than the decoder's max_positions={limit}")
        running = list(range(1 if memory is None else len(memory.layout.lengths)))
        written: list[list[int]] = [[] for _ in running]
        memory, caches = self._normalised(memory, len(running)), [LayerCache() for _ in self.layers]
        tokens = torch.full((len(running),), start_id, device=self.output_table.device)
        for position in range(max_new_tokens if running else 0):
            tokens = self.logits(self._next(tokens, position, memory, caches)).argmax(dim=-1)
            for sequence, token in zip(running, tokens.tolist(), strict=True):
                if token != end_id:
                    written[sequence].append(token)
            goes_on = tokens != end_id
            running = [sequence for sequence, on in zip(running, goes_on.tolist(), strict=True) if on]
            if not running:
                break
            if len(running) < len(tokens):
                for cache in caches:
                    cache.select(goes_on, memory and memory.layout)
                tokens, memory = tokens[goes_on], memory and memory.select(goes_on)
        return written

    def _next(self, tokens_N: Tensor, position: int, memory: Memory | None, caches: list[LayerCache]) -> Tensor:
        """(N, D) states of the next token of each sequence; all tokens are at the same position."""
        layout, seen = (_even_layout(len(tokens_N), count, tokens_N.device) for count in (1, position + 1))
        positions = torch.full_like(tokens_N, position)
        x_ND, rotation = self._embed(tokens_N, positions), self.shape.rotation(positions)
        for layer, cache in zip(self.layers, caches, strict=True):
            x_ND = layer(x_ND, layout, rotation, memory, cache, seen)
        return self.norm(x_ND)

    def _embed(self, ids: Tensor, position: Tensor) -> Tensor:
        x_TD: Tensor = self.token_table(ids)
        return x_TD if self.embed_positions is None else x_TD + self.embed_positions(position)

    def _normalised(self, memory: Memory | None, sequences: int) -> Memory | None:
        if memory is None:
            return None
        if self.memory_norm is None:
            raise ValueError("this decoder has no memory; give its shape a memory_width, or None as the memory")
        if len(memory.layout.lengths) != sequences:
            raise ValueError(f"a memory of {len(memory.layout.lengths)} sequences does not fit {sequences} targets")
        return Memory(self.memory_norm(memory.states), memory.layout)


def _even_layout(sequences: int, tokens: int, device: torch.device) -> Layout:
    """A layout of sequences of `tokens` tokens each."""
    return Layout(torch.arange(sequences + 1, device=device) * tokens, sequences * tokens)
