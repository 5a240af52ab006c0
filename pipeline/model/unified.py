"""The unified transformer: encoder and decoder in one module.

    model = build_unified_transformer(32_000, 32_000, src_seq_len=512, tgt_seq_len=128, d_model=512)
    logits = model(pack([[5, 6, 7], [8]]), pack([[2, 9], [2, 4, 4]]))        # (5, 32000)
    model.eval().generate(pack([[5, 6, 7], [8]]), start_id=2, end_id=3)      # [[9, 17], [4, 4]]

Cost: that of the encoder for source tokens, and of the decoder for target tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.model.decoder import Decoder, DecoderShape, Memory
from pipeline.model.packing import Layout, Packed
from pipeline.model.transformer import Encoder, EncoderShape, gated_width


class UnifiedTransformer(nn.Module):
    """Encodes sources and decodes targets. `max_new_tokens` is the default for `generate`."""

    def __init__(self, encoder: Encoder, decoder: Decoder, max_new_tokens: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.max_new_tokens = encoder, decoder, max_new_tokens

    def forward(self, source: Packed, target_inputs: Packed) -> Tensor:
        """(T, V) logits for the T tokens of `target_inputs`; target sequence i attends to source sequence i."""
        return self.decoder.logits(self.decoder.hidden(target_inputs, self.memory(source)))

    def memory(self, source: Packed) -> Memory:
        layout = Layout.of(source)
        return Memory(self.encoder.hidden(source, layout), layout)

    @torch.no_grad()
    def generate(
        self, source: Packed, start_id: int, end_id: int, max_new_tokens: int | None = None
    ) -> list[list[int]]:
        """Greedy decoding; see `Decoder.generate`."""
        return self.decoder.generate(self.memory(source), start_id, end_id, max_new_tokens or self.max_new_tokens)


def build_unified_transformer(  # noqa: PLR0913  # named as in the paper
    src_vocab_size: int,
    tgt_vocab_size: int,
    src_seq_len: int,
    tgt_seq_len: int,
    d_model: int = 512,
    num_layers: int = 6,
    num_heads: int = 8,
    d_ff: int | None = None,
    dropout: float = 0.1,
    *,
    num_kv_heads: int | None = None,
    decoder_layers: int | None = None,
    positions: Literal["rotary", "learned"] = "rotary",
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
    gradient_checkpointing: bool = False,
) -> UnifiedTransformer:
    """A randomly initialised transformer; the defaults are the base model's of Vaswani et al. 2017, table 3.

    `src_seq_len` and `tgt_seq_len`: longest sequences in tokens, including special tokens; longer ones raise
    ValueError. `d_ff` defaults to `gated_width`, `decoder_layers` to the encoder's number. `tie_embeddings` shares one
    table for source tokens, target tokens and logits (Vaswani et al., section 3.4). Raises ValueError if tied
    vocabularies differ or sizes do not divide.
    """
    if tie_embeddings and src_vocab_size != tgt_vocab_size:
        raise ValueError(
            f"tie_embeddings needs one vocabulary; found src_vocab_size={src_vocab_size} and "
            f"tgt_vocab_size={tgt_vocab_size}"
        )
    d_ff = d_ff or gated_width(d_model)
    encoder = Encoder(
        EncoderShape(
            src_vocab_size,
            d_model,
            num_layers,
            num_heads,
            d_ff,
            num_kv_heads=num_kv_heads,
            dropout=dropout,
            positions=positions,
            max_positions=src_seq_len,
            norm_eps=norm_eps,
        )
    )
    decoder = Decoder(
        DecoderShape(
            tgt_vocab_size,
            d_model,
            num_layers if decoder_layers is None else decoder_layers,
            num_heads,
            d_ff,
            num_kv_heads=num_kv_heads,
            dropout=dropout,
            positions=positions,
            max_positions=tgt_seq_len,
            norm_eps=norm_eps,
            memory_width=d_model,
            tie_head=tie_embeddings,
        ),
        tie_to=encoder.token_table if tie_embeddings else None,
    )
    encoder.gradient_checkpointing = decoder.gradient_checkpointing = gradient_checkpointing
    return UnifiedTransformer(encoder, decoder, tgt_seq_len)
