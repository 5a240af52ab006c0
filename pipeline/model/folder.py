"""A model on disk: `model.safetensors`, `model.json` (what it is), `tokenizer.json`. No pickle.

save_model(folder, model, tokenizer_json, max_length)
model, tokenizer = load_model(folder)

What is known without loading the weights is said by model/reading.py. A folder without model.json is read as one of
transformers or sentence-transformers (model/hf_io.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import init
from torch.overrides import TorchFunctionMode

from pipeline.model.card import Card
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.reading import is_ours, load_tokenizer, read_card
from pipeline.model.transformer import Encoder, EncoderShape

RANDOM = (init.normal_, init.uniform_, init.kaiming_uniform_)  # what embeddings and linear layers begin with


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


def load_model(folder: Path) -> tuple[EmbeddingModel, Tokenizer]:
    """The model in evaluation mode, and its tokenizer set to cut at `max_length`. Raises OSError or ValueError."""
    if not is_ours(folder):
        from pipeline.model.hf_io import load_elsewhere

        return load_elsewhere(folder)
    card = read_card(folder)
    model = EmbeddingModel(_backbone(card), card.head)
    model.backbone.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model.eval(), load_tokenizer(folder)


def _backbone(card: Card) -> torch.nn.Module:
    """Its parameters are not set: they wait for a state dict."""
    if card.architecture == "unified":
        with torch.device("meta"), _Unset():
            return Encoder(EncoderShape(**card.shape))
    if card.architecture == "pretrained":
        from pipeline.model.pretrained import PretrainedEncoder  # imports transformers, which takes seconds

        return PretrainedEncoder.from_description(card.shape)
    raise ValueError(f"architecture {card.architecture!r} is not known")


class _Unset(TorchFunctionMode):
    """Parameters get no random numbers: on the meta device torch would load its compiler for them, for two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func in RANDOM else func(*args, **(kwargs or {}))
