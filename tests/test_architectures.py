"""Tiny random models of many architectures: our vectors and exports against those of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, processors
from torch import nn

from pipeline.config import Config, ConfigError, load
from pipeline.data.tokenizer import train_tokenizer
from pipeline.index.backends import OnnxBackend, TableBackend
from pipeline.index.encoder import TextEncoder
from pipeline.model.folder import FAMILIES, load_model, read_model_spec, runs_padded, save_model
from pipeline.model.hf_export import export_model
from pipeline.model.onnx import export_onnx
from pipeline.model.packing import Layout, pack
from pipeline.model.pretrained import load_pretrained
from pipeline.training.assembly import build_learner, check_model, describe
from tests.conftest import make_pairs

WIDTH, LIMIT = 32, 24
TEXTS = [str(row[field]) for row in make_pairs(12) for field in ("anchor", "positive")] + ["", "X", "Violin " * 60]
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DROPOUT = (  # as the families name it
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop"),
)
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_model": WIDTH, "feed_forward_proj": "gated-gelu"}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {  # model_type, config, pooling_mode
    "BERT": ("bert", {}, "cls"),
    "ModernBERT": ("modernbert", {"cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}, "mean"),
    "Qwen3-Embedding": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, "lasttoken"),
    "gte-Qwen2": ("qwen2", {"num_key_value_heads": 2}, "lasttoken"),
    "e5-mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}, "lasttoken"),
    "Llama": ("llama", {"num_key_value_heads": 2, "is_causal": False}, "mean"),
    "EmbeddingGemma": ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}, "mean"),
    "Gemma3": ("gemma3_text", GEMMA, "lasttoken"),
    "MPNet": ("mpnet", {"pad_token_id": 1}, "mean"),
    "ALBERT": ("albert", {"embedding_size": 16}, "max"),
    "DeBERTa-v3": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "mean"),
    "XLNet": ("xlnet", {"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 48}, "lasttoken"),
    "sentence-t5": ("t5", T5, "mean"),
    "mT5": ("mt5", T5, "mean_sqrt_len_tokens"),
    "GPT-2": ("gpt2", {"n_embd": WIDTH, "n_layer": 2, "n_head": 4}, "weightedmean"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_tokenizer(TEXTS, kind="wordpiece", vocab_size=300, lowercase=False)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def transformers_folder(folder: Path, name: str, tokenizer: Tokenizer) -> Path:
    """A model whose parameters all do something, as transformers saves it."""
    torch.manual_seed(0)
    family, own, _ = ARCHITECTURES[name]
    sizes = {"vocab_size": tokenizer.get_vocab_size() + 4, **SHAPE, **dict.fromkeys(DROPOUT, 0.0), **own}
    if family == "xlnet":
        del sizes["max_position_embeddings"]  # its positions are relative
    config = transformers.AutoConfig.for_model(family, **sizes)
    kind = {"t5": transformers.T5EncoderModel, "mt5": transformers.MT5EncoderModel}.get(family)
    model = kind(config) if kind else transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad = tokenizer.id_to_token(own.get("pad_token_id", 0))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "model_max_length": LIMIT}
    side = "left" if ARCHITECTURES[name][2] == "lasttoken" else "right"
    inputs = ["input_ids", "attention_mask"]
    write(folder / "tokenizer_config.json", **settings, padding_side=side, model_input_names=inputs)
    return folder


def saved(folder: Path, *modules: Any, **options: Any) -> Path:
    SentenceTransformer(modules=[*modules], device="cpu", **options).save_pretrained(str(folder))
    return folder


def architecture(tmp_path: Path, name: str, tokenizer: Tokenizer, *further: nn.Module) -> Path:
    """As sentence-transformers saves it: with instructions before queries."""
    tmp_path.mkdir(exist_ok=True)
    encoder = Transformer(str(transformers_folder(tmp_path / "made", name, tokenizer)))
    prompts = {"query": "Instruct: find what answers\nQuery:", "document": ""}
    return saved(tmp_path / "st", encoder, Pooling(WIDTH, ARCHITECTURES[name][2]), *further, prompts=prompts)


def theirs(folder: Path, kind: str = "", texts: list[str] = TEXTS) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu")
    encode = {"": model.encode, "query": model.encode_query, "document": model.encode_document}[kind]
    return encode(texts, batch_size=8, show_progress_bar=False)


def check_equal(folder: Path, oracle: Path | None = None, texts: list[str] = TEXTS) -> TextEncoder:
    """Our vectors from `folder` against sentence-transformers' from `oracle`, by default of the same folder."""
    encoder = TextEncoder(folder, device="cpu")
    for kind in ("", "query", "document"):
        np.testing.assert_allclose(encoder.encode(texts, kind), theirs(oracle or folder, kind, texts), atol=1e-5)
    return encoder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_and_exports(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of texts of many lengths, an empty one and one that is cut; then of a checkpoint, and of its export."""
    folder = architecture(tmp_path, name, tokenizer, Normalize())
    spec, model = check_equal(folder).spec, load_model(folder)[0]
    assert (spec.width, spec.max_length) == (WIDTH, LIMIT)
    assert runs_padded(spec) == (ARCHITECTURES[name][0] not in FAMILIES)
    for kind in ("checkpoint", "export"):
        (tmp_path / kind).mkdir()
    save_model(tmp_path / "checkpoint", model, (folder / "tokenizer.json").read_text(), LIMIT)
    check_equal(tmp_path / "checkpoint", folder)
    assert export_model(tmp_path / "checkpoint", tmp_path / "export") > 1 - 1e-5
    for kind in ("", "query"):
        np.testing.assert_allclose(theirs(tmp_path / "export", kind), theirs(folder, kind), atol=1e-5)
    check_equal(tmp_path / "export")


@pytest.mark.parametrize("name", [name for name, (family, *_) in ARCHITECTURES.items() if family not in FAMILIES])
def test_gradients_of_padded_models(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Equal those of each text alone, also with layers that are computed again, and with empty texts in the batch."""
    folder = transformers_folder(tmp_path, name, tokenizer)
    sequences = [[5, 6, 7, 8, 9], [], [10, 11], [12], []]
    runs = []
    for batches in ([sequences], [[each] for each in sequences if each]):
        backbone = load_pretrained(folder)
        if backbone.model.supports_gradient_checkpointing and len(batches) == 1:
            backbone.train().checkpoint_gradients()
        packed = [pack(each) for each in batches]
        states = torch.cat([backbone.hidden(batch, Layout.of(batch)) for batch in packed])
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        runs.append((states, {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}))
    (together, gradients), (alone, expected) = runs
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-4, rtol=1e-3)
        assert gradient.isfinite().all()
    assert backbone.hidden(pack([[], []]), Layout.of(pack([[], []]))).shape == (0, WIDTH)


def test_a_model_that_cannot_be_checkpointed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backbone = load_pretrained(transformers_folder(tmp_path, "MPNet", tokenizer))
    with pytest.raises(ValueError, match="found a mpnet model, which transformers cannot checkpoint"):
        backbone.checkpoint_gradients()


def test_padded_models_as_graphs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With Dense modules; an architecture that torch cannot trace is one sentence."""
    folder = architecture(tmp_path, "MPNet", tokenizer, Dense(WIDTH, 8))
    (tmp_path / "graph").mkdir()
    export_model(folder, tmp_path / "graph")
    assert export_onnx(tmp_path / "graph", load_model(folder)[0]) > 0.9999
    backend = OnnxBackend(tmp_path / "graph" / "model.onnx", 8, threads=1)
    np.testing.assert_allclose(TextEncoder(folder, backend=backend).encode(TEXTS), theirs(folder), atol=1e-4)

    xlnet = architecture(tmp_path / "other", "XLNet", tokenizer)
    export_model(xlnet, tmp_path / "graph")
    with pytest.raises(ConfigError, match="onnx: torch cannot export a xlnet model as a graph") as refusal:
        export_onnx(tmp_path / "graph", load_model(xlnet)[0])
    assert "\n" not in str(refusal.value)


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "EmbeddingGemma's": lambda: [
        Dense(WIDTH, 64, bias=False, activation_function=nn.Identity()),
        Dense(64, 48, bias=False, activation_function=nn.Identity()),
        Normalize(),
    ],
    "normalised between": lambda: [Normalize(), Dense(WIDTH, 8), Normalize(), Normalize(), Dense(8, 12)],
    "residual": lambda: [Dense(WIDTH, WIDTH, use_residual=True), Dense(WIDTH, 8, use_residual=True)],
    "GELU": lambda: [Dense(WIDTH, 8, activation_function=nn.GELU())],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_dense_modules(chain: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = architecture(tmp_path, "BERT", tokenizer, *CHAINS[chain]())
    model = load_model(folder)[0]
    assert check_equal(folder).width == model.width == theirs(folder).shape[1]
    for kind in ("checkpoint", "export"):
        (tmp_path / kind).mkdir()
    save_model(tmp_path / "checkpoint", model, (folder / "tokenizer.json").read_text(), LIMIT)
    check_equal(tmp_path / "checkpoint", folder)
    export_model(tmp_path / "checkpoint", tmp_path / "export")
    np.testing.assert_allclose(theirs(tmp_path / "export"), theirs(folder), atol=1e-5)
    model.train()(pack([[5, 6, 7], [8]])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.projections.parameters())


def spoil_dense(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "2_Dense" / "config.json"
        write(path, **(json.loads(path.read_text()) | changes))

    return spoil


def without_safetensors(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (without_safetensors, r"found pytorch_model\.bin, but no model\.safetensors"),
    "cut": (lambda f: (f / "2_Dense" / "model.safetensors").write_bytes(b"cut"), "cannot read it"),
    "code of its own": (spoil_dense(activation_function="os.system"), r"found activation_function 'os\.system'"),
    "no activation": (
        spoil_dense(activation_function="torch.nn.Linear"),
        "found activation_function 'torch.nn.Linear'",
    ),
    "of tokens": (spoil_dense(module_input_name="token_embeddings"), "found 8 as out_features, sentence_.* and token_"),
    "no size": (spoil_dense(out_features="8"), "found '8' as out_features"),
    "another size": (spoil_dense(out_features=9), "asks for linear.weight of 9 x 32, linear.bias of 9"),
}


@pytest.mark.parametrize(("spoil", "words"), REFUSED.values(), ids=REFUSED)
def test_dense_modules_that_are_refused(
    spoil: Callable[[Path], Any], words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = architecture(tmp_path, "BERT", tokenizer, Dense(WIDTH, 8))
    spoil(folder)
    for read in (read_model_spec, load_model):
        with pytest.raises((OSError, ValueError), match=words) as refusal:
            read(folder)
        assert "\n" not in str(refusal.value)


def training(folder: Path, *overrides: str) -> Config:
    (folder.parent / "c.yaml").write_text("{}")
    given = [f"storage.root={folder.parent}", f"model.pretrained={folder}", f"tokenizer.max_length={LIMIT}", *overrides]
    return load(folder.parent / "c.yaml", given, environ={})


@pytest.mark.parametrize("name", ["MPNet", "EmbeddingGemma"])
def test_training_begins_with_what_the_folder_has(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its pooling, unless the config says another, and its Dense modules, all of which have gradients."""
    folder = architecture(tmp_path, name, tokenizer, Dense(WIDTH, 8), Normalize())
    config = training(folder, "objective.contrastive.weight=1", "objective.mlm.weight=1")
    check_model(config, tokenizer)
    learner = build_learner(config, tokenizer, negatives=False)
    assert ("; mpnet runs padded" in describe(learner)) == (name == "MPNet")
    batch = pack([[5, 6, 7, 8], [9, 10]])
    vectors = learner.eval().encode(batch)
    np.testing.assert_allclose(vectors.detach(), load_model(folder)[0](batch).detach(), atol=1e-6)
    learner.train().encode(batch).square().matmul(torch.linspace(1, 2, 8)).sum().backward()
    assert all(each.grad is not None for each in learner.model.parameters())
    assert build_learner(training(folder, "model.pooling=max"), tokenizer, negatives=False).model.head.pooling == "max"


def test_training_a_static_embedding(rows: np.ndarray, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "st", StaticEmbedding(Tokenizer.from_str(tokenizer.to_str()), rows), Normalize())
    config = training(folder, "objective.contrastive.weight=1", "objective.denoising.weight=1")
    check_model(config, tokenizer)
    with pytest.raises(ConfigError, match=r"model\.num_layers: found 2, but the model is a token table"):
        check_model(training(folder, "model.num_layers=2"), tokenizer)
    learner = build_learner(config, tokenizer, negatives=False)
    batch = pack([[5, 6, 7, 8], [9, 10]])
    vectors = torch.nn.functional.normalize(
        torch.stack([torch.from_numpy(rows[[5, 6, 7, 8]]).mean(0), torch.from_numpy(rows[[9, 10]]).mean(0)])
    )
    torch.testing.assert_close(learner.encode(batch), vectors, atol=1e-6, rtol=1e-6)
    learner.encode(batch).matmul(torch.linspace(1, 2, 14)).sum().backward()
    gradient = learner.model.token_table.weight.grad
    assert gradient is not None
    assert gradient[[5, 10]].abs().min() > 1e-6


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ALBERT", ["objective.mlm.weight=1"], "found a token table of width 16 and states of width 32"),
        ("ALBERT", ["objective.denoising.corruption=spans"], "a decoder needs model.tie_embeddings=false"),
        (
            "BERT",
            ["objective.denoising.weight=1"],
            "objective.denoising.corruption: found deletion, but .* to 8 numbers",
        ),
        ("BERT", ["model.matryoshka_dims=[8]"], "allowed are sizes below 8"),
        ("BERT", ["model.num_layers=3"], "model.num_layers: found 3; allowed are 1 to 2, the model's layers"),
        ("BERT", ["model.num_layers=0"], "model.num_layers: found 0; allowed are 1 to 2"),
        ("ALBERT", ["model.num_layers=1"], "model.num_layers: found 1, but a albert model's layers cannot"),
        ("MPNet", ["model.gradient_checkpointing=true"], "model.pretrained: found a mpnet model, which .* checkpoint"),
    ],
)
def test_what_cannot_be_trained(
    name: str, options: list[str], words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = architecture(tmp_path, name, tokenizer, Dense(WIDTH, 8))
    with pytest.raises(ConfigError, match=words) as refusal:
        check_model(training(folder, *options), tokenizer)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 14)).astype(np.float32) * 3


@pytest.mark.parametrize("further", ["", "Normalize", "Dense"])
def test_static_embeddings(further: str, rows: np.ndarray, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Without special tokens and without a limit; in numpy where nothing is projected."""
    modules = {"": [], "Normalize": [Normalize()], "Dense": [Dense(14, 8)]}[further]
    copy, texts = Tokenizer.from_str(tokenizer.to_str()), [text for text in TEXTS if text or further != "Dense"]
    folder = saved(tmp_path / "st", StaticEmbedding(copy, rows), *modules, prompts={"query": "find: "})
    encoder = check_equal(folder, texts=texts)
    assert isinstance(encoder.backend, TableBackend) == (further != "Dense")
    (tmp_path / "export").mkdir()
    export_model(folder, tmp_path / "export")
    assert isinstance(SentenceTransformer(str(tmp_path / "export"), device="cpu")[0], StaticEmbedding)
    np.testing.assert_allclose(theirs(tmp_path / "export", "query", texts), theirs(folder, "query", texts), atol=1e-5)
    check_equal(tmp_path / "export", texts=texts)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("modules", [False, True])
def test_model2vec(quantised: bool, modules: bool, rows: np.ndarray, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As model2vec saves a model: fewer rows than tokens with a mapping, and weights; with and without modules.json."""
    chance, tokens = np.random.default_rng(1), len(rows)
    tensors = {"embeddings": torch.from_numpy(rows)}
    if quantised:
        tensors["embeddings"] = torch.from_numpy(rows[:100]).half()
        tensors["mapping"] = torch.from_numpy(chance.integers(0, 100, tokens))
        tensors["weights"] = torch.from_numpy(chance.random(tokens).astype(np.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", model_type="model2vec", normalize=True)
    folded = tensors["embeddings"].float()[tensors["mapping"]] if quantised else tensors["embeddings"]
    expected = StaticEmbedding(
        Tokenizer.from_str(tokenizer.to_str()), folded * tensors.get("weights", torch.ones(tokens))[:, None]
    )
    oracle = saved(tmp_path / "oracle", expected, Normalize())
    if modules:
        types = ("StaticEmbedding", "."), ("Normalize", "1_Normalize")
        content = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in types]
        (tmp_path / "modules.json").write_text(json.dumps(content))
    encoder = check_equal(tmp_path, oracle)
    assert isinstance(encoder.backend, TableBackend)


def test_static_embeddings_that_are_refused(rows: np.ndarray, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "st", StaticEmbedding(Tokenizer.from_str(tokenizer.to_str()), rows))
    file = next(folder.rglob("model.safetensors"))
    save_file({"other": load_file(file)["embedding.weight"]}, file)
    with pytest.raises(ValueError, match=r"found no table embedding\.weight or embeddings"):
        load_model(folder)
    file.unlink()
    with pytest.raises(OSError, match=r"found no weights, but no model\.safetensors"):
        load_model(folder)


def test_a_causal_language_model_without_modules(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its vectors are the last tokens' states, as in sentence-transformers."""
    folder = transformers_folder(tmp_path, "Qwen3-Embedding", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", **(config | {"architectures": ["Qwen3ForCausalLM"]}))
    assert read_model_spec(folder).head.pooling == "last"
    vectors = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(TextEncoder(folder, device="cpu").encode(TEXTS), vectors, atol=1e-5)


@pytest.mark.parametrize("edges", [{"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": False}])
def test_tokens_that_the_tokenizers_config_adds(edges: dict[str, bool], tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = shutil.copytree(architecture(tmp_path, "e5-mistral", tokenizer), tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    write(path, **(json.loads(path.read_text()) | {"bos_token": "[CLS]", "eos_token": "[SEP]"} | edges))
    check_equal(folder)
