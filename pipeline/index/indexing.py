"""A table made fit to search: small fragments joined, indexes built and brought up to date, old versions removed.

    finish(table, "ivf_sq", index_rows=200_000)
    describe(table)                    # {"rows": 131698, "index": "IVF_SQ", "recall@10": 0.98, …}

A query looks at all vectors until there is an index, from `index_rows` rows on. Measured on two cores, 100,000
clustered vectors of 256 numbers: 194 ms a query without, and with an index

    ivf_sq         3 s to build, 15 to 24 ms a query, recall@10 0.98, refined 1.00
    ivf_pq        55 s to build, 11 to 15 ms a query, recall@10 0.39, refined 1.00; a quarter of the size
    ivf_hnsw_sq   67 s to build,  8 to 13 ms a query, recall@10 0.97, refined 1.00
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from pipeline.core.console import log
from pipeline.index.search import TableSearch
from pipeline.index.table import ZONE_ROWS, ZONES, VectorTable
from pipeline.index.vectors import as_matrix, nearest, unit

SMALL_ROWS, MANY_SMALL = 131_072, 64  # fragments of fewer rows are joined once there are so many
FEWEST_ROWS = 256  # that an index can be trained on


def finish(table: VectorTable, index: str | None, index_rows: int, *, is_new: bool = False) -> dict[str, Any]:
    """Bring the files and indexes of a table up to date, and describe it. For the table's only writer.

    Measures the recall of an index of vectors that it builds, or that `is_new`.
    """
    from lance.indices.builder import IndexConfig

    dataset = table.open()
    small = sum(fragment.count_rows() < SMALL_ROWS for fragment in dataset.get_fragments())
    if small >= MANY_SMALL:
        log.info("embed: compacting %s small files of %s", f"{small:,}", table.name)
        dataset.optimize.compact_files()
    rows, there = dataset.count_rows(), _columns_indexed(dataset)
    if there:
        dataset.optimize.optimize_indices()
    if "id" not in there and rows:
        dataset.create_scalar_index("id", IndexConfig("zonemap", {"rows_per_zone": max(ZONE_ROWS, rows // ZONES)}))
    wanted = missing_index(table, index, index_rows)
    if wanted:
        log.info("embed: building an index (%s) of %s vectors", wanted["index_type"], f"{rows:,}")
        dataset.create_index(**wanted)
    found = describe(table)
    if wanted or is_new or (table.vector_type == "binary" and rows > 1):
        found["recall@10"] = round(recall(table), 4)
        log.info("embed: recall@10 of the search is %.4f", found["recall@10"])
    return found


def missing_index(table: VectorTable, index: str | None, index_rows: int) -> dict[str, Any] | None:
    """Column, type and metric of the index that a table should have and lacks."""
    dataset, kind = table.open(), table.vector_type
    column = "bits" if kind == "binary" else "vector"
    enough = dataset.count_rows() >= (FEWEST_ROWS if kind == "int8" else max(index_rows, FEWEST_ROWS))
    if not index or not enough or column in _columns_indexed(dataset):
        return None
    index_type = {"binary": "IVF_FLAT", "int8": "IVF_SQ"}.get(kind, index.upper())
    return {"column": column, "index_type": index_type, "metric": "hamming" if kind == "binary" else "cosine"}


def _columns_indexed(dataset: Any) -> dict[str, str]:
    """Column → type of its index."""
    return {index.field_names[0]: index.index_type for index in dataset.describe_indices()}


def unreadable_indexes(table: VectorTable) -> list[str]:
    """Names of indexes that cannot be read, because some of their files are missing or damaged."""
    dataset, width = table.open(), table.width
    near = {"k": 1, "column": "vector", "q": np.ones(width, np.float32)}
    probes: dict[str, dict[str, Any]] = {
        "id": {"filter": "id = ''"},
        "text": {"full_text_query": {"query": "a", "columns": ["text"]}},
        "vector": {"nearest": near},
        "bits": {"nearest": {**near, "column": "bits", "q": np.ones(-(-width // 8), np.uint8)}},
    }
    found = []
    for index in dataset.describe_indices():
        try:
            dataset.to_table(["id"], limit=1, **probes.get(index.field_names[0], {}))
        except (ValueError, OSError, RuntimeError):
            found.append(index.name)
    return found


def describe(table: VectorTable) -> dict[str, Any]:
    """For people: rows, width, type, index, place."""
    dataset = table.open()
    column = "bits" if table.vector_type == "binary" else "vector"
    found = {"rows": dataset.count_rows(), "width": table.width, "vector_type": table.vector_type}
    kind = _columns_indexed(dataset).get(column)
    return {**found, **({"index": kind} if kind else {}), "place": str(table.home), "name": table.name}


def recall(table: VectorTable, sample: int = 50, k: int = 10) -> float:
    """Share of the true k nearest that queries find, by brute force over `sample` vectors of the table.

    A vector itself is left out of what is found.
    """
    dataset, search = table.open(), TableSearch(table)
    offsets = sorted(random.Random(0).sample(range(dataset.count_rows()), min(sample, dataset.count_rows())))
    rows = dataset.take(offsets, columns=["id", "vector"])
    vectors = unit(as_matrix(rows["vector"]))
    blocks = ((np.array(b["id"].to_pylist()), unit(as_matrix(b["vector"]))) for b in table.scan(["id", "vector"]))
    found = nearest(vectors, blocks, k + 1)  # one scan for all of them
    shares = []
    for own, vector, near in zip(rows["id"].to_pylist(), vectors, found.ids, strict=True):
        true = [one for one in near.tolist() if one != own][:k]
        seen = [row["id"] for row in search.query(vector, k + 1) if row["id"] != own][:k]
        shares.append(len(set(seen) & set(true)) / max(len(true), 1))
    return float(np.mean(shares))
