"""A retrieval task out of a prepared data set's own validation split."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.config import Config
from pipeline.embedding.documents import shard_tokens, tokens_of
from pipeline.evaluate.beir import RetrievalTask
from pipeline.runtime.artifact import open_parquet
from pipeline.storage.files import matching
from pipeline.storage.path import StoragePath
from pipeline.text.identity import content_id, is_validation


def held_out_task(config: Config, folder: StoragePath, *, use_tokens: bool = False) -> RetrievalTask:
    """Held-out anchors, to be found among their positives and the texts of the records first by hash.

    Documents are distinct texts, named by the text's hash: of twenty questions about one passage each has that passage
    as its answer. With `use_tokens` they have the tokens of the token shards.
    """
    wanted = config.evaluation
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    spare: dict[str, str] = {}
    records: dict[str, tuple[str, str]] = {}  # the file and the id of a record with the text
    for file, row in _pairs(folder):
        key = content_id([row["positive"]])
        records.setdefault(key, (file, row["id"]))
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
    tokens = _tokens(folder, [records[key] for key in documents]) if use_tokens and documents else None
    return RetrievalTask("held-out", queries, documents, qrels, tokens)


def _tokens(folder: StoragePath, records: list[tuple[str, str]]) -> pa.Array:
    """Token ids of the positives of records, by file and id."""
    shards = [shard_tokens(folder, file, "positive") for file in sorted({file for file, _ in records})]
    return tokens_of(pa.chunked_array([[row_id for _, row_id in records]]), pa.concat_tables(shards))


def _pairs(folder: StoragePath) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of its file, and a record."""
    for file in matching(folder / "records", "*.parquet"):
        for batch in open_parquet(file).iter_batches(1024, columns=["id", "anchor", "positive"]):
            yield from ((file.name, row) for row in batch.to_pylist())
