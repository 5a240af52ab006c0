"""Texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"], "query")   # (1, D) float32, unit length

Texts are tokenized together, ordered by length and encoded in batches of about `batch_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.model.embedding_model import shorten
from pipeline.model.folder import load_model
from pipeline.model.packing import pack
from pipeline.runtime.files import fetched
from pipeline.storage.bucket import AnyPath


class TextEncoder:
    """A model and its tokenizer, ready to embed. `device` defaults to the GPU where there is one.

    `dimensions` cuts the vectors to one of the sizes that the model was trained for.
    """

    def __init__(
        self, folder: AnyPath, batch_tokens: int = 8192, device: str | None = None, dimensions: int | None = None
    ) -> None:
        self.model, self.tokenizer = load_model(fetched(folder))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.batch_tokens = batch_tokens
        self.width = dimensions or self.model.width

    def encode(self, texts: list[str], prompt: str = "") -> np.ndarray:
        """(N, width) float32 vectors; a text without tokens gives the zero vector.

        `prompt` names one of the model's own: `query` or `document`.
        """
        lead = self.model.head.prompt(prompt)
        sequences = [e.ids for e in self.tokenizer.encode_batch_fast([lead + text for text in texts])]
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for indices in self._batches([len(s) for s in sequences]):
            vectors[indices] = self._vectors([sequences[i] for i in indices])
        return vectors

    @torch.inference_mode()
    def _vectors(self, sequences: list[list[int]]) -> np.ndarray:
        vectors = self.model(pack(sequences).to(self.device))
        if self.width < self.model.width:
            vectors = shorten(vectors, self.width)
        return vectors.cpu().numpy()

    def _batches(self, lengths: list[int]) -> Iterator[np.ndarray]:
        """Indices of texts of like length, `batch_tokens` tokens together (or a single longer text)."""
        order = np.argsort(lengths, kind="stable")
        group = np.cumsum(np.asarray(lengths)[order]) // self.batch_tokens
        yield from np.split(order, np.flatnonzero(np.diff(group)) + 1) if len(order) else ()
