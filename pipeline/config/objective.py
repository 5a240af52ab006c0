"""The `objective` section: the training losses, a weighted sum."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.section import PathStr, Section


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
    """Ignore candidates whose cosine to the anchor exceeds the positive's by more than this (Qwen3 Embedding: 0.1).
    With a `guide`, the cosines are the guide's, and the default is 0."""
    guide: PathStr | None = None
    """A model that finds false negatives: candidates that it places nearer to the anchor than the positive are ignored
    (GISTEmbed, Solatorio 2024). Takes what `distillation.teacher` takes."""

    @property
    def margin(self) -> float | None:
        """`false_negative_margin`, or its default."""
        return 0.0 if self.false_negative_margin is None and self.guide is not None else self.false_negative_margin


class Distillation(Section):
    teacher: PathStr
    """The encoder whose vectors the model learns: a model folder, a name on the hub, or a folder of Parquet files with
    an `id` column, the ids of the prepared records, and a column of vectors for each text field, or a column `scores`:
    a cross-encoder's for the positive and then for each of the negatives."""
    loss: Literal["vectors", "scores"] = "vectors"
    """vectors: each text's vector should be the teacher's, after a linear layer if the widths differ (LEAF). scores:
    the similarities of an anchor to the texts of the batch should be distributed as the teacher's (listwise KL)."""
    weight: float = Field(1.0, gt=0)
    """Weight in the sum of objectives."""
    distance: Literal["cosine", "l2"] = "cosine"
    """With `vectors`: one minus the cosine, or the squared Euclidean distance between the vectors."""
    temperature: float = Field(0.05, gt=0, le=10)
    """With `scores`: the model's and the teacher's similarities are divided by it."""
    score_temperature: float = Field(1.0, gt=0)
    """Given scores are divided by it: 1 for the logits of a cross-encoder."""
    hard_negatives: int = Field(1, ge=0)
    """With `scores`: at most this many of each record's negatives are used. A contrastive objective sets its own."""


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
    distillation: Distillation | None = None
    """Learn the vectors or the similarities of a teacher. Records may be pairs or texts."""
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

    @model_validator(mode="after")
    def _one_teacher(self) -> Objective:
        guide = self.contrastive.guide if self.contrastive is not None else None
        if guide is not None and self.distillation is not None and guide != self.distillation.teacher:
            raise ValueError(
                f"the same model as distillation.teacher and contrastive.guide, not {self.distillation.teacher} and "
                f"{guide}"
            )
        views = self.contrastive is not None and self.contrastive.views != "given"
        if views and (guide is not None or self.distills_scores):
            raise ValueError(
                "contrastive.views=given with contrastive.guide or distillation.loss=scores, because the teacher's "
                "vectors are of whole texts"
            )
        return self

    @property
    def named(self) -> dict[str, Section]:
        """The configured objectives, by name."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def needs_pairs(self) -> bool:
        contrasts_pairs = self.contrastive is not None and self.contrastive.views == "given"
        return self.distills_scores or contrasts_pairs or self.seq2seq is not None

    @property
    def distills_scores(self) -> bool:
        return self.distillation is not None and self.distillation.loss == "scores"

    @property
    def teacher(self) -> str | None:
        """The model, or folder of vectors, that teaches or guides."""
        if self.distillation is not None:
            return self.distillation.teacher
        return self.contrastive.guide if self.contrastive is not None else None

    @property
    def teacher_key(self) -> str:
        """The config's key that names the teacher."""
        return "objective.contrastive.guide" if self.distillation is None else "objective.distillation.teacher"

    @property
    def hard_negatives(self) -> int:
        """How many of each record's negatives are used, at most."""
        if self.contrastive is not None:
            return self.contrastive.hard_negatives if self.contrastive.views == "given" else 0
        return self.distillation.hard_negatives if self.distillation and self.distills_scores else 0

    @property
    def needs_decoder(self) -> bool:
        return bool({"seq2seq", "denoising", "causal"} & self.named.keys())
