"""The tasks that score a model: BEIR folders, held-out records, sentence pairs and labelled texts.

task = open_beir(Path("debian/beir"))       # RetrievalTask(name='beir', queries={…}, documents=Corpus(…), qrels={…})
task.documents.block(3)                     # documents 3072 to 4095: [(id, text), …]
read_sts(Path("sts_b/test.tsv"))            # StsTask(name='test', first=[…], second=[…], scores=[…])
read_labels(Path("topics.tsv"), "evaluation.clustering_file")                       # ([texts…], [labels…])

Files are read strictly: a ConfigError names the config key, the file and the line. The documents of a BEIR folder stay
on disk: opening it reads the file once and keeps the offset of every 1,024th document and 8 bytes per id.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.config import Config, ConfigError
from pipeline.config.evaluation import Evaluation
from pipeline.core.artifact import open_parquet
from pipeline.core.files import local_copy, sorted_glob
from pipeline.core.path import StoragePath, as_path
from pipeline.data.partitions import content_id, is_validation
from pipeline.model.scores import read_sts, read_tsv

BLOCK_ROWS = 1024  # documents per read
BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")

Normalise = Callable[[str], str]
Qrels = dict[str, dict[str, int]]
"""Query id → document id → relevance, above zero where relevant."""


@dataclass(frozen=True)
class Corpus:
    """A corpus.jsonl on disk. `starts` has the byte offset and the line number of each block's first document."""

    path: StoragePath
    starts: list[tuple[int, int]]
    rows: int
    normalise: Normalise | None = None

    def __len__(self) -> int:
        return self.rows

    def items(self) -> Iterator[tuple[str, str]]:
        """Every document's id and text; the text is the title and the body."""
        return self._documents(_rows(self.path))

    def block(self, index: int) -> list[tuple[str, str]]:
        """The documents from `index * BLOCK_ROWS` on."""
        return list(self._documents(islice(_rows(self.path, *self.starts[index]), BLOCK_ROWS)))

    def _documents(self, rows: Iterable[tuple[int, int, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
        for _, _, row in rows:
            text = f"{row.get('title') or ''} {row['text']}".strip()
            yield row["_id"], self.normalise(text) if self.normalise else text


@dataclass(frozen=True)
class RetrievalTask:
    """Texts by id, and the relevant documents of each query. Queries without one are left out."""

    name: str
    queries: dict[str, str]
    documents: dict[str, str] | Corpus
    qrels: Qrels
    tokens: pa.Array | None = None
    """Token ids of the documents in their order, if known."""

    def normalised(self, normalise: Normalise) -> RetrievalTask:
        """The task with its texts normalised like the training records."""
        documents: dict[str, str] | Corpus
        if isinstance(self.documents, Corpus):
            documents = replace(self.documents, normalise=normalise)
        else:
            documents = {key: normalise(text) for key, text in self.documents.items()}
        queries = {key: normalise(text) for key, text in self.queries.items()}
        return replace(self, queries=queries, documents=documents)


def check_tasks(settings: Evaluation) -> None:
    """Raise ConfigError for a missing or invalid file; for BEIR folders, only check that the files exist."""
    if settings.beir_dir:
        check_beir(as_path(settings.beir_dir))
    if settings.sts_file:
        read_sts(as_path(settings.sts_file))
    if settings.clustering_file:
        read_labels(as_path(settings.clustering_file), "evaluation.clustering_file")
    if settings.classification_dir:
        read_classification(as_path(settings.classification_dir))


def check_beir(folder: StoragePath) -> None:
    """Raise ConfigError if one of the three files is missing."""
    for name in BEIR_FILES:
        if not (folder / name).is_file():
            raise ConfigError(f"evaluation.beir_dir: found no {name} in {folder}; allowed is a folder in BEIR's format")


def open_beir(folder: StoragePath) -> RetrievalTask:
    """Read a BEIR folder, except for the documents' texts."""
    documents = _corpus(folder / "corpus.jsonl")
    queries = {row["_id"]: row["text"] for _, _, row in _rows(folder / "queries.jsonl")}
    qrels: Qrels = {}
    columns, path = ("query-id", "corpus-id", "score"), folder / "qrels" / "test.tsv"
    judged = read_tsv(path, columns, "evaluation.beir_dir", lambda row: (row[0], row[1], int(row[2])), lenient=True)
    for query, document, score in judged:
        if score > 0 and query in queries:
            qrels.setdefault(query, {})[document] = score
    if not qrels or not documents:
        raise ConfigError(f"evaluation.beir_dir: {folder} has no query with a relevant document")
    return RetrievalTask(folder.name, {query: queries[query] for query in qrels}, documents, qrels)


def read_beir(folder: StoragePath) -> RetrievalTask:
    """Read a BEIR folder with all documents in memory."""
    task = open_beir(folder)
    return replace(task, documents=dict(task.documents.items()))


def held_out_task(config: Config, folder: StoragePath, *, use_tokens: bool = False) -> RetrievalTask:
    """Anchors of the validation split as queries; their positives and the first other positives as documents.

    Records are read in the order of their hashes. Documents are distinct texts, identified by the text's hash: twenty
    questions about one passage share one document. `use_tokens` adds the token ids of the token shards.
    """
    settings = config.evaluation
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: Qrels = {}
    distractors: dict[str, str] = {}
    records: dict[str, tuple[str, str]] = {}  # text's hash → file and id of a record with the text
    for file, row in _pairs(folder):
        key = content_id([row["positive"]])
        records.setdefault(key, (file, row["id"]))
        if is_validation(row["id"], config.data.validation_fraction) and len(queries) < settings.held_out_queries:
            queries[row["id"]] = row["anchor"]
            documents[key], qrels[row["id"]] = row["positive"], {key: 1}
        elif len(distractors) < settings.held_out_documents:
            distractors[key] = row["positive"]
        elif len(queries) == settings.held_out_queries:
            break
    for key, text in distractors.items():
        if len(documents) < settings.held_out_documents:
            documents[key] = text
    tokens = _tokens(folder, [records[key] for key in documents]) if use_tokens and documents else None
    return RetrievalTask("held-out", queries, documents, qrels, tokens)


def read_labels(path: StoragePath, key: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a TSV with a header and the columns `text`, `label`; errors name the config key `key`."""
    rows = read_tsv(path, ("text", "label"), key, list[str])
    labels = [label for _, label in rows]
    if len(set(labels)) < 2:
        raise ConfigError(f"{key}: {path} has {len(set(labels))} labels; allowed are two or more")
    return [text for text, _ in rows], labels


def read_classification(folder: StoragePath) -> tuple[list[str], list[str], list[str], list[str]]:
    """Training texts, their labels, test texts, their labels, from `train.tsv` and `test.tsv`."""
    key = "evaluation.classification_dir"
    return (*read_labels(folder / "train.tsv", key), *read_labels(folder / "test.tsv", key))


def _corpus(path: StoragePath) -> Corpus:
    starts: list[tuple[int, int]] = []
    ids = array("Q")
    for start, number, row in _rows(path):
        if len(ids) % BLOCK_ROWS == 0:
            starts.append((start, number))
        ids.append(xxhash.xxh3_64_intdigest(row["_id"].encode()))
    order = np.argsort(np.asarray(ids), kind="stable")
    duplicates = np.flatnonzero(np.diff(np.asarray(ids)[order]) == 0)
    if len(duplicates):
        first, second = order[duplicates[0]] + 1, order[duplicates[0] + 1] + 1
        raise ConfigError(
            f"evaluation.beir_dir: {path}: documents {first} and {second} have the same _id; allowed are unique ids"
        )
    return Corpus(path, starts, len(ids))


def _rows(path: StoragePath, start: int = 0, number: int = 1) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield byte offset, line number and content of each line, from byte `start`, where line `number` begins."""
    try:
        with local_copy(path).open("rb") as file:
            file.seek(start)
            for line in file:
                if line.strip():
                    row = json.loads(line.decode("utf-8"))
                    if not (isinstance(row, dict) and type(row.get("_id")) is str and type(row.get("text")) is str):
                        raise ValueError("allowed is a JSON object with the text fields _id and text")
                    f"{row['_id']}{row['text']}{row.get('title')}".encode()  # raises for a lone surrogate
                    yield start, number, row
                start, number = start + len(line), number + 1
    except OSError as error:
        raise ConfigError(
            f"evaluation.beir_dir: {path}: {error.strerror}; allowed is a folder in BEIR's format"
        ) from None
    except ValueError as error:
        raise ConfigError(f"evaluation.beir_dir: {path} line {number}: {error}") from None


def _tokens(folder: StoragePath, records: list[tuple[str, str]]) -> pa.Array:
    """Token ids of the positives of records, which are given by file and id."""
    from pipeline.index.documents import shard_tokens, tokens_by_id

    shards = [shard_tokens(folder, file, "positive") for file in sorted({file for file, _ in records})]
    return tokens_by_id(pa.chunked_array([[row_id for _, row_id in records]]), pa.concat_tables(shards))


def _pairs(folder: StoragePath) -> Iterator[tuple[str, dict[str, str]]]:
    """Each record, with the name of its file."""
    for file in sorted_glob(folder / "records", "*.parquet"):
        for batch in open_parquet(file).iter_batches(1024, columns=["id", "anchor", "positive"]):
            yield from ((file.name, row) for row in batch.to_pylist())
