"""Exports our models as a folder that transformers and sentence-transformers load.

    export_model(checkpoint, folder)                       # our encoder becomes EuroBERT; pretrained ones do not change
    SentenceTransformer(str(folder)).encode_query(["remove duplicate rows"])
    AutoModel.from_pretrained(folder)                      # the token states, before pooling

    config.json model.safetensors tokenizer.json tokenizer_config.json         transformers: mean pooling, unit length
    modules.json config_sentence_transformers.json 1_Pooling/config.json       sentence-transformers: as configured
    sentence_bert_config.json 2_Dense/ 3_Normalize/
    0_StaticEmbedding/                         a token table whose vectors are means: what modules.json then names first

Exports use the format that sentence-transformers has read since 2.2, and other embedding servers read too; 6.2 writes
other names for the same modules but still reads these. `export_model` loads the export with transformers and compares
the vectors before it returns, so the model is in memory twice.
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.core.tokenizer_files import encoding
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import ModelSpec, load_model, read_model_spec, unshared
from pipeline.model.hf_io import FLAGS, POOLINGS, PROMPTS
from pipeline.model.packing import Layout, pack

NAMED_TOKENS = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")
CHECKED_TEXTS, CHECKED_TOKENS = 32, 64
MIN_COSINE = 0.9999


def export_model(checkpoint: Path, folder: Path) -> float:
    """Export a model into a folder. Returns the smallest cosine between the export's vectors and the model's.

    Raises ConfigError if transformers has no such architecture, RuntimeError if the vectors differ.
    """
    spec, (model, tokenizer) = read_model_spec(checkpoint), load_model(checkpoint)
    pad_id = pad_token_id(spec, tokenizer)
    exported: Any = model.backbone.model if spec.architecture == "pretrained" else model.backbone
    if spec.architecture == "pretrained":
        from transformers import __version__

        config = {**spec.shape, "architectures": [type(exported).__name__], "transformers_version": __version__}
    else:
        config = eurobert_config(spec, tokenizer, pad_id)
    _write(folder / "config.json", config)
    _save(exported.state_dict(), folder, like=folder / "config.json")
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()  # tokenizer_config.json has the limit
    whole.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(spec, tokenizer, pad_id))
    is_static = is_static_embedding(spec, tokenizer)
    _write_modules(spec, model, folder, is_static=is_static)
    if is_static:
        _write_static(model, tokenizer, folder / "0_StaticEmbedding")
    return _smallest_cosine(model, tokenizer, folder)


def _save(state: dict[str, Tensor], folder: Path, like: Path) -> None:
    save_file(unshared(state), folder / "model.safetensors", metadata={"format": "pt"})
    # NOTE: safetensors makes the file readable only by its owner, but exports are for others.
    (folder / "model.safetensors").chmod(like.stat().st_mode)


def is_static_embedding(spec: ModelSpec, tokenizer: Tokenizer) -> bool:
    """Whether sentence-transformers' StaticEmbedding gives the same vectors: it takes means, without special tokens."""
    with encoding(tokenizer):
        adds_tokens = bool(tokenizer.encode("").ids)
    has_layers = spec.architecture != "unified" or spec.shape["num_layers"] or spec.shape["positions"] != "rotary"
    return not has_layers and spec.head.pooling == "mean" and not adds_tokens


def eurobert_config(spec: ModelSpec, tokenizer: Tokenizer, pad_id: int) -> dict[str, Any]:
    """Our encoder's shape as a EuroBERT config. Raises ConfigError for learned positions, which EuroBERT lacks."""
    from transformers import EuroBertConfig

    shape, mask_id = spec.shape, tokenizer.token_to_id("[MASK]")
    if shape.get("positions", "rotary") != "rotary":
        raise ConfigError(f"model.positions: found {shape['positions']}; exports need model.positions=rotary")
    config = EuroBertConfig(
        architectures=["EuroBertModel"],
        dtype="float32",
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape.get("num_kv_heads") or shape["num_heads"],
        hidden_act="gelu",
        rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        max_position_embeddings=spec.max_length,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=pad_id if mask_id is None else int(mask_id),
        use_cache=False,
    )
    return json.loads(config.to_json_string(use_diff=False))


def pad_token_id(spec: ModelSpec, tokenizer: Tokenizer) -> int:
    """A special token to pad with: the config's, else one by name, else the first. All give the same vectors.

    Raises ConfigError if the tokenizer has none: an ordinary word made special would be tokenized differently.
    """
    special = _special_tokens(tokenizer)
    if not special:
        raise ConfigError("found no special token to pad with; exports need a tokenizer that has one, such as [PAD]")
    own = [token_id for token_id in special.values() if token_id == spec.shape.get("pad_token_id")]
    by_name = [special[name] for name in PAD_TOKENS if name in special]
    return [*own, *by_name, *special.values()][0]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens and their ids, by ascending id."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {token.content: token_id for token_id, token in added if token.special}


def _tokenizer_config(spec: ModelSpec, tokenizer: Tokenizer, pad_id: int) -> dict[str, Any]:
    """Settings that make AutoTokenizer use tokenizer.json unchanged, truncating at the model's length.

    NOTE: `PreTrainedTokenizerFast` reads tokenizer.json as it is; model-specific classes rebuild parts of it.
    """
    special = _special_tokens(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: token for role, token in NAMED_TOKENS.items() if token in special},
        "pad_token": tokenizer.id_to_token(pad_id),
        "model_max_length": spec.max_length,
        "padding_side": "right",
        "truncation_side": tokenizer.truncation["direction"] if tokenizer.truncation else "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _write_modules(spec: ModelSpec, model: EmbeddingModel, folder: Path, *, is_static: bool) -> None:
    """Write sentence-transformers' files."""
    head, names = spec.head, ["StaticEmbedding"] if is_static else ["Transformer", "Pooling"]
    for i, dense in enumerate(model.projections):
        names += [*(["Normalize"] if head.projections[i].unit_input else []), "Dense"]
        _write_dense(dense, folder / f"{len(names) - 1}_Dense")
    names += ["Normalize"] if head.normalize else []
    paths = ["" if name == "Transformer" else f"{i}_{name}" for i, name in enumerate(names)]
    for path in paths:
        if path.endswith("_Normalize"):
            _write(folder / path / "config.json", {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    _write(folder / "modules.json", modules)
    # A class that adds a pooling layer by default would have it unused and random.
    exported = model.backbone.model if spec.architecture == "pretrained" else model.backbone
    has_pooler = "add_pooling_layer" in signature(type(exported)).parameters
    without_pooler = {"model_args": {"add_pooling_layer": False}} if has_pooler else {}
    loading = {"max_seq_length": spec.max_length, "do_lower_case": False, **without_pooler}
    _write(folder / "sentence_bert_config.json", loading)
    prompts = {name: head.prompt(name) for name in PROMPTS}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", settings)
    modes = {flag: POOLINGS.get(mode) == head.pooling for flag, mode in FLAGS.items()}
    pooling = {"word_embedding_dimension": int(model.backbone.width), **modes, "include_prompt": True}  # type: ignore[arg-type]
    _write(folder / "1_Pooling" / "config.json", pooling)


def _write_dense(dense: Any, folder: Path) -> None:
    shape, linear, activation = dense.shape, dense.linear, type(dense.activation)
    content = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": shape.bias,
        "activation_function": f"{activation.__module__}.{activation.__name__}",
        **({"use_residual": True} if shape.residual else {}),
    }
    _write(folder / "config.json", content)
    _save(dense.state_dict(), folder, like=folder / "config.json")


@torch.inference_mode()
def _write_static(model: EmbeddingModel, tokenizer: Tokenizer, folder: Path) -> None:
    """The normalised rows of a token table, and a tokenizer that truncates, because the module itself does not."""
    backbone: Any = model.backbone
    rows_VD = backbone.norm(backbone.token_table.weight)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    _save({"embedding.weight": rows_VD}, folder, like=folder.parent / "config.json")


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def _smallest_cosine(model: EmbeddingModel, tokenizer: Tokenizer, folder: Path) -> float:
    """The smallest cosine between our vectors and the export's, on random texts. Raises RuntimeError if too small."""
    from transformers import AutoTokenizer

    from pipeline.model.pretrained import open_exported

    texts = _random_texts(tokenizer)
    with encoding(tokenizer):
        sequences = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
    their_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if their_tokenizer(texts, truncation=True)["input_ids"] != sequences:
        raise RuntimeError("the exported tokenizer gives different ids than the model's own; please report this bug")
    theirs = open_exported(folder)
    batch = their_tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    states_TD = theirs(**batch).last_hidden_state[batch["attention_mask"].bool()]
    packed = pack(sequences)
    cosine = float(F.cosine_similarity(model(packed), model.pooled(states_TD, Layout.of(packed))).min())
    if not cosine >= MIN_COSINE:
        raise RuntimeError(
            f"found cosine {cosine:.6f} between an exported vector and the model's own; please report this bug"
        )
    return cosine


def _random_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of about 1 to CHECKED_TOKENS random tokens, the same on every call, without empty ones."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, CHECKED_TOKENS, (CHECKED_TEXTS,), generator=chance).tolist()
    size = tokenizer.get_vocab_size()
    texts = tokenizer.decode_batch([torch.randint(size, (n,), generator=chance).tolist() for n in lengths])
    with encoding(tokenizer):
        return [text for text, encoded in zip(texts, tokenizer.encode_batch(texts), strict=True) if encoded.ids]
