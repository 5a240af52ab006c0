"""A retrieval task out of a prepared data set's own validation split."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import Config
from pipeline.evaluation.beir import RetrievalTask
from pipeline.runtime.artifact import open_parquet
from pipeline.storage.files import matching
from pipeline.storage.path import StoragePath
from pipeline.text.identity import content_id, is_validation


def held_out_task(config: Config, folder: StoragePath) -> RetrievalTask:
    """Held-out anchors, to be found among their positives and the texts of the records first by hash.

    Documents are distinct texts, named by the text's hash: of twenty questions about one passage each has that passage
    as its answer.
    """
    wanted = config.evaluation
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    spare: dict[str, str] = {}
    for row in _pairs(folder):
        key = content_id([row["positive"]])
        if is_validation(row["id"], config.data.validation_fraction) and len(queries) < wanted.held_out_queries:
            queries[row["id"]] = row["anchor"]
            documents[key], qrels[row["id"]] = row["positive"], {key: 1}
        elif len(spare) < wanted.held_out_documents:
            spare[key] = row["positive"]
        elif len(queries) == wanted.held_out_queries:
            break
    for key, text in spare.items():
        if len(documents) < wanted.held_out_documents:
            documents[key] = text
    return RetrievalTask("held-out", queries, documents, qrels)


def _pairs(folder: StoragePath) -> Iterator[dict[str, str]]:
    for file in matching(folder / "records", "*.parquet"):
        for batch in open_parquet(file).iter_batches(1024, columns=["id", "anchor", "positive"]):
            yield from batch.to_pylist()
