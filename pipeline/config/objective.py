"""The `objective` section: the training losses, a weighted sum."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section


class Contrastive(Section):
    weight: float = Field(1.0, gt=0)
    """Weight in the sum of objectives."""
    temperature: float = Field(0.05, gt=0, le=10)
    """Similarities are divided by it (SimCSE, section 6)."""
    learn_temperature: bool = False
    """Train the temperature, from `temperature` down to at least 0.01 (CLIP, section 2.5)."""
    views: Literal["given", "crops", "dropout"] = "given"
    """The two texts that are contrasted. given: each record's anchor and positive. The others need no pairs, and use
    no hard negatives. crops: two random spans of `text` or `positive`, each 5% to 50% of its tokens, new ones each
    epoch (Contriever, section 3.1). dropout: `text` or `positive` twice, under different dropout (SimCSE, section
    3)."""
    symmetric: bool = True
    """Also classify each positive's anchor among all anchors."""
    hard_negatives: int = Field(1, ge=0)
    """At most this many of each record's negatives are used, in addition to the positives of the batch."""
    false_negative_margin: float | None = Field(None, ge=0, le=2)
    """Ignore candidates whose cosine to the anchor exceeds the positive's by more than this (Qwen3 Embedding: 0.1)."""


class Generative(Section):
    weight: float = Field(1.0, gt=0)
    """Weight in the sum of objectives. The loss is the mean over the target tokens of the global batch."""


class Writing(Generative):
    """Keys shared by the objectives that train a decoder."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target's probability that is spread over the vocabulary (Vaswani et al. 2017: 0.1)."""


class Denoising(Writing):
    corruption: Literal["deletion", "spans"] = "deletion"
    """deletion: tokens are deleted, and the decoder sees only the text's vector (TSDAE). spans: runs of tokens are
    masked, and the decoder, which sees all states, generates them (T5)."""
    ratio: float = Field(0.6, gt=0, lt=1)
    """Share of tokens deleted or masked: 0.6 in TSDAE (Wang et al. 2021, section 3), 0.15 in T5."""
    mean_span: float = Field(3.0, ge=1)
    """Mean length of a span, in tokens (Raffel et al. 2020, section 3.3.4)."""


class MaskedLanguageModel(Generative):
    ratio: float = Field(0.3, gt=0, lt=1)
    """Share of tokens that are masked (ModernBERT, Warner et al. 2024)."""


class Objective(Section):
    """A weighted sum of the objectives named here; contrastive if none is named."""

    contrastive: Contrastive | None = None
    """InfoNCE on pairs, or on views of texts, with negatives from all workers."""
    seq2seq: Writing | None = None
    """The decoder generates the positive from the anchor's states."""
    denoising: Denoising | None = None
    """The decoder restores a corrupted text, `text` or `positive`."""
    mlm: MaskedLanguageModel | None = None
    """The encoder restores masked tokens of `text` or `positive`."""
    causal: Writing | None = None
    """The decoder predicts each next token of `text` or `positive`, without the encoder."""

    @model_validator(mode="before")
    @classmethod
    def _default(cls, given: Any) -> Any:
        nothing = isinstance(given, dict) and all(value is None for value in given.values())
        return {"contrastive": {}} if nothing else given

    @property
    def named(self) -> dict[str, Section]:
        """The configured objectives, by name."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def needs_pairs(self) -> bool:
        contrasts_pairs = self.contrastive is not None and self.contrastive.views == "given"
        return contrasts_pairs or self.seq2seq is not None

    @property
    def needs_decoder(self) -> bool:
        return bool({"seq2seq", "denoising", "causal"} & self.named.keys())
