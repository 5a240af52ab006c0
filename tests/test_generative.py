"""Each generative objective's loss and gradients against `F.cross_entropy` on one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model import generative
from pipeline.model.corruption import Tokens, delete_tokens, mask_spans, mask_tokens
from pipeline.model.decoder import Decoder, DecoderShape, Memory
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.generative import MaskedHead, TokenLoss, masked_loss, shift, token_loss
from pipeline.model.packing import Layout, Packed, pack
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.model.unified import build_unified_transformer

CLS, SEP, MASK, VOCAB, WIDTH = 1, 2, 3, 30, 16
TEXTS = [[10, 11, 12, 13, 14, 15], [16], [17, 18, 19], []]
ANCHORS = [[20, 21], [22, 23, 24], [25], [26]]
KEYS = np.arange(4)


def partners(memory_width: int | None = WIDTH) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder = Encoder(EncoderShape(VOCAB, WIDTH, 1, 2, 24, norm_eps=1e-5))
    decoder = Decoder(DecoderShape(VOCAB, WIDTH, 1, 2, 24, memory_width=memory_width), tie_to=encoder.token_table)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return encoder, decoder


def numpied(texts: list[list[int]]) -> Tokens:
    packed = pack(texts)
    return Tokens(packed.ids.numpy(), packed.offsets.numpy())


def packed(tokens: Tokens) -> Packed:
    return Packed(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.offsets))


def rows_of(batch: Packed) -> list[list[int]]:
    return [row.tolist() for row in batch.ids.split(batch.lengths.tolist())]


def seen_states(encoder: Encoder, batch: Packed) -> Memory:
    layout = Layout.of(batch)
    return Memory(encoder.hidden(batch, layout), layout)


def written_loss(decoder: Decoder, target: Packed, memory: Memory | None, label_smoothing: float = 0.0) -> TokenLoss:
    inputs, labels = shift(target, CLS, SEP)
    return token_loss(decoder.hidden(inputs, memory), decoder.output_table, labels, label_smoothing=label_smoothing)


def assert_same(ours: TokenLoss, summed: Tensor, count: int, *modules: nn.Module) -> None:
    """The same sum over the same number of tokens, and the same gradient of every parameter."""
    torch.testing.assert_close(ours.sum, summed)
    assert ours.count == count
    parameters = [p for module in modules for p in module.parameters()]
    pairs = zip(
        torch.autograd.grad(ours.sum, parameters, allow_unused=True),
        torch.autograd.grad(summed, parameters, allow_unused=True),
        strict=True,
    )
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def one_by_one(decoder: Decoder, targets: list[list[int]], memories: list[Memory | None], smoothing: float) -> Tensor:
    """The sum of `F.cross_entropy` over start + tokens → tokens + end."""
    total = torch.zeros(())
    for target, memory in zip(targets, memories, strict=True):
        logits = decoder.hidden(pack([[CLS, *target]]), memory) @ decoder.token_table.weight.T
        labels = torch.tensor([*target, SEP])
        total = total + F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return total


@pytest.mark.parametrize(
    ("target", "inputs", "labels"),
    [
        ([], [CLS], [SEP]),
        ([7, 8], [CLS, 7, 8], [7, 8, SEP]),
        ([CLS, 7, SEP], [CLS, 7], [7, SEP]),  # framed by a tokenizer
        ([CLS, 7], [CLS, 7], [7, SEP]),
        ([7, SEP], [CLS, 7], [7, SEP]),
        ([CLS], [CLS], [SEP]),
        ([SEP], [CLS], [SEP]),
        ([CLS, SEP], [CLS], [SEP]),
        ([7, CLS, SEP, 8], [CLS, 7, CLS, SEP, 8], [7, CLS, SEP, 8, SEP]),  # elsewhere they are tokens like others
    ],
)
def test_shift(target: list[int], inputs: list[int], labels: list[int]) -> None:
    alone = shift(pack([target]), CLS, SEP)
    assert (rows_of(alone[0]), alone[1].tolist()) == ([inputs], labels)
    among, both = shift(pack([[], target, [CLS, 9, SEP], target]), CLS, SEP)
    assert rows_of(among) == [[CLS], inputs, [CLS, 9], inputs]
    assert both.tolist() == [SEP, *labels, 9, SEP, *labels]


def test_shift_where_one_token_is_start_and_end() -> None:
    inputs, labels = shift(pack([[], [5], [5, 5], [5, 7, 5], [7]]), 5, 5)
    assert rows_of(inputs) == [[5], [5], [5], [5, 7], [5, 7]]
    assert labels.tolist() == [5, 5, 5, 7, 5, 7, 5]
    nothing, no_labels = shift(pack([]), CLS, SEP)
    assert (len(nothing), len(no_labels)) == (0, 0)


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_is_cross_entropy_in_chunks(
    rows_at_once: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generative, "CHUNK_LOGITS", rows_at_once * 4)
    states = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0], [-2.0, 0.1], [0.3, 0.3]], dtype=torch.float64)
    table = torch.tensor([[0.1, 0.2], [1.0, -1.0], [0.5, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 2, 3])
    states.requires_grad_()
    table.requires_grad_()
    found = token_loss(states, table, labels, label_smoothing=smoothing)
    expected = F.cross_entropy(states @ table.T, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(found.sum, expected)
    torch.testing.assert_close(found.nll, F.cross_entropy(states @ table.T, labels, reduction="sum").detach())
    assert (found.count, found.nll.requires_grad) == (5, False)
    for a, b in zip(
        torch.autograd.grad(found.sum, (states, table)), torch.autograd.grad(expected, (states, table)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_no_more_than_a_chunk_of_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generative, "CHUNK_LOGITS", 10 * 50)
    states, table = torch.randn(100, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = token_loss(states, table, torch.zeros(100, dtype=torch.int64))
    assert max(kept) <= 100 * 4  # rows of states; a chunk's logits are 500
    loss.sum.backward()
    assert states.grad is not None


def test_no_tokens_and_16_bit_states() -> None:
    states, table = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    nothing = token_loss(states, table, torch.zeros(0, dtype=torch.int64), label_smoothing=0.1)
    nothing.sum.backward()
    assert (nothing.sum.item(), nothing.nll.item(), nothing.count) == (0, 0, 0)
    assert table.grad is not None
    assert not table.grad.any()
    half = token_loss(torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16(), torch.tensor([0, 1, 2]))
    assert half.sum.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_seq2seq(smoothing: float) -> None:
    encoder, decoder = partners()
    ours = written_loss(decoder, pack(TEXTS), seen_states(encoder, pack(ANCHORS)), smoothing)
    memories = [seen_states(encoder, pack([anchor])) for anchor in ANCHORS]
    assert_same(ours, one_by_one(decoder, TEXTS, [*memories], smoothing), 6 + 1 + 3 + 0 + 4, encoder, decoder)


def test_tsdae() -> None:
    """The decoder sees the vector of the text without some of its tokens, and writes all of it."""
    encoder, decoder = partners()
    left = packed(delete_tokens(numpied(TEXTS), KEYS, 0, special=set()))
    assert 0 < len(left.ids) < 10
    model = EmbeddingModel(encoder)
    ours = written_loss(decoder, pack(TEXTS), Memory.of_vectors(model(left)))
    memories = []
    for row in rows_of(left):
        states = seen_states(encoder, pack([row])).states
        vector = F.normalize(states.mean(dim=0), dim=0) if row else torch.zeros(WIDTH)
        memories.append(Memory(vector[None], Layout.of(pack([[0]]))))
    assert_same(ours, one_by_one(decoder, TEXTS, [*memories], 0.0), 14, encoder, decoder)


def test_span_corruption() -> None:
    encoder, decoder = partners()
    inputs, targets = mask_spans(numpied(TEXTS), KEYS, 1, mask_id=MASK, special=set(), density=0.4, mean_span=1)
    assert sorted(targets.ids.tolist()).count(MASK) == 3
    ours = written_loss(decoder, packed(targets), seen_states(encoder, packed(inputs)))
    memories = [seen_states(encoder, pack([row])) for row in rows_of(packed(inputs))]
    expected = one_by_one(decoder, rows_of(packed(targets)), [*memories], 0.0)
    assert_same(ours, expected, len(targets.ids) + 4, encoder, decoder)


def test_causal() -> None:
    _, decoder = partners(memory_width=None)
    ours = written_loss(decoder, pack(TEXTS), None)
    assert_same(ours, one_by_one(decoder, TEXTS, [None] * 4, 0.0), 14, decoder, decoder.token_table)


def test_masked_language_model() -> None:
    encoder, _ = partners()
    head = MaskedHead(WIDTH)
    nn.init.normal_(head.dense.bias)
    tokens, positions, labels = mask_tokens(
        numpied(TEXTS), KEYS, 0, mask_id=MASK, vocab_size=VOCAB, special=set(), ratio=0.5
    )
    asked = set(positions.tolist())
    assert 1 < len(asked) < 10
    corrupted = packed(tokens)
    table = encoder.token_table.weight
    ours = masked_loss(
        head, seen_states(encoder, corrupted).states, table, torch.from_numpy(positions), torch.from_numpy(labels)
    )
    total, place = torch.zeros(()), 0
    for row, clean in zip(rows_of(corrupted), TEXTS, strict=True):
        states = seen_states(encoder, pack([row])).states
        for state, original in zip(states, clean, strict=True):
            if place in asked:
                dense = F.gelu(head.dense.weight @ state + head.dense.bias)
                scaled = dense / (dense.square().mean() + 1e-5).sqrt() * head.norm.weight
                total = total - (table @ scaled).log_softmax(dim=0)[original]
            place += 1
    assert_same(ours, total, len(asked), encoder, head)


def test_a_batch_without_masked_tokens_has_no_loss() -> None:
    encoder, _ = partners()
    head, none = MaskedHead(WIDTH), torch.zeros(0, dtype=torch.int64)
    loss = masked_loss(head, seen_states(encoder, pack(TEXTS)).states, encoder.token_table.weight, none, none)
    loss.sum.backward()
    assert (loss.sum.item(), loss.count) == (0, 0)
    assert head.dense.weight.grad is not None  # the same parameters get a gradient on every worker


def test_a_small_transformer_learns_to_turn_texts_round() -> None:
    """Three of four tokens in all orders: without the source's positions a text costs log(6) at least."""
    torch.manual_seed(0)
    model = build_unified_transformer(
        8, 8, 8, 8, d_model=32, num_layers=1, num_heads=4, dropout=0.0, tie_embeddings=True
    )
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
        nn.init.normal_(matrix, std=0.1)  # from smaller weights it takes longer to look at its source
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = [[a, b, c] for a in range(4, 8) for b in range(4, 8) for c in range(4, 8) if len({a, b, c}) == 3]
    source, target = pack(texts), pack([text[::-1] for text in texts])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = written_loss(model.decoder, target, model.memory(source))
        (loss.sum / loss.count).backward()
        optimizer.step()
        losses.append(loss.nll.item() / loss.count)
    assert losses[-1] < 0.1 < np.log(6) / 4 < losses[0]
    assert model.eval().generate(source, CLS, SEP) == [text[::-1] for text in texts]
