"""The tokenizer: one that is there, or one trained on the records.

Byte-level BPE trains to the same file every time; WordPiece and Unigram do not (tokenizers 0.23). Whichever it is, the
file is an input from then on, kept with the prepared data and never trained again on resume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.config import ConfigError
from pipeline.storage.object_store import BucketError
from pipeline.storage.path import StoragePath

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
START_NAMES = ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>")
END_NAMES = ("[SEP]", "</s>", "<|end_of_text|>", "<eos>")
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")


def tokenizer_file(path: StoragePath) -> StoragePath:
    """The tokenizer.json that a path stands for: itself, a pretrained tokenizer folder's, or a hub repository's."""
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
            f"tokenizer.load_path: found neither a folder {repository} nor a tokenizer.json on the hub under that name "
            f"({reason}); allowed is a tokenizer.json, or a pretrained tokenizer's folder or hub name"
        ) from None


def load_tokenizer(path: StoragePath) -> Tokenizer:
    """Read a tokenizer.json or a pretrained tokenizer's folder. Raises ConfigError where it is none."""
    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
    except BucketError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a missing or broken file alike
        raise ConfigError(f"tokenizer.load_path: {file} is no tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@lru_cache(maxsize=1)
def loaded_tokenizer(path: StoragePath, changed_ns: int) -> Tokenizer:
    """The same object again for the same file: of each one that is dropped, tokenizers 0.23 keeps some MB."""
    return load_tokenizer(path)


def unknown_token_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what is not in the vocabulary; None where everything is, as in bytes."""
    model = json.loads(tokenizer.to_str())["model"] if isinstance(tokenizer.model, models.Unigram) else {}
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    return tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "[UNK]")


@dataclass(frozen=True)
class Framing:
    """Token ids that are no text: what sequences begin and end with, what hides a token, and all of their kind."""

    start: int | None
    end: int | None
    mask: int | None
    special: frozenset[int]


def framing(tokenizer: Tokenizer) -> Framing:
    """A tokenizer's special tokens, by what it puts round a text, else by their usual names."""
    special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    framed = tokenizer.encode("a").ids

    def named(names: tuple[str, ...]) -> int | None:
        return next((id for name in names if (id := tokenizer.token_to_id(name)) is not None), None)

    return Framing(
        framed[0] if framed and framed[0] in special else named(START_NAMES),
        framed[-1] if framed and framed[-1] in special else named(END_NAMES),
        named(MASK_NAMES),
        special,
    )


def train_tokenizer(texts: Iterable[str], *, kind: str, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train a `bpe`, `wordpiece` or `unigram` vocabulary."""
    makers = {"bpe": _byte_level_bpe, "wordpiece": _wordpiece, "unigram": _unigram}
    tokenizer, trainer = makers[kind](vocab_size)
    steps = [normalizers.NFC(), normalizers.Lowercase()] if lowercase else [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level_bpe(vocab_size: int) -> tuple[Tokenizer, trainers.BpeTrainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _wordpiece(vocab_size: int) -> tuple[Tokenizer, trainers.WordPieceTrainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False
    )


def _unigram(vocab_size: int) -> tuple[Tokenizer, trainers.UnigramTrainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, unk_token="[UNK]", show_progress=False
    )
