"""The `evaluation` section: what a model is scored on."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.section import PathStr, Section


class Evaluation(Section):
    beir_dir: PathStr | None = None
    """A BEIR folder to score as well: corpus.jsonl, queries.jsonl, qrels/test.tsv."""
    sts_file: PathStr | None = None
    """A TSV of score, sentence1, sentence2 under a header: Spearman's and Pearson's correlation; Spearman's also at
    each validation."""
    clustering_file: PathStr | None = None
    """A TSV of text, label under a header: V-measure of as many k-means clusters as there are labels."""
    classification_dir: PathStr | None = None
    """A folder of train.tsv and test.tsv, each of text, label under a header: accuracy and macro F1 by the five nearest
    training texts."""
    bm25: bool = True
    """Rank by BM25 beside, and by both together; its index holds the words of all documents in the driver's memory."""
    held_out_queries: int = Field(1000, ge=0)
    """Anchors of the validation split that are looked up; 0 for none."""
    held_out_documents: int = Field(10_000, ge=1)
    """Documents they are looked up among: their own, and others first by hash."""
