"""A BEIR folder: corpus.jsonl, queries.jsonl and qrels/test.tsv, read strictly.

task = open_beir(Path("debian/beir"))       # RetrievalTask(name='beir', queries={…}, documents=Corpus(…), qrels={…})
task.documents.block(3)                     # documents 3072 to 4095: [(id, text), …]
read_beir(Path("debian/beir")).documents    # all of them in memory: {id: text}

Documents stay on disk: opening reads the file once, and remembers where every 1,024th begins and 8 bytes of each id.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.config import ConfigError
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath

if TYPE_CHECKING:
    from pipeline.evaluate.metrics import Qrels  # whose libraries a check of the folder need not pay for

BLOCK_ROWS = 1024  # documents that are read together

Normalise = Callable[[str], str]


@dataclass(frozen=True)
class Corpus:
    """A corpus.jsonl on disk. `starts` has the byte and the number of the line that each block begins with."""

    path: StoragePath
    starts: list[tuple[int, int]]
    rows: int
    normalise: Normalise | None = None

    def __len__(self) -> int:
        return self.rows

    def items(self) -> Iterator[tuple[str, str]]:
        """Every document's id and text, title and body as one."""
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
    """Texts by id, and which documents answer which query. Queries without a relevant document are left out."""

    name: str
    queries: dict[str, str]
    documents: dict[str, str] | Corpus
    qrels: Qrels
    tokens: pa.Array | None = None
    """Token ids of the documents in their order, where they are known."""

    def normalised(self, normalise: Normalise) -> RetrievalTask:
        """The task with its texts as the records are that a model was trained on."""
        documents: dict[str, str] | Corpus
        if isinstance(self.documents, Corpus):
            documents = replace(self.documents, normalise=normalise)
        else:
            documents = {key: normalise(text) for key, text in self.documents.items()}
        queries = {key: normalise(text) for key, text in self.queries.items()}
        return replace(self, queries=queries, documents=documents)


def check_beir(folder: StoragePath) -> None:
    """Raise ConfigError where a file of the three is missing."""
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        if not (folder / name).is_file():
            raise ConfigError(f"evaluation.beir_dir: found no {name} in {folder}; allowed is a folder in BEIR's format")


def open_beir(folder: StoragePath) -> RetrievalTask:
    """Read a folder, all but its documents' texts. Raises ConfigError naming the file and line that are not BEIR's."""
    documents = _corpus(folder / "corpus.jsonl")
    queries = {row["_id"]: row["text"] for _, _, row in _rows(folder / "queries.jsonl")}
    qrels: Qrels = {}
    for query, document, score in _judgements(folder / "qrels" / "test.tsv"):
        if score > 0 and query in queries:
            qrels.setdefault(query, {})[document] = score
    if not qrels or not documents:
        raise ConfigError(f"evaluation.beir_dir: {folder} has no query with a relevant document")
    return RetrievalTask(folder.name, {query: queries[query] for query in qrels}, documents, qrels)


def read_beir(folder: StoragePath) -> RetrievalTask:
    """The same with all documents in memory."""
    task = open_beir(folder)
    return replace(task, documents=dict(task.documents.items()))


def _corpus(path: StoragePath) -> Corpus:
    starts: list[tuple[int, int]] = []
    ids = array("Q")
    for start, number, row in _rows(path):
        if len(ids) % BLOCK_ROWS == 0:
            starts.append((start, number))
        ids.append(xxhash.xxh3_64_intdigest(row["_id"].encode()))
    order = np.argsort(np.asarray(ids), kind="stable")
    again = np.flatnonzero(np.diff(np.asarray(ids)[order]) == 0)
    if len(again):
        first, second = order[again[0]] + 1, order[again[0] + 1] + 1
        raise ConfigError(
            f"evaluation.beir_dir: {path}: documents {first} and {second} have one _id; allowed is one each"
        )
    return Corpus(path, starts, len(ids))


def _open_error(path: StoragePath, error: OSError) -> ConfigError:
    return ConfigError(f"evaluation.beir_dir: {path}: {error.strerror}; allowed is a folder in BEIR's format")


def _rows(path: StoragePath, start: int = 0, number: int = 1) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Each line from byte `start` on, which begins line `number`: its first byte, its number, and what it says."""
    try:
        with fetched(path).open("rb") as file:
            file.seek(start)
            for line in file:
                if line.strip():
                    row = json.loads(line.decode("utf-8"))
                    if not (isinstance(row, dict) and type(row.get("_id")) is str and type(row.get("text")) is str):
                        raise ValueError("text fields _id and text are wanted")
                    f"{row['_id']}{row['text']}{row.get('title')}".encode()  # half of a surrogate pair is no text
                    yield start, number, row
                start, number = start + len(line), number + 1
    except OSError as error:
        raise _open_error(path, error) from None
    except ValueError as error:
        raise ConfigError(f"evaluation.beir_dir: {path} line {number}: {error}") from None


def _judgements(path: StoragePath) -> Iterator[tuple[str, str, int]]:
    try:
        with fetched(path).open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            next(rows, None)  # the header
            for row in rows:
                if row:
                    query, document, score = row
                    yield query, document, int(score)
    except OSError as error:
        raise _open_error(path, error) from None
    except ValueError:
        raise ConfigError(
            f"evaluation.beir_dir: {path} line {rows.line_num}: allowed are a query id, a document id and a score"
        ) from None
