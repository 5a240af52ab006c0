"""Encoders that others made, as they come: a folder of transformers or of sentence-transformers, read without training.

    model, tokenizer = load_elsewhere(Path("all-MiniLM-L6-v2"))
    read_elsewhere(Path("all-MiniLM-L6-v2")).head            # Head(pooling='mean', normalize=True, …)
    files_elsewhere(Path("all-MiniLM-L6-v2"))                # ['1_Pooling/config.json', 'config.json', …]

    config.json model.safetensors tokenizer.json tokenizer_config.json         transformers: mean of states, unit length
    modules.json config_sentence_transformers.json 1_Pooling/config.json       sentence-transformers: what these say
    sentence_bert_config.json

Vectors are those that sentence-transformers gives; what we have no module for is refused. JSON and safetensors are all
that is read, and no code. Reading the card imports transformers, which takes seconds, and loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, normalizers

from pipeline.model.card import Card, Head, Pooling
from pipeline.model.embedding_model import EmbeddingModel

if TYPE_CHECKING:
    from pipeline.model.pretrained import PretrainedEncoder

POOLINGS: dict[str, Pooling] = {"cls": "cls", "lasttoken": "last", "mean": "mean", "weightedmean": "weighted"}
FLAGS = {  # of a 1_Pooling/config.json before sentence-transformers 6 → its `pooling_mode` since
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# NOTE: sentence-transformers documents these names for documents, in this order, but takes an empty `document` to be
# there where a file has none (6.2), and so never comes to the others.
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


@dataclass(frozen=True)
class Parts:
    """Where a folder's parts lie."""

    encoder: Path  # the folder with config.json, weights and tokenizer
    pooling: Path | None  # the folder of the Pooling module; None in a folder of transformers
    normalize: bool


def read_elsewhere(folder: Path) -> Card:
    """What is known without the weights. Raises as `load_elsewhere` does, but for what is wrong with the weights."""
    from pipeline.model.pretrained import shape_of

    return _read(folder, shape_of)[0]


def load_elsewhere(folder: Path) -> tuple[EmbeddingModel, Tokenizer]:
    """The model in evaluation mode, and its tokenizer set to cut at the card's `max_length`.

    Raises OSError where a file is missing or cannot be read, ValueError for what we have no module for.
    """
    from pipeline.model.pretrained import load_pretrained

    card, backbone, tokenizer = _read(folder, load_pretrained)
    return EmbeddingModel(backbone, card.head).eval(), tokenizer


def tokenizer_elsewhere(folder: Path) -> Tokenizer:
    """The tokenizer alone. Raises as `read_elsewhere` does."""
    from pipeline.model.pretrained import shape_of

    return _read(folder, shape_of)[2]


def files_elsewhere(folder: Path) -> list[str]:
    """The files that decide the vectors, relative to the folder, sorted. Raises as `read_elsewhere` does."""
    parts = parts_of(folder)
    candidates = [folder / "modules.json", folder / "config_sentence_transformers.json"]
    candidates += [parts.pooling / "config.json"] if parts.pooling else []
    candidates += [parts.encoder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    for pattern in ("sentence_*_config.json", "model*.safetensors*"):
        candidates += parts.encoder.glob(pattern)
    return sorted(path.relative_to(folder).as_posix() for path in candidates if path.is_file())


def parts_of(folder: Path) -> Parts:
    """Raises OSError where there is no model, ValueError for modules that we do not have."""
    path = folder / "modules.json"
    if not path.is_file():
        if not (folder / "config.json").is_file():
            raise OSError(
                f"{folder}: found no model.json, modules.json or config.json; give the folder of a checkpoint, or of a "
                "model of sentence-transformers or transformers"
            )
        return Parts(folder, None, normalize=True)
    try:
        modules = [(str(module["type"]), folder / module["path"]) for module in _json(path)]
    except (TypeError, KeyError):
        raise ValueError(f"{path}: found no list of modules with type and path; give a model saved whole") from None
    # Only the library's own are known by their last name: a module of a folder's own code may have any.
    names = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name, _ in modules]
    if names not in MODULES:
        raise ValueError(
            f"{path}: found {', '.join(names) or 'no module'}; allowed are Transformer and Pooling of "
            "sentence-transformers, and Normalize after them"
        )
    return Parts(modules[0][1], modules[1][1], normalize=len(modules) == 3)


def _read(folder: Path, load: Callable[[Path], PretrainedEncoder]) -> tuple[Card, PretrainedEncoder, Tokenizer]:
    """The small files come first: a folder is refused before its weights are read."""
    parts = parts_of(folder)
    head, tokenizer = _head(folder, parts), _tokenizer(parts.encoder)
    backbone = load(parts.encoder)
    rows, tokens = len(backbone.token_table.weight), tokenizer.get_vocab_size()
    if tokens > rows:
        raise ValueError(
            f"{parts.encoder}: found {tokens:,} tokens in tokenizer.json, and {rows:,} rows in the token table; give a "
            "model with its own tokenizer"
        )
    max_length = _max_length(parts.encoder, backbone.max_positions)
    side = _settings(parts.encoder / "tokenizer_config.json").get("truncation_side", "right")
    tokenizer.enable_truncation(max_length, direction=side)
    return Card("pretrained", backbone.describe(), head, backbone.width, max_length), backbone, tokenizer


def _head(folder: Path, parts: Parts) -> Head:
    if parts.pooling is None:
        return Head()
    content = _settings(parts.pooling / "config.json")
    prompts = _prompts(folder / "config_sentence_transformers.json")
    if prompts and not content.get("include_prompt", True):
        raise ValueError(
            f"{parts.pooling / 'config.json'}: found include_prompt false; allowed with prompts is true, for we pool "
            "them with the text"
        )
    return Head(_pooling(content, parts.pooling / "config.json"), parts.normalize, prompts=prompts)


def _pooling(content: dict[str, Any], path: Path) -> Pooling:
    modes = content.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if content.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{path}: found pooling by {' and '.join(map(str, modes))}; allowed is one of {', '.join(POOLINGS)}"
        )
    return POOLINGS[modes[0]]


def _prompts(path: Path) -> tuple[tuple[str, str], ...]:
    """What queries and documents are led by, where it is something."""
    there = _settings(path).get("prompts") or {}
    found = {ours: next((there[name] for name in names if there.get(name)), "") for ours, names in PROMPTS.items()}
    return tuple((ours, prompt) for ours, prompt in found.items() if prompt)


def _max_length(encoder: Path, positions: int) -> int:
    """Tokens: sentence-transformers' own limit, else the tokenizer's, and never more than the model has positions."""
    own = [_settings(path).get("max_seq_length") for path in sorted(encoder.glob("sentence_*_config.json"))]
    limits = [*own, _settings(encoder / "tokenizer_config.json").get("model_max_length"), positions]
    return min(int(next(limit for limit in limits if limit)), positions)


def _tokenizer(encoder: Path) -> Tokenizer:
    path = encoder / "tokenizer.json"
    if not path.is_file():
        raise OSError(f"{encoder}: found no tokenizer.json; give a model saved with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: found no tokenizer ({error}); give a model saved whole") from None
    tokenizer.no_padding()
    if any(_settings(path).get("do_lower_case") for path in encoder.glob("sentence_*_config.json")):
        steps = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _settings(path: Path) -> dict[str, Any]:
    """A file's mapping; empty where there is no such file."""
    content = _json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON ({error}); give a model saved whole") from None
