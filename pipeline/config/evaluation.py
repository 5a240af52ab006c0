"""The sections `evaluation` and `mining`: what a model is scored on, and which texts become hard negatives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import PathStr, Section

Cosine = Annotated[float, Field(ge=-1, le=1)]


class Evaluation(Section):
    beir_dir: PathStr | None = None
    """A folder in BEIR's format to score as well: corpus.jsonl, queries.jsonl, qrels/test.tsv (TREC's format of qrels
    too). A document with the query's own id is left out of its ranking, unless it is judged relevant."""
    sts_file: PathStr | None = None
    """A TSV with a header and the columns score, sentence1, sentence2: Spearman's and Pearson's correlation; Spearman's
    also at each validation."""
    clustering_file: PathStr | None = None
    """A TSV with a header and the columns text, label: V-measure of k-means with as many clusters as labels."""
    classification_dir: PathStr | None = None
    """A folder with train.tsv and test.tsv, each with a header and the columns text, label: accuracy and macro F1 of
    5-nearest-neighbour classification."""
    general: PathStr | None = None
    """A task outside your domain, a BEIR folder or a file like `sts_file`, which shows what the model has forgotten."""
    mteb: list[str] = []
    """Names of MTEB tasks, such as STSBenchmark, whose data come from the Hugging Face hub. Needs the extra `mteb`."""
    must_beat: list[Literal["bm25", "base"]] = []
    """`run` publishes a model only if its NDCG@10 on your own retrieval tasks is better than that of these, by more
    than chance. base: the model of `model.pretrained`, `model.static_from` or `objective.distillation.teacher`."""
    bm25: bool = True
    """Also rank by BM25, and by both combined. Its index is held in the driver's memory."""
    held_out_queries: int = Field(1000, ge=0)
    """Distinct anchors of the validation split used as queries; 0 for none."""
    held_out_documents: int = Field(10_000, ge=1)
    """Distinct texts that the queries rank: their own positives, and others chosen by hash."""


class Mining(Section):
    num_negatives: int = Field(4, ge=1)
    """Most negatives per record, the most similar first (NV-Retriever, Moreira et al. 2024, section 4.3);
    `objective.contrastive.hard_negatives` says how many are used in training."""
    relative_margin: float | None = Field(0.95, gt=0)
    """Largest cosine of a negative to the anchor, as a share of the positive's: 0.95 (NV-Retriever, TopK-PercPos).
    sentence-transformers calls this a relative_margin of 0.05."""
    min_score: Cosine | None = None
    """Smallest cosine of a negative to the anchor."""
    max_score: Cosine | None = None
    """Largest cosine of a negative to the anchor."""
    range_min: int = Field(0, ge=0)
    """Skip this many of the nearest texts, not counting the record's positives: they may be unlabelled positives."""
    range_max: int = Field(100, ge=1)
    """Consider only this many of the nearest texts."""
    guide: PathStr | None = None
    """A better model, its folder or its name on the hub, that finds false negatives: a negative that it places nearer
    to the anchor than the positive is left out (GISTEmbed, Solatorio 2024)."""

    @model_validator(mode="after")
    def _window(self) -> Mining:
        if self.range_min >= self.range_max:
            raise ValueError(f"a range_min below range_max, not {self.range_min} and {self.range_max}")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"a min_score up to max_score, not {self.min_score} and {self.max_score}")
        return self
