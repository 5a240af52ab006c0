"""The tasks that score a model: BEIR folders, held-out records, sentence pairs and labelled texts.

task = open_beir(Path("debian/beir"))       # RetrievalTask(name='beir', queries={…}, documents=Corpus(…), qrels={…})
task.documents.block(3)                     # documents 3072 to 4095: [(id, text), …]
read_sts(Path("sts_b/test.tsv"))            # StsTask(name='test', first=[…], second=[…], scores=[…])
read_labels(Path("topics.tsv"), "evaluation.clustering_file")                       # ([texts…], [labels…])

Files are read strictly: a ConfigError names the config key, the file and the line. The documents of a BEIR folder stay
on disk: opening it reads the file once and keeps the offset of every 1,024th document and 8 bytes per id.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipeline.config import Config, ConfigError
from pipeline.config.evaluation import Evaluation
from pipeline.core.artifact import open_parquet
from pipeline.core.console import log
from pipeline.core.files import sorted_glob
from pipeline.core.path import StoragePath, as_path
from pipeline.data.beir import JUDGEMENTS, TEXTS, Qrels, beir_rows, read_qrels
from pipeline.data.partitions import content_id, is_validation
from pipeline.model.scores import read_sts, read_tsv

BLOCK_ROWS = 1024  # documents per read
KEY, GENERAL_KEY = "evaluation.beir_dir", "evaluation.general"
GENERAL = "general "  # before the name of a task outside the domain

Normalise = Callable[[str], str]


@dataclass(frozen=True)
class Corpus:
    """A corpus.jsonl on disk. `starts` has the byte offset and the line number of each block's first document."""

    path: StoragePath
    starts: list[tuple[int, int]]
    rows: int
    normalise: Normalise | None = None
    key: str = KEY

    def __len__(self) -> int:
        return self.rows

    def items(self) -> Iterator[tuple[str, str]]:
        """Every document's id and text; the text is the title and the body."""
        return self._documents(beir_rows(self.path, self.key))

    def block(self, index: int) -> list[tuple[str, str]]:
        """The documents from `index * BLOCK_ROWS` on."""
        return list(self._documents(islice(beir_rows(self.path, self.key, *self.starts[index]), BLOCK_ROWS)))

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
    """Raise ConfigError for a missing or invalid file, except for the content of a BEIR folder's corpus.jsonl."""
    if settings.beir_dir:
        check_beir(as_path(settings.beir_dir))
    if settings.sts_file:
        read_sts(as_path(settings.sts_file))
    if settings.general:
        general = as_path(settings.general)
        check_beir(general, GENERAL_KEY) if general.is_dir() else read_sts(general, GENERAL_KEY)
    if settings.clustering_file:
        read_labels(as_path(settings.clustering_file), "evaluation.clustering_file")
    if settings.classification_dir:
        read_classification(as_path(settings.classification_dir))
    if settings.mteb:
        from pipeline.evaluation.mteb_tasks import find_tasks

        find_tasks(settings.mteb)


def check_beir(folder: StoragePath, key: str = KEY) -> None:
    """Raise ConfigError if one of the three files is missing, or the queries or judgements are invalid."""
    for name in (*TEXTS, JUDGEMENTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{key}: found no {name} in {folder}; allowed is a folder in BEIR's format")
    _judged(folder, key)


def open_beir(folder: StoragePath, key: str = KEY) -> RetrievalTask:
    """Read a BEIR folder, except for the documents' texts.

    Warns about judged queries and documents that are missing, and about queries without a relevant document. As in
    trec_eval, a missing document counts as not found. Raises ConfigError if all are missing, or an id is not unique.
    """
    queries, judged = _judged(folder, key)
    documents, ids = _corpus(folder / "corpus.jsonl", key)
    _warn(key, folder, judged.keys() - queries.keys(), len(judged), "judged queries are missing from queries.jsonl")
    qrels: Qrels = {}
    for query in judged.keys() & queries.keys():
        qrels[query] = {document: score for document, score in judged[query].items() if score > 0}
    unanswered = [query for query, answers in qrels.items() if not answers]
    _warn(key, folder, unanswered, len(qrels), "judged queries have no score above 0 and are left out")
    relevant = sorted({document for answers in qrels.values() for document in answers})
    known = np.isin(np.array([_id_hash(document) for document in relevant], np.uint64), ids)
    missing = [document for document, is_known in zip(relevant, known.tolist(), strict=True) if not is_known]
    _warn(key, folder, missing, len(relevant), "judged documents with a score above 0 are missing from corpus.jsonl")
    asked = {query: text for query, text in queries.items() if qrels.get(query)}
    return RetrievalTask(folder.name, asked, documents, {query: qrels[query] for query in asked})


def read_beir(folder: StoragePath) -> RetrievalTask:
    """Read a BEIR folder with all documents in memory."""
    task = open_beir(folder)
    return replace(task, documents=dict(task.documents.items()))


def held_out_task(config: Config, folder: StoragePath, *, use_tokens: bool = False) -> RetrievalTask:
    """Anchors of the validation split as queries; their positives and the first other positives as documents.

    Records are read in the order of their hashes. Documents are distinct texts, identified by the text's hash: twenty
    questions about one passage share one document. An anchor that several records have is one query, and each of their
    positives is relevant. `use_tokens` adds the token ids of the token shards.
    """
    settings = config.evaluation
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    asked: dict[str, str] = {}  # anchor → id of its query
    answers: dict[str, set[str]] = {}  # anchor → hashes of its positives
    distractors: dict[str, str] = {}
    records: dict[str, tuple[str, str]] = {}  # text's hash → file and id of a record with the text
    for file, row in _pairs(folder):
        key, anchor = content_id([row["positive"]]), row["anchor"]
        records.setdefault(key, (file, row["id"]))
        answers.setdefault(anchor, set()).add(key)
        has_room = len(queries) < settings.held_out_queries or anchor in asked
        if has_room and is_validation(row["id"], config.data.validation_fraction):
            queries[asked.setdefault(anchor, row["id"])] = anchor
            documents[key] = row["positive"]
        elif len(distractors) < settings.held_out_documents:
            distractors[key] = row["positive"]
        elif len(queries) == settings.held_out_queries:
            break
    for key, text in distractors.items():
        if len(documents) < settings.held_out_documents:
            documents[key] = text
    qrels = {query: dict.fromkeys(answers[anchor] & documents.keys(), 1) for query, anchor in queries.items()}
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


def _judged(folder: StoragePath, key: str) -> tuple[dict[str, str], Qrels]:
    """All queries, and all judgements. Raises ConfigError unless a judged query has a score above zero."""
    path, queries = folder / "queries.jsonl", dict[str, str]()
    for _, number, row in beir_rows(path, key):
        if row["_id"] in queries:
            raise ConfigError(
                f"{key}: {path} line {number}: the _id {row['_id']!r} is not unique; give each query its own"
            )
        queries[row["_id"]] = row["text"]
    qrels = read_qrels(folder / JUDGEMENTS, queries, key)
    if not any(score > 0 for query, scores in qrels.items() if query in queries for score in scores.values()):
        raise ConfigError(
            f"{key}: {folder} has no query with a relevant document; {JUDGEMENTS} must give a score above 0 to a query "
            f"of queries.jsonl, and has {sum(query in queries for query in qrels):,} of its {len(queries):,} queries"
        )
    return queries, qrels


def _warn(key: str, folder: StoragePath, found: Collection[str], total: int, what: str) -> None:
    """Warn that `what` is true of the ids `found`, out of `total`. Raises ConfigError if it is true of all."""
    if not found:
        return
    sentence = f"{key}: in {folder}, {len(found):,} of {total:,} {what}, such as {min(found)!r}"
    if len(found) == total:
        raise ConfigError(f"{sentence}; give a folder whose files belong together")
    log.warning("%s", sentence)


def _corpus(path: StoragePath, key: str) -> tuple[Corpus, npt.NDArray[np.uint64]]:
    """The documents, and the hash of each one's id."""
    starts: list[tuple[int, int]] = []
    ids = array("Q")
    for start, number, row in beir_rows(path, key):
        if len(ids) % BLOCK_ROWS == 0:
            starts.append((start, number))
        ids.append(_id_hash(row["_id"]))
    hashes = np.asarray(ids)
    order = np.argsort(hashes, kind="stable")
    duplicates = np.flatnonzero(np.diff(hashes[order]) == 0)
    if len(duplicates):
        first, second = order[duplicates[0]], order[duplicates[0] + 1]
        name = next(islice(beir_rows(path, key), int(first), None))[2]["_id"]
        raise ConfigError(
            f"{key}: {path}: documents {first + 1} and {second + 1} have the same _id {name!r}; allowed are unique ids"
        )
    return Corpus(path, starts, len(ids), key=key), hashes


def _id_hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


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
