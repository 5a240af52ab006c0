"""What an encoder is made from, and texts as it takes them.

Without torch, which is not for tasks that only read and tokenize: it would take each of their processes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from pipeline.config import Embedding
from pipeline.model.reading import load_tokenizer, model_fingerprint, read_card
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath

Windows = list[list[int]]
"""The token ids of a text, window by window; one window where it is not long."""


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


def windows_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Windows]:
    """Token ids of each text; several windows only after `let_windows_overlap`."""
    overlaps = bool(tokenizer.truncation and tokenizer.truncation["stride"])
    encodings = (tokenizer.encode_batch if overlaps else tokenizer.encode_batch_fast)(list(texts))
    return [[encoding.ids, *(rest.ids for rest in encoding.overflowing if overlaps)] for encoding in encodings]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> pa.Array:
    """Token ids of each text: lists, or after `let_windows_overlap` lists of windows."""
    found = windows_of(tokenizer, texts)
    if tokenizer.truncation and tokenizer.truncation["stride"]:
        return pa.array(found, pa.list_(pa.list_(pa.int32())))
    return pa.array([windows[0] for windows in found], pa.list_(pa.int32()))
