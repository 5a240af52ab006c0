"""The `mining` section: which texts become a training record's hard negatives."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.section import Section

Cosine = Annotated[float, Field(ge=-1, le=1)]


class Mining(Section):
    num_negatives: int = Field(4, ge=1)
    """Negatives a record at most, the most alike first (NV-Retriever, Moreira et al. 2024, section 4.3);
    `objective.contrastive.hard_negatives` says how many of them train."""
    relative_margin: float | None = Field(0.95, gt=0)
    """A negative's cosine to the anchor is at most so much of the positive's: 0.95 (NV-Retriever, TopK-PercPos). In
    terms of sentence-transformers, a relative_margin of 0.05."""
    min_score: Cosine | None = None
    """Least cosine of a negative to the anchor."""
    max_score: Cosine | None = None
    """Largest cosine of a negative to the anchor."""
    range_min: int = Field(0, ge=0)
    """Skip so many of the nearest texts, a record's positives not counted: they may be answers that no one marked."""
    range_max: int = Field(100, ge=1)
    """Look no further than so many of the nearest texts."""

    @model_validator(mode="after")
    def _window(self) -> Mining:
        if self.range_min >= self.range_max:
            raise ValueError(f"a range_min below range_max, not {self.range_min} and {self.range_max}")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"a min_score up to max_score, not {self.min_score} and {self.max_score}")
        return self
