"""The vector of one text, from the cache that the jobs share.

embedder = open_embedder(config, model_folder)
embedder.get_embedding("remove duplicate rows", cache_only=True)     # (D,) float32, or None; loads no model
embedder.get_embedding("remove duplicate rows")                      # made, and put there, where it is not
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from pipeline.config import Config
from pipeline.data.judging import normaliser
from pipeline.embedding.cache import VectorCache, cache_key
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.store import open_cache, recipe_of
from pipeline.model.reading import read_card
from pipeline.storage.path import StoragePath


class Embedder:
    """`normalise` makes texts what records are that were prepared by the same config."""

    def __init__(self, recipe: EncoderRecipe, cache: VectorCache, normalise: Callable[[str], str]) -> None:
        self.recipe, self.cache, self.normalise = recipe, cache, normalise

    @cached_property
    def _encoder(self) -> TextEncoder:
        return open_encoder(self.recipe)

    def get_embedding(self, text: str, prompt: str = "document", *, cache_only: bool = False) -> np.ndarray | None:
        """(D,) float32; None where `cache_only` is set and the cache does not have it. A long text is read whole.

        `prompt` names one of the model's own, `query` or `document`; a source's prompt comes before the text itself.
        """
        text = self.normalise(text)
        key = cache_key(read_card(self.recipe.local).head.prompt(prompt) + text)
        vectors, found = self.cache.get([key])
        if found[0]:
            return vectors[0]  # type: ignore[no-any-return]
        if cache_only:
            return None
        vectors = self._encoder.encode([text], prompt)
        self.cache.put([key], vectors)
        return vectors[0]  # type: ignore[no-any-return]


def open_embedder(config: Config, model: StoragePath) -> Embedder:
    """For a model's folder, such as `pipeline.stages.model_folder(config)` gives."""
    recipe = recipe_of(config, model)
    return Embedder(recipe, open_cache(config, recipe), normaliser(config.data))
