"""Texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"], "query")   # (1, D) float32, unit length

Texts are tokenized together, ordered by length and encoded in batches of about `batch_tokens` tokens. What is longer
than the model reads is cut, or read in windows that overlap and whose vectors are averaged. Token ids are Arrow lists
from the tokenizer, or a file, to the backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embedding.backends import Backend, model_backend, open_backend
from pipeline.embedding.columns import Column, as_numbers, as_ragged
from pipeline.embedding.nearest import unit
from pipeline.embedding.recipe import EncoderRecipe, let_windows_overlap, tokenize
from pipeline.model.folder import load_tokenizer, read_card
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath


class TextEncoder:
    """A model and its tokenizer, ready to embed. `device` defaults to the GPU where there is one.

    `dimensions` cuts the vectors to one of the sizes that the model was trained for. `backend` runs the model; by
    default numpy or torch.
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
        self.backend = backend or model_backend(folder, device=device)
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
        return self.encode_tokens(tokenize(self.tokenizer, [lead + text for text in texts]))

    def encode_tokens(self, tokens: Column) -> np.ndarray:
        """(N, width) float32 vectors of texts that are tokenized: a column of list<int32>, without nulls.

        Of list<list<int32>>, a text's windows, the vector is their mean, each weighed by its tokens, at unit length.
        """
        if pa.types.is_list(tokens.type.value_type):
            windows, offsets = as_ragged(tokens)
            vectors = _mean_of_windows(self._vectors(windows), as_numbers(pc.list_value_length(windows)), offsets)
        else:
            vectors = self._vectors(tokens)
        return unit(vectors[:, : self.width]) if self.width < self.backend.width else vectors

    def _vectors(self, tokens: Column) -> np.ndarray:
        """(N, D), of texts or windows of list<int32>."""
        if self.batch_tokens is None:
            ids, offsets = as_ragged(tokens)
            return self.backend.vectors(as_numbers(ids), offsets)
        order = np.argsort(pc.list_value_length(tokens).to_numpy(), kind="stable")
        flat, offsets = as_ragged(tokens.take(pa.array(order)))
        ids = as_numbers(flat)
        vectors = np.empty((len(order), self.backend.width), np.float32)
        for start, stop in _batches(offsets, self.batch_tokens):
            batch = offsets[start : stop + 1]
            vectors[order[start:stop]] = self.backend.vectors(ids[batch[0] : batch[-1]], batch - batch[0])
        return vectors


def _mean_of_windows(vectors: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N, D), of (W, D) vectors of windows of (W,) tokens, where text i has the windows from offset i on."""
    counts, found = np.diff(offsets), np.zeros((len(offsets) - 1, vectors.shape[1]), np.float32)
    found[counts == 1] = vectors[offsets[:-1][counts == 1]]
    if (counts > 1).any():
        sums = np.add.reduceat(vectors * lengths[:, None], offsets[:-1][counts > 0])
        found[counts > 1] = unit(sums[counts[counts > 0] > 1])
    return found


def _batches(offsets: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """First text of a batch and of the next, `batch_tokens` tokens together (or a single longer text)."""
    edges = np.flatnonzero(np.diff(offsets[1:] // batch_tokens)) + 1
    return pairwise([0, *edges.tolist(), len(offsets) - 1]) if len(offsets) > 1 else iter(())


def open_encoder(recipe: EncoderRecipe, threads: int | None = None, device: str | None = None) -> TextEncoder:
    """The encoder of a recipe. `threads` of onnxruntime's; torch's are set for the process."""
    settings = recipe.settings
    return TextEncoder(
        recipe.local,
        settings.batch_tokens,
        device,
        settings.dimensions,
        open_backend(recipe.local, settings, recipe.graphs, threads, device),
        window_overlap=recipe.overlap,
        precision=settings.precision,
    )
