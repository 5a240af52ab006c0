"""A trained model as a folder that transformers and sentence-transformers load, with no code of ours.

    export_model(checkpoint, folder)
    SentenceTransformer(str(folder)).encode_query(["remove duplicate rows"])
    AutoModel.from_pretrained(folder)                # the token states, before pooling

Our own encoder takes the names and the config that transformers ships as EuroBERT, a pretrained one keeps its own. The
files are in the format that sentence-transformers has read since 2.2 and other servers of embeddings know; 6.2 writes
other names for the same modules and reads these.

    config.json model.safetensors tokenizer.json tokenizer_config.json
    modules.json config_sentence_transformers.json sentence_bert_config.json 1_Pooling/config.json 2_Normalize/

Before it returns, `export_model` loads the folder with transformers and compares: the model is in memory twice.
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

from pipeline.config import ConfigError
from pipeline.data.vocabulary import SPECIAL_TOKENS
from pipeline.model.card import Card
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import load_model
from pipeline.model.packing import Layout, pack
from pipeline.model.reading import read_card
from pipeline.runtime.outcome import JobError

POOLING_MODES = {  # ours → the key of 1_Pooling/config.json
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "weighted": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}
UNUSED_POOLING_MODES = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens")
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")
CHECKED_TEXTS, CHECKED_TOKENS = 32, 64
MIN_COSINE = 0.9999


def export_model(checkpoint: Path, folder: Path) -> float:
    """Write a model folder's content as others know it. Returns the smallest cosine of `check`.

    Raises ConfigError for what transformers has no model for, JobError where the export gives other vectors.
    """
    card, (model, tokenizer) = read_card(checkpoint), load_model(checkpoint)
    pad_id = pad_token_id(card, tokenizer)
    backbone: Any = model.backbone
    exported = backbone.model if card.architecture == "pretrained" else backbone
    if card.architecture == "pretrained":
        write_json(folder / "config.json", pretrained_config(card, type(exported).__name__))
    else:
        write_json(folder / "config.json", eurobert_config(card, tokenizer, pad_id))
    state = {name: tensor.contiguous() for name, tensor in exported.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # NOTE: safetensors gives the file to its owner alone, and an export is for others.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    whole = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    whole.no_padding()
    whole.no_truncation()  # tokenizer_config.json says where to cut
    whole.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(card, tokenizer, pad_id))
    _write_modules(card, folder, "add_pooling_layer" in signature(type(exported)).parameters)
    return check(model, tokenizer, folder)


def quiet_transformers() -> None:
    """The export checks itself what transformers would have to tell of loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def pretrained_config(card: Card, model_class: str) -> dict[str, Any]:
    """The encoder's own config, without pointers to code of its own; `model_class` is what its weights are of."""
    from transformers import __version__

    own = {key: value for key, value in card.shape.items() if key != "auto_map"}
    return {**own, "architectures": [model_class], "transformers_version": __version__}


def eurobert_config(card: Card, tokenizer: Tokenizer, pad_id: int) -> dict[str, Any]:
    """Our encoder's shape in EuroBERT's terms. Raises ConfigError for learned positions, which it does not have."""
    from transformers import EuroBertConfig

    shape, mask_id = card.shape, tokenizer.token_to_id("[MASK]")
    if shape.get("positions", "rotary") != "rotary":
        raise ConfigError(f"model.positions: found {shape['positions']}; export needs model.positions=rotary")
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
        max_position_embeddings=card.max_length,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=pad_id if mask_id is None else int(mask_id),
        use_cache=False,
    )
    return json.loads(config.to_json_string(use_diff=False))


def pad_token_id(card: Card, tokenizer: Tokenizer) -> int:
    """A special token to pad with: the config's own, else one by name, else the first; which one changes no vector.

    Raises ConfigError where the tokenizer has none: a word that is declared special would be split off in texts.
    """
    special = special_tokens(tokenizer)
    if not special:
        raise ConfigError("the tokenizer has no special token to pad with; export needs one, such as [PAD]")
    own = [token_id for token_id in special.values() if token_id == card.shape.get("pad_token_id")]
    by_name = [special[name] for name in PAD_TOKENS if name in special]
    return [*own, *by_name, *special.values()][0]


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens and their ids, lowest first."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {token.content: token_id for token_id, token in added if token.special}


def tokenizer_config(card: Card, tokenizer: Tokenizer, pad_id: int) -> dict[str, Any]:
    """What makes AutoTokenizer give our ids: tokenizer.json as it is, cut at the model's length.

    NOTE: `PreTrainedTokenizerFast` reads tokenizer.json; classes named after models build some of it anew.
    """
    special = special_tokens(tokenizer)
    named = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL_TOKENS if name in special}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "pad_token": tokenizer.id_to_token(pad_id),
        "model_max_length": card.max_length,
        "padding_side": "right",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _write_modules(card: Card, folder: Path, may_have_pooler: bool) -> None:
    """What sentence-transformers reads beside the model of transformers.

    `may_have_pooler`: the class has a pooling layer of its own unless it is told not to. We leave it out, and untold it
    would be made anew, at random and to no effect, under a warning.
    """
    head = card.head
    names = ["Transformer", "Pooling", *(["Normalize"] if head.normalize else [])]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    loading = {"max_seq_length": card.max_length, "do_lower_case": False}
    without_pooler = {"model_args": {"add_pooling_layer": False}} if may_have_pooler else {}
    write_json(folder / "sentence_bert_config.json", {**loading, **without_pooler})
    prompts = {name: head.prompt(name) for name in ("query", "document")}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings)
    modes = dict.fromkeys(UNUSED_POOLING_MODES, False)
    modes |= {key: head.pooling == name for name, key in POOLING_MODES.items()}
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": card.width, **modes, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    if head.normalize:
        (folder / "2_Normalize").mkdir()
        write_json(folder / "2_Normalize" / "config.json", {})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def check(model: EmbeddingModel, tokenizer: Tokenizer, folder: Path) -> float:
    """The smallest cosine between our vectors and those from the folder, over texts of random tokens.

    Raises JobError where ids differ or a vector is further off than MIN_COSINE.
    """
    from transformers import AutoModel, AutoTokenizer

    texts = random_texts(tokenizer)
    sequences = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    their_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if their_tokenizer(texts, truncation=True)["input_ids"] != sequences:
        raise JobError("the exported tokenizer gives other ids than the model's own; this is a fault of the export")
    theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = their_tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    states_TD = theirs(**batch).last_hidden_state[batch["attention_mask"].bool()]
    packed = pack(sequences)
    cosine = float(F.cosine_similarity(model(packed), model.pooled(states_TD, Layout.of(packed))).min())
    if not cosine >= MIN_COSINE:
        raise JobError(
            f"an exported vector is at cosine {cosine:.6f} to the model's own; this is a fault of the export"
        )
    return cosine


def random_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of one to CHECKED_TOKENS tokens or so, always the same, without those that have none."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, CHECKED_TOKENS, (CHECKED_TEXTS,), generator=chance).tolist()
    size = tokenizer.get_vocab_size()
    texts = tokenizer.decode_batch([torch.randint(size, (n,), generator=chance).tolist() for n in lengths])
    return [text for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True) if encoding.ids]
