"""The unified transformer's decoder: causal self-attention, and cross-attention to a memory.

    decoder = Decoder(DecoderShape(16000, d_model=256, num_layers=2, num_heads=4, d_ff=768, memory_width=256))
    memory = Memory(encoder.hidden(source, layout), layout)      # or Memory.of_vectors(sentence_vectors)
    logits = decoder.logits(decoder.hidden(inputs, memory))      # (T, 16000), for T packed input tokens
    decoder.generate(memory, start_id=2, end_id=3, max_new_tokens=64)      # [[17, 9, 4], [8], ...]

A layer is causal self-attention, cross-attention to the memory, and feed-forward, each after its norm (Vaswani et al.
2017, section 3.1, with pre-norm). Without a memory there is no cross-attention, and the decoder equals transformers'
Llama with `hidden_act: gelu`, including weight names. Positions count only the target's tokens.

Cost: 2 x parameters x tokens operations, plus each layer's key and value projections of the memory's rows. Generation
runs each token through the layers once, and caches its keys and values.
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
    """A decoder's shape."""

    memory_width: int | None = None
    """M, the width of the memory's rows. None: no memory and no cross-attention."""
    tie_head: bool = True
    """Compute logits with the token table (Press and Wolf 2017) instead of a separate matrix."""


class Memory(NamedTuple):
    """The states that target sequences attend to: (S, M) rows, and their layout in sequences."""

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
    """Keys and values of one layer, for n sequences of t tokens: self-attention (n, t, J, K), memory (S, J, K)."""

    target: tuple[Tensor, Tensor] | None = None
    memory: tuple[Tensor, Tensor] | None = None

    def extend(self, k_nJK: Tensor, v_nJK: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to each sequence. Returns all keys and values, (n * t, J, K)."""
        k, v = k_nJK.unsqueeze(1), v_nJK.unsqueeze(1)
        if self.target is not None:
            k, v = torch.cat([self.target[0], k], dim=1), torch.cat([self.target[1], v], dim=1)
        self.target = k, v
        return k.flatten(0, 1), v.flatten(0, 1)

    def select(self, chosen_n: Tensor, memory: Layout | None) -> None:
        """Drop the sequences where `chosen_n` is false."""
        if self.target is not None:
            self.target = self.target[0][chosen_n], self.target[1][chosen_n]
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
        """(T, D). With a cache, `x_TD` is one new token per sequence, and `seen` the layout of all tokens so far."""
        states = self.input_layernorm(x_TD)
        q, (k, v) = self.self_attn.queries(states, rotation), self.self_attn.keys_values(states, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        # A new token sees the whole cache, so only full sequences need the causal mask.
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
    """Packed token ids and a memory in, one state per token out.

    `tie_to`: an encoder's token table to share. The encoder owns it, so it is moved, saved and loaded with the encoder
    and is not among the decoder's parameters. `gradient_checkpointing` as in `Encoder`.
    """

    def __init__(self, shape: DecoderShape, tie_to: nn.Embedding | None = None) -> None:
        super().__init__()
        self.shape = shape
        # The tuple keeps torch from registering the table here, so a joint state dict has it once.
        self._borrowed = (tie_to,) if tie_to is not None else None
        if tie_to is None:
            self.embed_tokens = nn.Embedding(shape.vocab_size, shape.d_model)
            nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        elif tuple(tie_to.weight.shape) != (shape.vocab_size, shape.d_model):
            raise ValueError(
                f"a decoder with vocab_size={shape.vocab_size} and d_model={shape.d_model} cannot share a table of "
                f"shape {tuple(tie_to.weight.shape)}; give both the same tokenizer and width"
            )
        self.embed_positions = shape.position_table()
        if self.embed_positions is not None:
            nn.init.normal_(self.embed_positions.weight, std=INIT_STD)
        # The norm gives sentence embeddings, which have unit length, and encoder states the same scale.
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
        """(V, D): a token's logit is the dot product of a state and the token's row."""
        return self.token_table.weight if self.shape.tie_head else self.lm_head.weight

    def hidden(self, target: Packed, memory: Memory | None) -> Tensor:
        """The last layer's normalised states, (T, D).

        Target sequence i attends to memory sequence i. Raises ValueError if the numbers of sequences differ, if there
        is a memory but no `memory_width`, or if a sequence is longer than `max_positions`.
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
        """Greedy decoding: one list of tokens per sequence of the memory, or one list without a memory.

        The lists omit `start_id` and `end_id`. Put the model into evaluation mode first. Raises ValueError as `hidden`
        does.
        """
        limit = self.shape.max_positions
        if limit is not None and max_new_tokens > limit:
            raise ValueError(f"max_new_tokens={max_new_tokens} exceeds the decoder's max_positions={limit}")
        running = list(range(1 if memory is None else len(memory.layout.lengths)))
        written: list[list[int]] = [[] for _ in running]
        memory, caches = self._normalised(memory, len(running)), [LayerCache() for _ in self.layers]
        tokens = torch.full((len(running),), start_id, device=self.output_table.device)
        for position in range(max_new_tokens if running else 0):
            tokens = self.logits(self._next(tokens, position, memory, caches)).argmax(dim=-1)
            for sequence, token in zip(running, tokens.tolist(), strict=True):
                if token != end_id:
                    written[sequence].append(token)
            unfinished = tokens != end_id
            running = [sequence for sequence, more in zip(running, unfinished.tolist(), strict=True) if more]
            if not running:
                break
            if len(running) < len(tokens):
                for cache in caches:
                    cache.select(unfinished, memory and memory.layout)
                tokens, memory = tokens[unfinished], memory and memory.select(unfinished)
        return written

    def _next(self, tokens_N: Tensor, position: int, memory: Memory | None, caches: list[LayerCache]) -> Tensor:
        """(N, D) states of the newest token of each sequence; all are at the same position."""
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
            raise ValueError("this decoder takes no memory; set memory_width in its shape, or pass None as the memory")
        if len(memory.layout.lengths) != sequences:
            raise ValueError(
                f"found {len(memory.layout.lengths)} memory sequences for {sequences} targets; give one each"
            )
        return Memory(self.memory_norm(memory.states), memory.layout)


def _even_layout(sequences: int, tokens: int, device: torch.device) -> Layout:
    """A layout of sequences with `tokens` tokens each."""
    return Layout(torch.arange(sequences + 1, device=device) * tokens, sequences * tokens)
