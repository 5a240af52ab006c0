"""Loads a tokenizer from a file, a folder or the hub, or trains one on the records.

    tokenizer = train_tokenizer(record_texts(files, ["text"], 64 << 20), kind="bpe", vocab_size=16_000, lowercase=True)
    framing(tokenizer).mask                                           # 4, the id of [MASK]

Training is deterministic for byte-level BPE, but not for WordPiece and Unigram (tokenizers 0.23). The trained file is
stored with the prepared data, so a resumed job reuses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.config import ConfigError
from pipeline.core.path import StoragePath
from pipeline.core.tokenizer_files import BYTE_LEVEL_SPLIT, encoding, parse_tokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
START_NAMES = ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>")
END_NAMES = ("[SEP]", "</s>", "<|end_of_text|>", "<eos>")
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")


def tokenizer_file(path: StoragePath) -> StoragePath:
    """Find the tokenizer.json at a path, in a pretrained tokenizer's folder, or in a hub repository."""
    if path.is_dir():
        return path / "tokenizer.json"
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return _from_hub(str(path))
    return path


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "tokenizer.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"tokenizer.load_path: found neither a folder {repository} nor a hub repository of that name with a "
            f"tokenizer.json ({reason}); give a tokenizer.json, or a pretrained tokenizer's folder or hub name"
        ) from None


def load_tokenizer(path: StoragePath) -> Tokenizer:
    """Read the tokenizer.json that `tokenizer_file` finds. Raises ConfigError if it is missing or broken."""
    file = tokenizer_file(path)
    try:
        tokenizer = parse_tokenizer(file.read_text("utf-8"), file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer.load_path: found no valid tokenizer at {file}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@lru_cache(maxsize=1)
def loaded_tokenizer(path: StoragePath, changed_ns: int) -> Tokenizer:
    """Cached, because tokenizers 0.23 leaks a few MB per released tokenizer."""
    return load_tokenizer(path)


def unknown_token_id(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token, or None if the vocabulary covers all text, as byte-level ones do."""
    model = json.loads(tokenizer.to_str())["model"] if isinstance(tokenizer.model, models.Unigram) else {}
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    return tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "[UNK]")


@dataclass(frozen=True)
class Framing:
    """Ids of special tokens: the first and last of a sequence, the mask, and the set of all."""

    start: int | None
    end: int | None
    mask: int | None
    special: frozenset[int]


def framing(tokenizer: Tokenizer) -> Framing:
    """Find a tokenizer's special tokens by what it adds to a text, else by their usual names."""
    special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    with encoding(tokenizer):
        framed = tokenizer.encode("a").ids

    def named(names: tuple[str, ...]) -> int | None:
        return next((id for name in names if (id := tokenizer.token_to_id(name)) is not None), None)

    return Framing(
        framed[0] if framed and framed[0] in special else named(START_NAMES),
        framed[-1] if framed and framed[-1] in special else named(END_NAMES),
        named(MASK_NAMES),
        special,
    )


def _byte_level() -> pre_tokenizers.PreTokenizer:
    """ByteLevel(add_prefix_space=True) with the pattern BYTE_LEVEL_SPLIT."""
    prefix_space = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="always", split=False)
    split = pre_tokenizers.Split(Regex(BYTE_LEVEL_SPLIT), "isolated")
    return pre_tokenizers.Sequence(
        [prefix_space, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def train_tokenizer(texts: Iterable[str], *, kind: str, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train a `bpe`, `wordpiece` or `unigram` vocabulary."""
    kinds: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
        "bpe": (
            models.BPE(),
            _byte_level(),
            decoders.ByteLevel(),
            trainers.BpeTrainer,
            {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()},
        ),
        "wordpiece": (
            models.WordPiece(unk_token="[UNK]"),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
            trainers.WordPieceTrainer,
            {},
        ),
        "unigram": (
            models.Unigram(),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
            trainers.UnigramTrainer,
            {"unk_token": "[UNK]"},
        ),
    }
    model, split, decoder, trainer, options = kinds[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoder
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    options |= {"vocab_size": vocab_size, "special_tokens": SPECIAL_TOKENS, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainer(**options))
    return tokenizer
