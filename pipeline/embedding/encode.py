"""Texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"], "query")   # (1, D) float32, unit length

Texts are tokenized together, ordered by length and encoded in batches of about `batch_tokens` tokens. What is longer
than the model reads is cut, or read in windows that overlap and whose vectors are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.embedding.backends import Backend, TorchBackend, open_backend
from pipeline.embedding.nearest import unit
from pipeline.embedding.recipe import EncoderRecipe, Windows, let_windows_overlap, windows_of
from pipeline.model.folder import load_model
from pipeline.model.reading import load_tokenizer, read_card
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath


class TextEncoder:
    """A model and its tokenizer, ready to embed. `device` defaults to the GPU where there is one.

    `dimensions` cuts the vectors to one of the sizes that the model was trained for. `backend` takes the place of the
    model as torch runs it.
    """

    def __init__(
        self,
        place: StoragePath,
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

    def encode_tokens(self, texts: Any) -> np.ndarray:
        """(N, width) float32 vectors of texts that are tokenized."""
        if not isinstance(texts, list):
            texts = texts.to_pylist()
            texts = [each if each and isinstance(each[0], list) else [each] for each in texts]
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


def open_encoder(recipe: EncoderRecipe, threads: int | None = None, device: str | None = None) -> TextEncoder:
    """The encoder of a recipe. `threads` of onnxruntime's; torch's are set for the process."""
    settings = recipe.settings
    backend = open_backend(recipe.local, settings, recipe.graphs, threads or 0, device)
    return TextEncoder(
        recipe.local,
        settings.batch_tokens,
        device,
        settings.dimensions,
        backend,
        window_overlap=recipe.overlap,
        precision=settings.precision,
    )
