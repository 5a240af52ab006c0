"""What an encoder is made from, and texts as it takes them.

    tokenize(recipe.tokenizer(), ["remove duplicate rows", "parse"])     # [[5, 6, 7], [8]], Arrow's list<int32>

Without torch, which is not for tasks that only read and tokenize: it would take each of their processes seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer

from pipeline.config import Embedding
from pipeline.embedding.columns import Column, as_groups, as_tokens
from pipeline.model.folder import is_table, load_tokenizer, model_fingerprint, read_card
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath

CHARS_PER_TOKEN = 8  # ours: English has about 5; a text with more is tokenized twice
WORD_END = re.compile(r"(?<=\w) ")
# Steps of tokenizers that look at a letter or digit and the space after it alone, or at most at what is on one side.
NORMALIZERS = (
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Strip",
    "StripAccents",
)
REPLACED = ({"Regex": " {2,}"}, {"String": "``"}, {"String": "''"})  # by Unigram models
WORD_SPLITS = ("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit")
SPLITS = ("Digits", "Punctuation")


@dataclass(frozen=True)
class EncoderRecipe:
    """What an encoder is made from, wherever it is to run."""

    folder: StoragePath
    settings: Embedding
    graphs: StoragePath
    """Where onnxruntime's graphs lie."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of nodes that encoding actors go to; by default all of them."""

    @property
    def local(self) -> Path:
        """The model's folder on this machine."""
        return fetched(self.folder)

    @cached_property
    def width(self) -> int:
        return self.settings.dimensions or read_card(self.local).width

    @cached_property
    def is_table(self) -> bool:
        """Whether the model is a token table, which numpy looks up."""
        return is_table(read_card(self.local)) and self.settings.backend == "torch"

    @property
    def overlap(self) -> int | None:
        return None if self.settings.long_texts == "cut" else self.settings.window_overlap

    def tokenizer(self) -> Tokenizer:
        """Kept in its process: tokenizers does not give back the memory of one that is dropped."""
        return _tokenizer(self.folder, self.overlap)

    @cached_property
    def space(self) -> str:
        """Names the vectors: what is equal in it has equal vectors for equal texts, and other names have others."""
        settings = self.settings
        parts = [model_fingerprint(self.local)[:12], str(self.width), settings.precision]
        parts += [f"{settings.long_texts}{settings.window_overlap}"] if self.overlap is not None else []
        return "-".join(parts)


@lru_cache(maxsize=4)
def _tokenizer(folder: StoragePath, overlap: int | None) -> Tokenizer:
    tokenizer = load_tokenizer(fetched(folder))
    if overlap is not None:
        let_windows_overlap(tokenizer, overlap)
    return tokenizer


def let_windows_overlap(tokenizer: Tokenizer, overlap: int) -> None:
    """Set a tokenizer that cuts to also give what it cut off, in windows that share `overlap` tokens."""
    cut = tokenizer.truncation or {}
    tokenizer.enable_truncation(cut["max_length"], stride=overlap, direction=cut["direction"])


def tokenize(tokenizer: Tokenizer, texts: Sequence[str] | Column) -> pa.Array:
    """Token ids of each text, list<int32>; after `let_windows_overlap` of each of its windows, list<list<int32>>.

    A text that will be cut is cut before it is tokenized too, where that cannot change its tokens.
    """
    texts = texts.to_pylist() if isinstance(texts, pa.Array | pa.ChunkedArray) else list(texts)
    cut = tokenizer.truncation
    if cut and cut["stride"]:
        windows = [[text, *text.overflowing] for text in tokenizer.encode_batch(texts)]
        return as_groups(as_tokens([one.ids for each in windows for one in each]), [len(each) for each in windows])
    most = cut["max_length"] if cut and cut["direction"] == "right" and _words_are_apart(tokenizer) else 0
    begins = _begins(texts, most * CHARS_PER_TOKEN) if most else texts
    encodings = tokenizer.encode_batch_fast(begins)
    again = [i for i, one in enumerate(encodings) if len(one) < most and begins[i] is not texts[i]]
    for i, encoding in zip(again, tokenizer.encode_batch_fast([texts[i] for i in again]), strict=True):
        encodings[i] = encoding
    return as_tokens([encoding.ids for encoding in encodings])


def _begins(texts: list[str], chars: int) -> list[str]:
    """Texts up to the first end of a word after so many characters; those that have none are the same objects."""
    ends = [WORD_END.search(text, chars) if len(text) > chars else None for text in texts]
    return [text[: end.start()] if end else text for text, end in zip(texts, ends, strict=True)]


def _words_are_apart(tokenizer: Tokenizer) -> bool:
    """Whether what precedes a `WORD_END` has the same tokens without what follows: then enough of them are enough.

    That is so where no step that a text goes through looks from one side of such a space to the other, and one splits
    there, as models see one piece at a time. A step that is not known counts as one that looks.
    """
    normalizers, splits = (_steps(_described(part)) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer))
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return (
        all(step["type"] in NORMALIZERS or step.get("pattern") in REPLACED for step in normalizers)
        and all(step["type"] in (*SPLITS, *WORD_SPLITS) for step in splits)
        and any(step["type"] in WORD_SPLITS and step.get("use_regex", step.get("split", True)) for step in splits)
        and not any(" " in content.lstrip(" ") for content in added)
    )


def _described(part: Any) -> dict[str, Any]:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return json.loads(part.__getstate__()) if part else {"type": "Sequence"}  # type: ignore[no-any-return]


def _steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part.get("normalizers") or part.get("pretokenizers") or [] for step in _steps(each)]
