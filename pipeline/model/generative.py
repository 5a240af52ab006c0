"""Losses of a decoder and of a masked-token head over packed tokens.

Losses are sums over this worker's tokens, with a count; the caller divides by the token count of the global batch.

    inputs, labels = shift(pack([[7, 8], [9]]), start_id=2, end_id=3)
    # inputs: 2 7 8 | 2 9        labels: 7 8 3 | 9 3

    states = decoder.hidden(inputs, memory)
    token_loss(states, decoder.output_table, labels)               # TokenLoss(sum, nll, count)

The objectives differ in the decoder's target text and in its memory:

    objective          target                 memory
    seq2seq            the positive           Memory(states of the anchor)
    TSDAE              the clean text         Memory.of_vectors(vectors of texts with tokens deleted)
    span corruption    the masked spans       Memory(states of the text with spans masked)
    causal             the text               None

    masked_loss(head, states, token_table, positions, labels)      # MLM: no decoder

model/corruption.py creates the corrupted inputs. Under FSDP, call these inside the wrapped module's forward, where
weights are gathered. Cost: logits of the whole vocabulary per token, computed twice if they need several chunks.
"""

# Shapes: T packed tokens, N sequences, D width, V vocabulary, P masked positions.
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.packing import Packed
from pipeline.model.transformer import INIT_STD, RMSNorm

CHUNK_LOGITS = 2**25  # logits in memory at once: 128 MB of float32; 16,384 tokens x 32,000 words would be 2 GB


@dataclass(frozen=True)
class TokenLoss:
    """Sums over tokens. `sum` is minimised; `nll` has no label smoothing or gradient, and gives the perplexity."""

    sum: Tensor
    nll: Tensor
    count: int


def shift(target: Packed, start_id: int, end_id: int) -> tuple[Packed, Tensor]:
    """Teacher forcing: the decoder's inputs, and the label of each input token.

    Each sequence is framed as `start_id`, its tokens, `end_id`; the inputs are all but the last token, the labels all
    but the first. A sequence that the tokenizer already framed ([CLS] … [SEP]) is not framed again: a first token equal
    to `start_id` and a last token equal to `end_id` are kept. A single token that equals both counts as the start.
    """
    lengths, filled = target.lengths, target.lengths > 0
    ids = F.pad(target.ids, (0, 1), value=-1)  # an empty last sequence indexes one past the end
    started = filled & (ids[target.offsets[:-1]] == start_id)
    ended = filled & (ids[target.offsets[1:] - 1] == end_id) & ((lengths > 1) | ~started)
    framed = lengths + (~started).long() + (~ended).long()
    bounds = F.pad(framed.cumsum(0), (1, 0))

    whole = torch.full((len(target.ids) + 2 * len(target),), end_id, device=ids.device)
    whole[bounds[:-1]] = start_id
    begins = bounds[:-1] + (~started).long() - target.offsets[:-1]
    whole[torch.arange(len(target.ids), device=ids.device) + begins.repeat_interleave(lengths)] = target.ids

    offsets = bounds - torch.arange(len(bounds), device=ids.device)
    sequence = torch.arange(len(target), device=ids.device).repeat_interleave(framed - 1)
    place = torch.arange(len(sequence), device=ids.device) + sequence
    return Packed(whole[place], offsets), whole[place + 1]


def token_loss(states_TD: Tensor, table_VD: Tensor, labels_T: Tensor, *, label_smoothing: float = 0.0) -> TokenLoss:
    """Cross-entropy of the logits `states @ table.T`, smoothed as `F.cross_entropy` does, in chunks of tokens.

    Only one chunk's logits are in memory; the backward pass recomputes them. Exponentials use at least float32.
    """
    rows = max(1, CHUNK_LOGITS // len(table_VD))
    totals = []
    for states, labels in zip(states_TD.split(rows), labels_T.split(rows), strict=True):
        if len(labels_T) > rows and torch.is_grad_enabled():
            parts = (states, table_VD, labels, label_smoothing)
            totals.append(checkpoint(_summed, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            totals.append(_summed(states, table_VD, labels, label_smoothing))
    loss, nll = (torch.stack(column).sum() for column in zip(*totals, strict=True))
    return TokenLoss(loss, nll.detach(), len(labels_T))


def _summed(states_TD: Tensor, table_VD: Tensor, labels_T: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(states_TD, table_VD)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(dim=-1)
    of_label = logits.gather(1, labels_T[:, None]).squeeze(1)
    nll = (total - of_label).sum()
    if not label_smoothing:
        return nll, nll
    return (1 - label_smoothing) * nll + label_smoothing * (total - logits.mean(dim=-1)).sum(), nll


class MaskedHead(nn.Module):
    """Dense, GELU and norm between an encoder's states and the token table, as in BERT.

    Unlike BERT's head, it has no bias per vocabulary token, and the norm is `RMSNorm`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = RMSNorm(width, 1e-5)
        nn.init.normal_(self.dense.weight, std=INIT_STD)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states_PD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(states_PD)))


def masked_loss(
    head: MaskedHead, states_TD: Tensor, table_VD: Tensor, positions_P: Tensor, labels_P: Tensor
) -> TokenLoss:
    """The loss of predicting `labels_P` from the states at `positions_P`; other tokens do not count."""
    return token_loss(head(states_TD.index_select(0, positions_P)), table_VD, labels_P)
