"""Texts to vectors with one model in one process.

    encoder = TextEncoder(checkpoint_folder)
    encoder.encode(["remove duplicate rows"])            # (1, D) float32, unit length

Texts are tokenized together, ordered by length and encoded in batches of about `batch_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.model.folder import load_encoder
from pipeline.model.packing import pack


class TextEncoder:
    """A model and its tokenizer, ready to embed. `device` defaults to the GPU where there is one."""

    def __init__(self, folder: Path, batch_tokens: int = 8192, device: str | None = None) -> None:
        self.encoder, self.tokenizer = load_encoder(folder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder.to(self.device)
        self.batch_tokens = batch_tokens

    @property
    def width(self) -> int:
        return self.encoder.shape.d_model

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        """(N, D) float32 unit vectors; a text without tokens gives the zero vector."""
        sequences = [e.ids for e in self.tokenizer.encode_batch_fast(texts)]
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for indices in self._batches([len(s) for s in sequences]):
            batch = pack([sequences[i] for i in indices]).to(self.device)
            vectors[indices] = self.encoder(batch).cpu().numpy()
        return vectors

    def _batches(self, lengths: list[int]) -> Iterator[np.ndarray]:
        """Indices of texts of like length, `batch_tokens` tokens together (or a single longer text)."""
        order = np.argsort(lengths, kind="stable")
        group = np.cumsum(np.asarray(lengths)[order]) // self.batch_tokens
        yield from np.split(order, np.flatnonzero(np.diff(group)) + 1) if len(order) else ()
