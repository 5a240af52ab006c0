"""The encoder against transformers' own EuroBERT, packing against sequences one at a time, and the sizes there are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.model import SIZES
from pipeline.model.decoder import Decoder, DecoderShape
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import load_model, model_fingerprint, save_model
from pipeline.model.packing import Layout, Packed, join, pack
from pipeline.model.transformer import Encoder, EncoderShape, gated_width, parameter_count

SHAPE = EncoderShape(vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_ff=48, norm_eps=1e-5)
TEXTS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15, 16, 17, 18]]


def random_encoder(shape: EncoderShape = SHAPE) -> Encoder:
    """An encoder with weights large enough for each to matter."""
    torch.manual_seed(0)
    encoder = Encoder(shape)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def states(encoder: Encoder, texts: list[list[int]]) -> Tensor:
    batch = pack(texts)
    return encoder.hidden(batch, Layout.of(batch))


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_hidden_states_equal_eurobert(num_kv_heads: int | None) -> None:
    from transformers import EuroBertConfig, EuroBertModel

    encoder = random_encoder(replace(SHAPE, num_kv_heads=num_kv_heads))
    oracle = EuroBertModel(
        EuroBertConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.d_model,
            intermediate_size=SHAPE.d_ff,
            num_hidden_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_heads,
            num_key_value_heads=num_kv_heads or SHAPE.num_heads,
            hidden_act="gelu",
            rms_norm_eps=SHAPE.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
            pad_token_id=0,
        )
    ).eval()
    missing, unexpected = oracle.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    batch = pack(TEXTS)
    layout = Layout.of(batch)
    with torch.no_grad():
        ours = encoder.hidden(batch, layout)
        theirs = oracle(input_ids=layout.pad(batch.ids), attention_mask=layout.mask.long()).last_hidden_state
    torch.testing.assert_close(ours, layout.unpad(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_packed_equals_one_at_a_time_with_gradients(positions: str) -> None:
    shape = replace(SHAPE, positions=positions, max_positions=8, num_kv_heads=2)
    model = EmbeddingModel(random_encoder(shape))
    weights = torch.randn(len(TEXTS), SHAPE.d_model)
    (model(pack(TEXTS)) * weights).sum().backward()
    together = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for text, weight in zip(TEXTS, weights, strict=True):
        (model(pack([text]))[0] * weight).sum().backward()
    alone = [p.grad for p in model.parameters()]
    assert len(together) == len(alone)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_weights_begin_small_and_smaller_where_residual_branches_end() -> None:
    torch.manual_seed(0)
    shape = EncoderShape(vocab_size=500, d_model=128, num_layers=8, num_heads=4, d_ff=512)
    encoder = Encoder(shape)
    ends = {"o_proj", "down_proj"}
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        expected = 0.02 / math.sqrt(2 * 8) if ends & set(name.split(".")) else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_with_zeroed_branches_an_encoder_is_its_token_table() -> None:
    encoder = Encoder(SHAPE).eval()
    with torch.no_grad():
        rows = encoder.norm(encoder.embed_tokens(pack(TEXTS).ids))
        assert not torch.allclose(states(encoder, TEXTS), rows)
        encoder.zero_residual_branches()
        assert torch.equal(states(encoder, TEXTS), rows)
        encoder.active_layers = 0
        assert torch.equal(states(encoder, TEXTS), rows)
        torch.testing.assert_close(
            EmbeddingModel(encoder)(pack(TEXTS))[0], nn.functional.normalize(rows[:5].mean(dim=0), dim=0)
        )


def test_no_layers_at_all() -> None:
    encoder = Encoder(replace(SHAPE, num_layers=0))
    assert [name for name, _ in encoder.named_parameters()] == ["embed_tokens.weight", "norm.weight"]
    assert torch.equal(states(encoder, TEXTS), encoder.norm(encoder.embed_tokens(pack(TEXTS).ids)))


def test_vectors_are_of_unit_length_and_an_empty_text_is_zero() -> None:
    vectors = EmbeddingModel(random_encoder())(pack([*TEXTS, []]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0] * len(TEXTS) + [0.0]))


def test_a_norm_with_a_large_epsilon_keeps_token_weights() -> None:
    """What the default `norm_eps` is for: a token ten times as long weighs about ten times as much."""
    encoder = Encoder(replace(SHAPE, norm_eps=EncoderShape.norm_eps)).eval()
    row = torch.randn(SHAPE.d_model) * 0.02
    short, long = encoder.norm(row), encoder.norm(10 * row)
    assert 9 < (long.norm() / short.norm()).item() < 10


def test_learned_positions_are_added_to_the_tokens() -> None:
    encoder = random_encoder(replace(SHAPE, positions="learned", max_positions=8))
    encoder.active_layers = 0
    rows = encoder.embed_tokens.weight[[8, 9, 8]] + encoder.embed_positions.weight[[0, 0, 1]]
    torch.testing.assert_close(states(encoder, [[8], [9, 8]]), encoder.norm(rows))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_sequence_beyond_max_positions_is_refused(positions: str) -> None:
    encoder = Encoder(replace(SHAPE, positions=positions, max_positions=4))
    assert len(states(encoder, [[5] * 4])) == 4
    with pytest.raises(ValueError, match="5 tokens; the model's limit is max_positions=4"):
        states(encoder, [[5], [5] * 5])


def test_gradient_checkpointing_changes_no_gradient_with_dropout_on() -> None:
    encoder = random_encoder(replace(SHAPE, dropout=0.3)).train()
    runs = []
    encoder.layers[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def gradients() -> list[Tensor]:
        encoder.zero_grad()
        torch.manual_seed(7)
        states(encoder, TEXTS).square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    plain = gradients()
    assert len(runs) == 1
    encoder.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert len(runs) == 3  # forward, and again for the backward pass
    with torch.no_grad():
        states(encoder, TEXTS)
    assert len(runs) == 4


def test_packing() -> None:
    batch = pack(TEXTS)
    assert batch.lengths.tolist() == [5, 1, 2, 8]
    middle = batch.slice(1, 3)
    assert (middle.ids.tolist(), middle.offsets.tolist()) == ([8, 9, 10], [0, 1, 3])
    both = join(middle, pack([[], [1]]))
    assert (both.ids.tolist(), both.offsets.tolist()) == ([8, 9, 10, 1], [0, 1, 3, 3, 4])
    layout = Layout.of(batch)
    torch.testing.assert_close(layout.unpad(layout.pad(batch.ids)), batch.ids)
    assert len(pack([])) == 0
    assert isinstance(batch.to("cpu"), Packed)


def test_folder_round_trip(tmp_path: Path) -> None:
    from pipeline.data.tokenizer import train_tokenizer

    model = EmbeddingModel(random_encoder(replace(SHAPE, vocab_size=600, num_kv_heads=2)))
    tokenizer = train_tokenizer(["some words to train on"] * 10, kind="bpe", vocab_size=600, lowercase=True)
    save_model(tmp_path, model, tokenizer.to_str(), max_length=3)
    loaded, loaded_tokenizer = load_model(tmp_path)
    torch.testing.assert_close(loaded(pack(TEXTS)), model(pack(TEXTS)))
    assert len(loaded_tokenizer.encode("some words to train on").ids) == 3
    before = model_fingerprint(tmp_path)
    save_model(tmp_path, model, tokenizer.to_str(), max_length=4)
    assert model_fingerprint(tmp_path) != before


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.d_model=30"):
        replace(SHAPE, d_model=30)
    with pytest.raises(ValueError, match=r"model\.num_kv_heads=3 must divide model\.num_heads=4"):
        replace(SHAPE, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"model\.max_positions"):
        replace(SHAPE, positions="learned")


@pytest.mark.parametrize(("d_model", "width"), [(384, 1024), (512, 1408), (768, 2048), (3, 64)])
def test_the_width_of_a_gated_feed_forward(d_model: int, width: int) -> None:
    assert gated_width(d_model) == width


@pytest.mark.parametrize(
    ("size", "encoder_millions", "decoder_millions"),
    [
        ("tiny", 9.0, 9.3),
        ("small", 22.9, 26.4),
        ("base", 109.5, 137.8),
        ("large", 341.1, 441.7),
        ("1b", 967.4, 1177.2),
        ("7b", 7110.7, 8452.9),
        ("30b", 30353.6, 36695.8),
    ],
)
def test_sizes(size: str, encoder_millions: float, decoder_millions: float) -> None:
    """Parameters with 32,000 tokens, against the sum of the matrices; a decoder shares one table with its head."""
    d_model, num_layers, num_heads, num_kv_heads, d_ff = (
        SIZES[size][key] for key in ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
    )
    attention = 2 * d_model**2 + 2 * d_model * (d_model // num_heads * num_kv_heads)
    layer = attention + 3 * d_model * d_ff + 2 * d_model
    table = 32_000 * d_model
    with torch.device("meta"):
        encoder = Encoder(EncoderShape(vocab_size=32_000, **SIZES[size]))
        decoder = Decoder(DecoderShape(vocab_size=32_000, memory_width=d_model, **SIZES[size]))
    assert parameter_count(encoder) == table + num_layers * layer + d_model
    assert parameter_count(decoder) == table + num_layers * (layer + attention + d_model) + 2 * d_model
    assert parameter_count(encoder) / 1e6 == pytest.approx(encoder_millions, abs=0.1)
    assert parameter_count(decoder) / 1e6 == pytest.approx(decoder_millions, abs=0.1)


def test_names_of_sizes_say_how_large_they_are() -> None:
    named = {"large": (0.3, 0.4), "1b": (0.9, 1.1), "7b": (6.3, 7.7), "30b": (27, 33)}
    for size, (least, most) in named.items():
        with torch.device("meta"):
            encoder = Encoder(EncoderShape(vocab_size=32_000, **SIZES[size]))
        assert least < parameter_count(encoder) / 1e9 < most, size
