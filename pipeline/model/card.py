"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.model.embedding_model import Head


@dataclass(frozen=True)
class Card:
    """`model.json`: which backbone, what fixes its parameters, how its states become vectors."""

    architecture: str  # unified, or pretrained
    shape: dict[str, Any]  # an EncoderShape's fields, or a config of transformers
    head: Head
    width: int
    max_length: int  # tokens; longer texts are cut
