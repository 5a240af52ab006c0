"""Texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"], "query")   # (1, D) float32, unit length

Texts are tokenized together, ordered by length and encoded in batches of about `batch_tokens` tokens. What is longer
than the model reads is cut, or read in windows that overlap and whose vectors are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from pipeline.config import Embedding
from pipeline.embedding.backends import Backend, TorchBackend, open_backend
from pipeline.embedding.nearest import unit
from pipeline.model.folder import load_model, load_tokenizer, model_fingerprint, read_card
from pipeline.runtime.files import fetched
from pipeline.storage.bucket import AnyPath

Windows = list[list[int]]
"""The token ids of a text, window by window; one window where it is not long."""


@dataclass(frozen=True)
class EncoderRecipe:
    """What an encoder is made from, wherever it is to run."""

    folder: AnyPath
    settings: Embedding
    graphs: AnyPath
    """Where onnxruntime's graphs lie."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of nodes that encoding actors go to; by default all of them."""

    @property
    def local(self) -> Path:
        """The model's folder on this machine."""
        return fetched(self.folder)

    def open(self, threads: int | None = None, device: str | None = None) -> TextEncoder:
        """`threads` of onnxruntime's; torch's are set for the process."""
        settings = self.settings
        backend = open_backend(self.local, settings, self.graphs, threads or 0, device)
        return TextEncoder(
            self.local,
            settings.batch_tokens,
            device,
            settings.dimensions,
            backend,
            window_overlap=self.overlap,
            precision=settings.precision,
        )

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
def _tokenizer(folder: AnyPath, overlap: int | None) -> Tokenizer:
    tokenizer = load_tokenizer(fetched(folder))
    if overlap is not None:
        let_windows_overlap(tokenizer, overlap)
    return tokenizer


class TextEncoder:
    """A model and its tokenizer, ready to embed. `device` defaults to the GPU where there is one.

    `dimensions` cuts the vectors to one of the sizes that the model was trained for. `backend` takes the place of the
    model as torch runs it.
    """

    def __init__(
        self,
        place: AnyPath,
        batch_tokens: int | Literal["auto"] = "auto",
        device: str | None = None,
        dimensions: int | None = None,
        backend: Backend | None = None,
        window_overlap: int | None = None,
        precision: str = "fp32",
    ) -> None:
        folder = fetched(place)
        self.card, self.tokenizer = read_card(folder), load_tokenizer(folder)
        self.backend = backend or TorchBackend(load_model(folder)[0], device)
        self.batch_tokens = self.backend.best_batch_tokens if batch_tokens == "auto" else batch_tokens
        self.precision = precision
        self.width = dimensions or self.backend.width
        if window_overlap is not None:
            let_windows_overlap(self.tokenizer, window_overlap)

    def encode(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """(N, width) float32 vectors; a text without tokens gives the zero vector.

        `prompt` names one of the model's own: `query` or `document`.
        """
        lead = self.card.head.prompt(prompt)
        return self.encode_tokens(windows_of(self.tokenizer, [lead + text for text in texts]))

    def encode_tokens(self, texts: Sequence[Windows]) -> np.ndarray:
        """(N, width) float32 vectors of texts that are tokenized."""
        return encode_tokens(self.backend, texts, self.batch_tokens, self.width)


def encode_tokens(backend: Backend, texts: Sequence[Windows], batch_tokens: int, width: int) -> np.ndarray:
    """(N, width) float32: a window's vector, or the mean of several, each weighed by its tokens, at unit length."""
    counts = np.array([len(windows) for windows in texts], dtype=np.int64)
    sequences = [window for windows in texts for window in windows]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    vectors = np.zeros((len(sequences), backend.width), dtype=np.float32)
    for indices in _batches(lengths, batch_tokens):
        vectors[indices] = backend.vectors([sequences[i] for i in indices])
    if (counts > 1).any():
        first = np.cumsum(counts) - counts
        means = unit(np.add.reduceat(vectors * lengths[:, None], first))
        vectors = np.where((counts > 1)[:, None], means, vectors[first])
    return unit(vectors[:, :width]) if width < backend.width else vectors


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of sequences of like length, `batch_tokens` tokens together (or a single longer one)."""
    order = np.argsort(lengths, kind="stable")
    group = np.cumsum(lengths[order]) // batch_tokens
    yield from np.split(order, np.flatnonzero(np.diff(group)) + 1) if len(order) else ()


def let_windows_overlap(tokenizer: Tokenizer, overlap: int) -> None:
    """Set a tokenizer that cuts to also give what it cut off, in windows that share `overlap` tokens."""
    cut = tokenizer.truncation or {}
    tokenizer.enable_truncation(cut["max_length"], stride=overlap, direction=cut["direction"])


def windows_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Windows]:
    """Token ids of each text; several windows only after `let_windows_overlap`."""
    overlaps = bool(tokenizer.truncation and tokenizer.truncation["stride"])
    encodings = (tokenizer.encode_batch if overlaps else tokenizer.encode_batch_fast)(list(texts))
    return [[encoding.ids, *(rest.ids for rest in encoding.overflowing if overlaps)] for encoding in encodings]
