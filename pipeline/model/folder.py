"""A model on disk: `model.safetensors`, `model.json` (its shape), `tokenizer.json`. No pickle.

save_encoder(folder, encoder, tokenizer_json, max_length)
encoder, tokenizer = load_encoder(folder)
model_fingerprint(folder)                     # '9f0c…': names the vectors that this model gives
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import xxhash
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pipeline.model.transformer import Encoder, EncoderShape

FILES = ("model.safetensors", "model.json", "tokenizer.json")


def save_encoder(folder: Path, encoder: Encoder, tokenizer_json: str, max_length: int) -> None:
    """Write the three files. `max_length` is in tokens; longer texts are cut."""
    state = {name: tensor.detach().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    description = {"architecture": "unified-encoder", "max_length": max_length, **asdict(encoder.shape)}
    (folder / "model.json").write_text(json.dumps(description, indent=2, sort_keys=True))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")


def load_encoder(folder: Path) -> tuple[Encoder, Tokenizer]:
    """The encoder in evaluation mode, and its tokenizer set to cut at `max_length`. Raises OSError or ValueError."""
    description = json.loads((folder / "model.json").read_text())
    max_length = description.pop("max_length")
    description.pop("architecture")
    encoder = Encoder(EncoderShape(**description))
    encoder.load_state_dict(load_file(folder / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    return encoder.eval(), tokenizer


def model_fingerprint(folder: Path) -> str:
    """xxh3-128 of the model's files: equal fingerprints give equal vectors."""
    digest = xxhash.xxh3_128()
    for name in FILES:
        digest.update(name.encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def model_width(folder: Path) -> int:
    """Numbers in each of the model's vectors."""
    return int(json.loads((folder / "model.json").read_text())["d_model"])
