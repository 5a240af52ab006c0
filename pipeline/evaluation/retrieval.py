"""Encodes texts and ranks documents on the cluster; a tree of tasks merges the partial results.

    documents ──► encode ──► top k of each block, for all queries ──► merge 8 results ──► … ──► merge the last few
    on disk       actors     tasks; the queries are sent once         tasks                     in the driver

No process holds more than one block's vectors and scores, so memory does not grow with the number of documents. A
partial result has 101 scores and ids for each of Q queries: 24 MB for 10,000 queries. For a million documents, 18 tasks
merge 122 partial results, and the driver merges the last two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.core.session import Progress
from pipeline.evaluation.metrics import CANDIDATES
from pipeline.evaluation.tasks import BLOCK_ROWS, Corpus, RetrievalTask
from pipeline.index.encoder import EncoderRecipe
from pipeline.index.vectors import Floats, TopK, as_matrix, merged, nearest_in_block, unit

if TYPE_CHECKING:
    from pipeline.index.encoder import TextEncoder

RANK_ROWS = 8192  # documents per ranking task: 16 MB of scores for 256 queries
MERGED_TOGETHER = 8  # partial results per merge task
FEW_TEXTS = 1024  # encoding these locally is faster than starting a pool of encoders


@dataclass(frozen=True)
class TextVectors:
    """Encodes a few texts in this process, and many with a pool of encoders, for which `progress` starts Ray."""

    recipe: EncoderRecipe
    progress: Callable[[], Progress]

    @cached_property
    def encoder(self) -> TextEncoder:
        from pipeline.index.encoder import open_encoder

        return open_encoder(self.recipe, device="cpu")

    def of(self, texts: list[str], name: str, prompt: str = "") -> Floats:
        """(N, D) vectors in the order of the texts; `prompt` names one of the model's prompts."""
        if len(texts) <= FEW_TEXTS:
            return self.encoder.encode(texts, prompt)
        import ray.data

        from pipeline.index.pool import encoded, starting

        table, progress = pa.table({"id": range(len(texts)), "text": texts}), self.progress()
        blocks = [table.slice(start, BLOCK_ROWS) for start in range(0, len(table), BLOCK_ROWS)]
        title = f"evaluate: encode {name}"
        with progress.stage(title, len(texts), "texts", counter="embedded", describe=starting):
            vectors = encoded(ray.data.from_arrow(blocks), len(texts), self.recipe, progress, prompt)
            parts = list(vectors.iter_batches(batch_size=None, batch_format="pyarrow"))
        order = np.argsort(np.concatenate([part["id"].to_numpy() for part in parts]))
        return np.concatenate([as_matrix(part["vector"]) for part in parts])[order]


def nearest_documents(
    task: RetrievalTask, queries: Floats, sizes: Sequence[int], recipe: EncoderRecipe, progress: Progress
) -> dict[int, TopK]:
    """Size → top CANDIDATES documents of each of (Q, D) queries, with vectors truncated to this size; ids are UTF-8."""
    import ray

    from pipeline.index.pool import encoded, starting

    shared, count = ray.put(queries), len(queries)

    def rank(block: pa.Table) -> pa.Table:
        return to_table(best_of_block(ray.get(shared), as_matrix(block["vector"]), _names(block), sizes))

    def merge(partial: pa.Table) -> pa.Table:
        return to_table(merged_rows([partial], count))

    title, documents = f"evaluate: encode {task.name}", len(task.documents)
    with progress.stage(title, documents, "documents", counter="embedded", describe=starting):
        vectors = encoded(_dataset(task), documents, recipe, progress, "document")
        ranked = vectors.map_batches(rank, batch_size=RANK_ROWS, batch_format="pyarrow", num_cpus=0.5)
        for level in range(merge_levels(documents)):
            # NOTE: levels alternate between two CPU shares, because Ray Data fuses operators with equal shares, and
            # then no task sees another task's results (Ray 2.60).
            cpus, rows = (0.5, 0.49)[level % 2 == 0], MERGED_TOGETHER * len(sizes)
            ranked = ranked.map_batches(merge, batch_size=rows, batch_format="pyarrow", num_cpus=cpus)
        return merged_rows(ranked.iter_batches(batch_size=None, batch_format="pyarrow"), count)


def merge_levels(documents: int) -> int:
    """Number of merge levels until at most MERGED_TOGETHER partial results remain for the driver."""
    levels, partial = 0, math.ceil(documents / RANK_ROWS)
    while partial > MERGED_TOGETHER:
        levels, partial = levels + 1, math.ceil(partial / MERGED_TOGETHER)
    return levels


def merged_rows(partial: Iterable[pa.Table], queries: int) -> dict[int, TopK]:
    """Merge partial results, by size; each is a row of `to_table`."""
    results: dict[int, TopK] = {}
    for block in partial:
        for row in block.to_pylist():
            size = row["size"]
            results[size] = merged(results.get(size, TopK.empty(queries)), from_row(row, queries), CANDIDATES)
    return results


def best_of_block(queries: Floats, vectors: Floats, names: np.ndarray, sizes: Sequence[int]) -> dict[int, TopK]:
    """Size → top documents of a block for each query; (Q, D) and (n, D) vectors of any length."""
    return {
        size: nearest_in_block(unit(queries[:, :size]), unit(vectors[:, :size]), names, CANDIDATES) for size in sizes
    }


def to_table(results: dict[int, TopK]) -> pa.Table:
    """A row per size, with ids and scores as bytes; Python values would take 20 times as long to send."""
    rows = [
        {"size": size, "dtype": result.ids.dtype.str, "ids": result.ids.tobytes(), "scores": result.scores.tobytes()}
        for size, result in results.items()
    ]
    schema = pa.schema([("size", pa.int64()), ("dtype", pa.string()), ("ids", pa.binary()), ("scores", pa.binary())])
    return pa.Table.from_pylist(rows, schema)


def from_row(row: dict[str, Any], queries: int) -> TopK:
    """The inverse of `to_table`."""
    scores = np.frombuffer(row["scores"], np.float32).reshape(queries, -1)
    return TopK(np.frombuffer(row["ids"], row["dtype"]).reshape(scores.shape), scores)


def _dataset(task: RetrievalTask) -> Any:
    import ray.data

    documents = task.documents
    if isinstance(documents, Corpus):

        def read(batch: dict[str, Any]) -> pa.Table:
            return _texts([row for index in batch["id"].tolist() for row in documents.block(index)])

        blocks = len(documents.starts)
        return ray.data.range(blocks, override_num_blocks=blocks).map_batches(read, batch_size=1, num_cpus=0.5)
    table = _texts(list(documents.items()))
    table = table if task.tokens is None else table.append_column("tokens", task.tokens)
    return ray.data.from_arrow([table.slice(start, BLOCK_ROWS) for start in range(0, len(table), BLOCK_ROWS)])


def _texts(rows: Sequence[tuple[str, str]]) -> pa.Table:
    return pa.table({"id": [name for name, _ in rows], "text": [text for _, text in rows]})


def _names(block: pa.Table) -> np.ndarray:
    return np.array([name.encode() for name in block["id"].to_pylist()], dtype=np.bytes_)
