"""The encoder against transformers' own EuroBERT, and packing against sequences one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.model.folder import load_encoder, model_fingerprint, save_encoder
from pipeline.model.packing import Layout, Packed, join, pack
from pipeline.model.transformer import Encoder, EncoderShape

SHAPE = EncoderShape(vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_ff=48, norm_eps=1e-5)
TEXTS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15, 16, 17, 18]]


def random_encoder(shape: EncoderShape = SHAPE) -> Encoder:
    """An encoder whose residual branches do something."""
    torch.manual_seed(0)
    encoder = Encoder(shape)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def test_hidden_states_equal_eurobert() -> None:
    from transformers import EuroBertConfig, EuroBertModel

    encoder = random_encoder()
    oracle = EuroBertModel(
        EuroBertConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.d_model,
            intermediate_size=SHAPE.d_ff,
            num_hidden_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_heads,
            num_key_value_heads=SHAPE.num_heads,
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


def test_packed_equals_one_at_a_time_with_gradients() -> None:
    encoder = random_encoder()
    weights = torch.randn(len(TEXTS), SHAPE.d_model)
    (encoder(pack(TEXTS)) * weights).sum().backward()
    together = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    for text, weight in zip(TEXTS, weights, strict=True):
        (encoder(pack([text]))[0] * weight).sum().backward()
    alone = [p.grad for p in encoder.parameters()]
    assert len(together) == len(alone)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_fresh_encoder_is_its_token_table() -> None:
    encoder = Encoder(SHAPE).eval()
    with torch.no_grad():
        deep = encoder(pack(TEXTS))
        encoder.active_layers = 0
        torch.testing.assert_close(encoder(pack(TEXTS)), deep)
        rows = encoder.norm(encoder.embed_tokens.weight[torch.tensor(TEXTS[0])])
    torch.testing.assert_close(deep[0], torch.nn.functional.normalize(rows.mean(dim=0), dim=0))


def test_vectors_are_of_unit_length_and_an_empty_text_is_zero() -> None:
    vectors = random_encoder()(pack([*TEXTS, []]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0] * len(TEXTS) + [0.0]))


def test_a_norm_with_a_large_epsilon_keeps_token_weights() -> None:
    """What the default `norm_eps` is for: a token ten times as long weighs about ten times as much."""
    encoder = Encoder(EncoderShape(**{**vars(SHAPE), "norm_eps": 1.0})).eval()
    row = torch.randn(SHAPE.d_model) * 0.02
    short, long = encoder.norm(row), encoder.norm(10 * row)
    assert 9 < (long.norm() / short.norm()).item() < 10


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
    from pipeline.data.vocabulary import train_tokenizer

    encoder = random_encoder(EncoderShape(**{**vars(SHAPE), "vocab_size": 600}))
    tokenizer = train_tokenizer(["some words to train on"] * 10, kind="bpe", vocab_size=600, lowercase=True)
    save_encoder(tmp_path, encoder, tokenizer.to_str(), max_length=3)
    loaded, loaded_tokenizer = load_encoder(tmp_path)
    torch.testing.assert_close(loaded(pack(TEXTS)), encoder(pack(TEXTS)))
    assert len(loaded_tokenizer.encode("some words to train on").ids) == 3
    before = model_fingerprint(tmp_path)
    save_encoder(tmp_path, encoder, tokenizer.to_str(), max_length=4)
    assert model_fingerprint(tmp_path) != before


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"model\.d_model=30"):
        EncoderShape(vocab_size=10, d_model=30, num_layers=1, num_heads=4, d_ff=8)
