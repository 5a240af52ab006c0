"""A model on disk: `model.safetensors`, `model.json` (what it is), `tokenizer.json`. No pickle.

save_model(folder, model, tokenizer_json, max_length)
model, tokenizer = load_model(folder)
model_fingerprint(folder)                     # '9f0c…': names the vectors that this model gives
read_card(folder).head.prompt("query")        # what is known without loading the weights

A folder without model.json is read as one of transformers or sentence-transformers (model/elsewhere.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pipeline.model.card import Card
from pipeline.model.embedding_model import EmbeddingModel, Head
from pipeline.model.transformer import Encoder, EncoderShape

FILES = ("model.safetensors", "model.json", "tokenizer.json")


def save_model(folder: Path, model: EmbeddingModel, tokenizer_json: str, max_length: int) -> None:
    """Write the three files. `max_length` is in tokens."""
    backbone: Any = model.backbone
    state = {name: tensor.detach().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    save_card(folder, model, tokenizer_json, max_length)


def save_card(folder: Path, model: EmbeddingModel, tokenizer_json: str, max_length: int) -> None:
    """Write what a model folder has beside the weights."""
    backbone: Any = model.backbone
    card = Card(backbone.architecture, backbone.describe(), model.head, model.width, max_length)
    (folder / "model.json").write_text(json.dumps(asdict(card), indent=2, sort_keys=True))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether `save_model` wrote the folder."""
    return (folder / "model.json").is_file()


def read_card(folder: Path) -> Card:
    """Raises OSError or ValueError where the folder holds no model that we know."""
    if not is_ours(folder):
        from pipeline.model.elsewhere import read_elsewhere

        return read_elsewhere(folder)
    try:
        content = json.loads((folder / "model.json").read_text())
        head = content["head"]
        head["dimensions"] = tuple(head["dimensions"])
        head["prompts"] = tuple((name, prompt) for name, prompt in head["prompts"])
        return Card(**content | {"head": Head(**head)})
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{folder / 'model.json'} does not describe a model of this version") from None


def load_model(folder: Path) -> tuple[EmbeddingModel, Tokenizer]:
    """The model in evaluation mode, and its tokenizer set to cut at `max_length`. Raises OSError or ValueError."""
    if not is_ours(folder):
        from pipeline.model.elsewhere import load_elsewhere

        return load_elsewhere(folder)
    card = read_card(folder)
    model = EmbeddingModel(_backbone(card), card.head)
    model.backbone.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """A model's tokenizer, set to cut at `max_length`. Raises OSError or ValueError."""
    if not is_ours(folder):
        from pipeline.model.elsewhere import tokenizer_elsewhere

        return tokenizer_elsewhere(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(read_card(folder).max_length)
    return tokenizer


def _backbone(card: Card) -> torch.nn.Module:
    """Its parameters are not set: they wait for a state dict."""
    if card.architecture == "unified":
        with torch.device("meta"):
            return Encoder(EncoderShape(**card.shape))
    if card.architecture == "pretrained":
        from pipeline.model.pretrained import PretrainedEncoder  # imports transformers, which takes seconds

        return PretrainedEncoder.from_description(card.shape)
    raise ValueError(f"architecture {card.architecture!r} is not known")


def model_fingerprint(folder: Path) -> str:
    """xxh3-128 of the files that a model is read from: equal fingerprints give equal vectors."""
    digest = xxhash.xxh3_128()
    for name in model_files(folder):
        digest.update(name.encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def model_files(folder: Path) -> Iterable[str]:
    """The files that a model is read from, relative to its folder."""
    if is_ours(folder):
        return FILES
    from pipeline.model.elsewhere import files_elsewhere

    return files_elsewhere(folder)
