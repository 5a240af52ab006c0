"""A BEIR folder: corpus.jsonl, queries.jsonl and qrels/test.tsv, read strictly.

task = read_beir(Path("debian/beir"))       # RetrievalTask(name='beir', queries={…}, documents={…}, qrels={…})
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError

if TYPE_CHECKING:
    from pipeline.evaluation.metrics import Qrels  # whose libraries a check of the folder need not pay for


@dataclass(frozen=True)
class RetrievalTask:
    """Texts by id, and which documents answer which query. Queries without a relevant document are left out."""

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: Qrels

    def normalised(self, normalise: Callable[[str], str]) -> RetrievalTask:
        """The task with its texts as the records are that a model was trained on."""
        queries, documents = (
            {key: normalise(text) for key, text in texts.items()} for texts in (self.queries, self.documents)
        )
        return replace(self, queries=queries, documents=documents)


def check_beir(folder: Path) -> None:
    """Raise ConfigError where a file of the three is missing."""
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        if not (folder / name).is_file():
            raise ConfigError(f"evaluation.beir_dir: found no {name} in {folder}; allowed is a folder in BEIR's format")


def read_beir(folder: Path) -> RetrievalTask:
    """Read a folder. Raises ConfigError naming the file and line that are not as BEIR has them."""
    documents = {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _rows(folder / "corpus.jsonl")
    }
    queries = {row["_id"]: row["text"] for row in _rows(folder / "queries.jsonl")}
    qrels: Qrels = {}
    for query, document, score in _judgements(folder / "qrels" / "test.tsv"):
        if score > 0 and query in queries:
            qrels.setdefault(query, {})[document] = score
    if not qrels or not documents:
        raise ConfigError(f"evaluation.beir_dir: {folder} has no query with a relevant document")
    return RetrievalTask(folder.name, {query: queries[query] for query in qrels}, documents, qrels)


def _open_error(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"evaluation.beir_dir: {path}: {error.strerror}; allowed is a folder in BEIR's format")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                row = json.loads(line)
                if not (isinstance(row, dict) and isinstance(row.get("_id"), str) and isinstance(row.get("text"), str)):
                    raise ValueError("text fields _id and text are wanted")
                yield row
    except OSError as error:
        raise _open_error(path, error) from None
    except ValueError as error:
        raise ConfigError(f"evaluation.beir_dir: {path} line {number}: {error}") from None


def _judgements(path: Path) -> Iterator[tuple[str, str, int]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
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
