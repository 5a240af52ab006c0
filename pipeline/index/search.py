"""Searches a table for the documents nearest to a query, by vector or by vector and words (hybrid).

    found = search(config, "remove duplicate rows", limit=3, where={"source": "packages"})
    found[0].score, found[0].text, found[0].metadata["file"]

    embedder = open_embedder(config)
    embedder.get_embedding("remove duplicate rows", cache_only=True)     # (D,), or None if the table lacks the text

Search is exact below `embedding.index_rows` rows. From there on it uses the table's index, and rescores its candidates
with the full vectors. It needs no Ray and, for a token table, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config, ConfigError
from pipeline.core.console import log
from pipeline.core.files import may_write
from pipeline.core.outcome import JobError, command
from pipeline.data.filtering import normaliser
from pipeline.data.partitions import content_id
from pipeline.data.words import dense_chars
from pipeline.index.documents import PLACE_COLUMNS
from pipeline.index.encoder import EncoderRecipe, TextEncoder, open_encoder
from pipeline.index.published import open_pinecone, prompt_name, published
from pipeline.index.table import TEXTS, StoreError, VectorTable, parse_metadata
from pipeline.index.vectors import as_matrix, nearest_rows, unit
from pipeline.index.where import COLUMNS as FILTER_COLUMNS
from pipeline.index.where import Where, check_found, checked_where, keeps, to_sql
from pipeline.index.words import search_words

COLUMNS = ["id", *TEXTS]
REFINE = 10  # index candidates per result, rescored with full vectors
FUSED = 100  # candidates per ranking in a hybrid query
FUSION_K = 60  # Cormack, Clarke and Büttcher 2009, section 3
MAX_QUERY_CHARS = 10_000
SELECTIVE_ROWS = 20_000  # up to this many rows, a filter lists row ids


@dataclass(frozen=True)
class Hit:
    """A search result. `score` is the cosine, or in hybrid search the sum of 1 / (60 + rank)."""

    rank: int
    score: float
    id: str
    source_id: str
    text: str
    metadata: dict[str, Any]


def search(
    config: Config, query: str, limit: int = 10, where: Mapping[str, Any] | None = None, *, hybrid: bool = False
) -> list[Hit]:
    """Find the documents nearest to a query, best first, in the table that the config's run last published.

    search(config, "remove duplicate rows", limit=3, where={"source": "pages"})

    `where.py` describes `where`. Raises ConfigError for an invalid query or invalid conditions, and JobError if there
    is no model or no table.
    """
    if not query.strip():
        raise ConfigError("query: found an empty text; allowed are words to search for")
    if len(query) > MAX_QUERY_CHARS:
        raise ConfigError(f"query: found {len(query):,} characters; allowed are at most {MAX_QUERY_CHARS:,}")
    if limit < 1:
        raise ConfigError(f"--limit: found {limit}; allowed is 1 or more")
    conditions, (recipe, table) = checked_where(where), published(config)
    text = normaliser(config.data)(query)
    if config.embedding.store == "pinecone":
        if hybrid:
            raise ConfigError("--hybrid: found embedding.store=pinecone; allowed with it are lancedb and parquet")
        kept = config.pinecone.metadata
        if kept is not None and (unsent := [key for key in conditions if key not in (*FILTER_COLUMNS, *kept)]):
            raise ConfigError(
                f"where: found {unsent[0]}, which Pinecone does not hold; allowed are "
                f"{', '.join([*FILTER_COLUMNS, *kept])} (pinecone.metadata)"
            )
        store: Any = open_pinecone(config, table)
    elif table.exists():
        store = TableSearch(table)
    else:
        raise JobError(f"no vectors yet for the model in {recipe.folder}; run {command('embed')} first")
    vector = open_encoder(recipe, device="cpu").encode([text], "query")[0]
    rows = store.hybrid(text, vector, limit, conditions) if hybrid else store.query(vector, limit, conditions)
    if conditions and not rows and table.exists():
        check_found(conditions, _all_metadata(table))
    return [
        Hit(rank, row["score"], row["id"], row["source_id"], row["text"], json.loads(row["metadata"] or "{}"))
        for rank, row in enumerate(rows, 1)
    ]


def _all_metadata(table: VectorTable) -> Iterator[dict[str, Any]]:
    for batch in table.scan(["metadata", "places"]):
        for row in batch.to_pylist():
            yield from (parse_metadata(place["metadata"]) for place in (row, *(row["places"] or ())))


class TableSearch:
    """Queries the last verified version of a table, or the newest version if none is verified."""

    def __init__(self, table: VectorTable) -> None:
        self.table, self.dataset = table, table.open_verified()

    def query(self, vector: np.ndarray, k: int, where: Where | None = None) -> list[dict[str, Any]]:
        """The k rows with the highest cosine to a (width,) vector: COLUMNS, and `score`."""
        vector, where = checked_query(vector, self.table.width, self.table.name), checked_where(where)
        condition, exact = self._condition(where)
        if not exact:
            rows = self.table.scan([*COLUMNS, "places", "vector"], condition, self.dataset.version)
            return nearest_rows(
                rows, vector, k, lambda batch: [keeps(where, row) for row in batch.drop_columns(["vector"]).to_pylist()]
            )
        options: dict[str, Any] = {"filter": condition, "prefilter": condition is not None}
        if self.table.vector_type == "binary":
            near = {"column": "bits", "q": np.packbits(vector > 0), "k": k * REFINE, "metric": "hamming"}
            rows = self._nearest([*COLUMNS, "vector"], near, options)
            scores = unit(as_matrix(rows["vector"]).astype(np.float32)) @ unit(vector[None])[0]
            best = np.argsort(-scores, kind="stable")[:k]
            rows, scores = rows.take(pa.array(best)), scores[best]
        else:
            near = {"column": "vector", "q": vector, "k": k, "metric": "cosine", "refine_factor": REFINE}
            rows = self._nearest([*COLUMNS, "_distance"], near, options)
            scores = 1 - rows["_distance"].to_numpy()
        return [
            {**row, "score": float(score)} for row, score in zip(rows.select(COLUMNS).to_pylist(), scores, strict=True)
        ]

    def _nearest(self, columns: list[str], near: dict[str, Any], options: dict[str, Any]) -> pa.Table:
        try:
            return self.dataset.to_table(columns, nearest=near, **options)
        except (ValueError, OSError) as error:  # Lance found a missing or damaged file
            log.debug("%s: %s", self.table.name, error)
            log.warning(
                "the index of %s cannot be read, so queries scan all vectors; to rebuild it, run %s",
                self.table.name,
                command("embed"),
            )
            return self.dataset.to_table(columns, nearest={**near, "use_index": False}, **options)

    def hybrid(self, text: str, vector: np.ndarray, k: int, where: Where | None = None) -> list[dict[str, Any]]:
        """The k best rows of the rankings by vector and by words (BM25), fused by reciprocal rank.

        `score` is the sum of 1 / (60 + rank). The first hybrid query builds the full-text index: 2 s for 100,000 rows.
        """
        if not self._has_words():
            if not may_write(self.table.path):
                raise JobError(
                    f"{self.table.path} has no index of words yet, and cannot be written; run one search with --hybrid "
                    "as a user who may write there, or search without --hybrid"
                )
            log.info("%s: building a full-text index of %s texts", self.table.name, f"{self.dataset.count_rows():,}")
            with self.table.writing() as writer:
                writer.index_words()
            self.dataset = self.table.open_verified()
            if not self._has_words():
                raise JobError(f"the last job did not complete {self.table.path}; run {command('embed')} first")
        conditions, depth = checked_where(where), max(k, FUSED)
        condition, exact = self._condition(conditions)
        rows = self._with_words(text, condition, depth if exact else 10 * depth)
        by_words = [row for row in rows.drop_columns(["_score"]).to_pylist() if exact or keeps(conditions, row)][:depth]
        by_vector = self.query(vector, depth, conditions)
        scores = reciprocal_ranks(*([row["id"] for row in ranking] for ranking in (by_vector, by_words)))
        fused = {row["id"]: {**row, "score": scores[row["id"]]} for row in (*by_words, *by_vector)}
        return sorted(fused.values(), key=lambda row: (-row["score"], row["id"]))[:k]

    def _with_words(self, text: str, condition: str | None, limit: int) -> pa.Table:
        """The best rows by BM25.

        In scripts without blanks a query is a phrase: rows that hold all of its pairs of letters, or else any of them.
        """
        from lance.query import FullTextOperator, MatchQuery

        for operator in [FullTextOperator.AND] * bool(dense_chars(text)) + [FullTextOperator.OR]:
            rows = self.dataset.to_table(
                [*COLUMNS, "places", "_score"],
                full_text_query=MatchQuery(search_words(text), "words", operator=operator),
                filter=condition,
                prefilter=condition is not None,
                limit=limit,
            )
            if len(rows):
                break
        return rows

    def _has_words(self) -> bool:
        return any(index.field_names == ["words"] for index in self.dataset.describe_indices())

    def _condition(self, where: Where) -> tuple[str | None, bool]:
        """SQL that selects the rows with a place that meets the conditions, and whether it selects no others."""
        if not where:
            return None, True
        first, exact = to_sql(where)
        several = "array_length(places) > 1"
        candidates = f"{several} AND NOT ({first})" if exact else f"({first}) OR {several}"
        row_ids: list[int] = []
        columns = [*PLACE_COLUMNS] if self.table.chunks else []  # a chunk's metadata also has part and parent_id
        for batch in self.table.scan(["_rowid", "places", *columns], candidates, self.dataset.version):
            kept = pa.array([keeps(where, row) for row in batch.to_pylist()], pa.bool_())
            row_ids += batch["_rowid"].filter(kept).to_pylist()
            if len(row_ids) > SELECTIVE_ROWS:
                return f"({first}) OR {several}", False
        listed = f"_rowid IN ({', '.join(map(str, row_ids))})" if row_ids else "false"
        return f"({first}) OR {listed}" if exact else listed, True


def reciprocal_ranks(*rankings: Sequence[str]) -> dict[str, float]:
    """Id → sum of 1 / (FUSION_K + rank) over the rankings; the first id of a ranking has rank 1.

    >>> reciprocal_ranks(["a", "b"], ["b"])
    {'a': 0.0163…, 'b': 0.0325…}
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, each in enumerate(ranking, 1):
            scores[each] = scores.get(each, 0.0) + 1 / (FUSION_K + rank)
    return scores


def checked_query(vector: np.ndarray, width: int, name: str) -> np.ndarray:
    """The vector as (width,) float32. Raises StoreError for another width, zero, NaN or infinity."""
    vector = np.asarray(vector, dtype=np.float32).ravel()
    if len(vector) != width:
        raise StoreError(f"{name} holds vectors of {width} dimensions; found a query of {len(vector)}")
    if not np.isfinite(vector).all() or not vector.any():
        raise StoreError("the query's vector is zero or not finite; use a query with words that the model knows")
    return vector


class Embedder:
    """Embeds texts, or looks them up in the table. `normalise` is what prepare applied to the records."""

    def __init__(self, recipe: EncoderRecipe, table: VectorTable, normalise: Callable[[str], str], prompt: str) -> None:
        self.recipe, self.table, self.normalise, self.prompt = recipe, table, normalise, prompt

    @cached_property
    def _encoder(self) -> TextEncoder:
        return open_encoder(self.recipe)

    def get_embedding(self, text: str, *, cache_only: bool = False) -> np.ndarray | None:
        """(D,) vector of a text. With `cache_only`, None if the table lacks the text."""
        text = self.normalise(text)
        rows = self.table.fetch([content_id([text])]) if self.table.exists() else None
        if rows:
            return as_matrix(rows["vector"])[0].astype(np.float32)  # type: ignore[no-any-return]
        return None if cache_only else self._encoder.encode([text], self.prompt)[0]  # type: ignore[no-any-return]


def open_embedder(config: Config) -> Embedder:
    """Open the model and the table that the config's run last published.

    open_embedder(config).get_embedding("remove duplicate rows", cache_only=True)    # None unless it is in the table
    """
    recipe, table = published(config)
    return Embedder(recipe, table, normaliser(config.data), prompt_name(config.embedding.field))
