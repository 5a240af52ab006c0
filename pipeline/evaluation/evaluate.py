"""Scores of a model on retrieval tasks, BM25 beside it on the same queries and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config
from pipeline.data.manifest import Manifest, parquet_file
from pipeline.embedding.encode import TextEncoder
from pipeline.evaluation.beir import RetrievalTask
from pipeline.evaluation.metrics import Ranking, bm25_ranking, nearest, retrieval_metrics
from pipeline.evaluation.sts import StsTask, spearman
from pipeline.runtime.files import matching
from pipeline.storage.bucket import AnyPath
from pipeline.text.identity import content_id, is_validation

if TYPE_CHECKING:
    from pipeline.runtime.session import Board


def held_out_task(config: Config, folder: AnyPath, manifest: Manifest) -> RetrievalTask:
    """Held-out anchors, to be found among their positives and the records first by hash.

    A document is named by its text's hash: of two records with equal text either is the right answer.
    """
    wanted = config.evaluation
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    spare: list[str] = []
    for row in _pairs(folder):
        if is_validation(row["id"], config.data.validation_fraction) and len(queries) < wanted.held_out_queries:
            queries[row["id"]] = row["anchor"]
            key = content_id([row["positive"]])
            documents[key], qrels[row["id"]] = row["positive"], {key: 1}
        elif len(spare) < wanted.held_out_documents:
            spare.append(row["positive"])
        elif len(queries) == wanted.held_out_queries:
            break
    for text in spare:
        if len(documents) < wanted.held_out_documents:
            documents[content_id([text])] = text
    return RetrievalTask("held-out", queries, documents, qrels)


def _pairs(folder: AnyPath) -> Iterator[dict[str, str]]:
    for file in matching(folder / "records", "*.parquet"):
        for batch in parquet_file(file).iter_batches(1024, columns=["id", "anchor", "positive"]):
            yield from batch.to_pylist()


def encode_documents(task: RetrievalTask, model: AnyPath, config: Config, board: Board) -> tuple[list[str], np.ndarray]:
    """Document ids and their (N, D) vectors, encoded over the cluster."""
    import ray.data

    from pipeline.embedding.embed import ENCODE_ROWS, encoded

    table = pa.table({"id": list(task.documents), "text": list(task.documents.values())})
    blocks = [table.slice(start, ENCODE_ROWS) for start in range(0, len(table), ENCODE_ROWS)]
    with board.stage(f"evaluate: encode {task.name}", len(table), "documents", counter="embedded"):
        vectors = encoded(ray.data.from_arrow(blocks), model, config, board, "document", {})
        rows = list(vectors.iter_batches(batch_size=None, batch_format="pyarrow"))
    ids = [record_id for block in rows for record_id in block["id"].to_pylist()]
    parts = [block["vector"].combine_chunks().flatten().to_numpy().reshape(len(block), -1) for block in rows]
    return ids, np.concatenate(parts)


def score(task: RetrievalTask, encoder: TextEncoder, document_ids: list[str], documents: np.ndarray) -> dict[str, Any]:
    """`model` and `bm25`: the metrics of each on a task whose documents are embedded."""
    queries = encoder.encode(list(task.queries.values()), "query")
    own: Ranking = nearest(list(task.queries), queries, document_ids, documents)
    lexical = bm25_ranking(
        list(task.queries), list(task.queries.values()), list(task.documents), list(task.documents.values())
    )
    return {
        "queries": len(task.queries),
        "documents": len(task.documents),
        "model": retrieval_metrics(task.qrels, own),
        "bm25": retrieval_metrics(task.qrels, lexical),
    }


def score_sts(task: StsTask, encoder: TextEncoder, normalise: Callable[[str], str]) -> dict[str, Any]:
    """Spearman's correlation of the vectors' cosines with the scores that people gave."""
    first, second = (encoder.encode([normalise(text) for text in texts]) for texts in (task.first, task.second))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines = (first * second).sum(axis=1) / np.maximum(lengths, 1e-12)
    return {"pairs": len(task.scores), "model": {"spearman": round(spearman(task.scores, cosines.tolist()), 4)}}
