"""The vector of one text, from the run's table.

embedder = open_embedder(config)
embedder.get_embedding("remove duplicate rows", cache_only=True)     # (D,), or None where it is not in the table
embedder.get_embedding("remove duplicate rows")                      # encoded, where it is not
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from pipeline.config import Config
from pipeline.data.filtering import normaliser
from pipeline.data.partitions import content_id
from pipeline.embedding.columns import as_matrix
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.store import prompt_name, published
from pipeline.embedding.table import VectorTable


class Embedder:
    """`normalise` makes texts what records are that were prepared by the same config."""

    def __init__(self, recipe: EncoderRecipe, table: VectorTable, normalise: Callable[[str], str], prompt: str) -> None:
        self.recipe, self.table, self.normalise, self.prompt = recipe, table, normalise, prompt

    @cached_property
    def _encoder(self) -> TextEncoder:
        return open_encoder(self.recipe)

    def get_embedding(self, text: str, *, cache_only: bool = False) -> np.ndarray | None:
        """(D,) vector of a text as it is embedded. With `cache_only`, None where the table does not have it."""
        text = self.normalise(text)
        found = self.table.fetch([content_id([text])]) if self.table.exists() else None
        if found:
            return as_matrix(found["vector"])[0].astype(np.float32)  # type: ignore[no-any-return]
        return None if cache_only else self._encoder.encode([text], self.prompt)[0]  # type: ignore[no-any-return]


def open_embedder(config: Config) -> Embedder:
    """For the model and the table that the config's run last published."""
    recipe, table = published(config)
    return Embedder(recipe, table, normaliser(config.data), prompt_name(config.embedding.field))
