"""A model's folder without its weights, and without torch: what it is, its tokenizer, its fingerprint.

read_card(folder).head.prompt("query")
load_tokenizer(folder)
model_fingerprint(folder)                     # '9f0c…': names the vectors that this model gives

A folder without model.json is read as one of transformers or sentence-transformers (model/hf_io.py, with torch).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import xxhash
from tokenizers import Tokenizer

from pipeline.model.card import Card, Head

FILES = ("model.safetensors", "model.json", "tokenizer.json")


def is_ours(folder: Path) -> bool:
    """Whether `save_model` wrote the folder."""
    return (folder / "model.json").is_file()


def read_card(folder: Path) -> Card:
    """Raises OSError or ValueError where the folder holds no model that we know."""
    if not is_ours(folder):
        from pipeline.model.hf_io import read_elsewhere

        return read_elsewhere(folder)
    try:
        content = json.loads((folder / "model.json").read_text())
        head = content["head"]
        head["dimensions"] = tuple(head["dimensions"])
        head["prompts"] = tuple((name, prompt) for name, prompt in head["prompts"])
        return Card(**content | {"head": Head(**head)})
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{folder / 'model.json'} does not describe a model of this version") from None


def is_table(card: Card) -> bool:
    """Whether states are rows of a token table, whatever the position: no layers, and no learned positions."""
    return card.architecture == "unified" and not card.shape["num_layers"] and card.shape["positions"] == "rotary"


def load_tokenizer(folder: Path) -> Tokenizer:
    """A model's tokenizer, set to cut at `max_length`. Raises OSError or ValueError."""
    if not is_ours(folder):
        from pipeline.model.hf_io import tokenizer_elsewhere

        return tokenizer_elsewhere(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(read_card(folder).max_length)
    return tokenizer


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
    from pipeline.model.hf_io import files_elsewhere

    return files_elsewhere(folder)
