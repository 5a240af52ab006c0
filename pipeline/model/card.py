"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Pooling = Literal["mean", "cls", "last", "weighted"]


@dataclass(frozen=True)
class Head:
    """How states become a vector.

    mean: of all tokens. cls: the first token's. last: the last token's. weighted: a mean in which the i-th token, from
    1, weighs i (SGPT, section 3.1.2).
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    dimensions: tuple[int, ...] = ()
    """Sizes below D that vectors are trained to be cut to (Matryoshka), largest first."""
    prompts: tuple[tuple[str, str], ...] = ()
    """Names, `query` and `document`, and what such texts are led by."""

    def prompt(self, name: str) -> str:
        return dict(self.prompts).get(name, "")


@dataclass(frozen=True)
class Card:
    """`model.json`: which backbone, what fixes its parameters, how its states become vectors."""

    architecture: str  # unified, or pretrained
    shape: dict[str, Any]  # an EncoderShape's fields, or a config of transformers
    head: Head
    width: int
    max_length: int  # tokens; longer texts are cut
