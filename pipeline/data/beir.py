"""Reads the files of a BEIR folder: documents and queries as JSON Lines, and relevance judgements (qrels).

    corpus.jsonl      {"_id": "d1", "title": "Rust", "text": "Iron that meets water …"}    one a line
    queries.jsonl     {"_id": "q1", "text": "why does iron rust"}
    qrels/test.tsv    query-id, corpus-id, score, separated by tabs; or TREC's `q1 0 d1 1`

    [row for _, _, row in beir_rows(folder / "queries.jsonl", "evaluation.beir_dir")]     # [{"_id": "q1", …}]
    read_qrels(folder / "qrels" / "test.tsv", queries, "evaluation.beir_dir")             # {"q1": {"d1": 1}}

A byte order mark, Windows line ends and blank lines are skipped. Anything else raises ConfigError, which names the
config key, the file and the line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Container, Iterator
from typing import Any

from pipeline.config import ConfigError
from pipeline.core.files import local_copy
from pipeline.core.path import StoragePath

Qrels = dict[str, dict[str, int]]
"""Query id → document id → score, above zero where relevant."""

TEXTS = {"corpus.jsonl": "document", "queries.jsonl": "query"}
JUDGEMENTS = "qrels/test.tsv"
COLUMNS = ["query-id", "corpus-id", "score"]
MAX_SCORE = 1_000  # trec_eval allocates memory for each possible score
_TREC_ITERATIONS = ("0", "Q0")  # the second of TREC's four columns, which no program uses


def beir_rows(
    path: StoragePath, key: str, start: int = 0, number: int = 1
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield byte offset, line number and content of each line, from byte `start`, where line `number` begins.

    Each has the texts `_id` and `text`, and may have the text `title`.
    """
    try:
        with local_copy(path).open("rb") as file:
            file.seek(start)
            for line in file:
                if line.strip() not in (b"", codecs.BOM_UTF8):
                    yield start, number, _row(line)
                start, number = start + len(line), number + 1
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}; allowed is a folder in BEIR's format") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{key}: {path} line {number}: {error}; each line must be a JSON object with the texts _id and text"
        ) from None


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    if not (isinstance(row, dict) and type(row.get("_id")) is str and type(row.get("text")) is str):
        raise ValueError("found no _id and text")
    if not isinstance(row.get("title"), str | None):
        raise ValueError(f"the title of {row['_id']!r} is not a text")
    if "\0" in row["_id"]:  # ends the id in trec_eval, which is written in C
        raise ValueError(f"the _id {row['_id']!r} has a null character")
    f"{row['_id']}{row['text']}{row.get('title')}".encode()  # raises for a lone surrogate
    return row


def read_qrels(path: StoragePath, queries: Container[str], key: str) -> Qrels:
    """All judgements. `queries` are the known ids: a first line without one of them and without a score is a header.

    A header may have more columns than BEIR's three, in any order. Without BEIR's names, the first three columns count.
    """
    number, rows = 1, list[tuple[int, list[str]]]()  # line number, columns
    qrels: Qrels = {}
    try:
        with local_copy(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if cells := _cells(line):
                    rows.append((number, cells))
        header = rows.pop(0)[1] if rows and not _is_judgement(rows[0][1], queries) else []
        columns = [0, 1, 2]
        if set(COLUMNS) <= set(header):
            columns = [header.index(name) for name in COLUMNS]
        elif all(len(cells) == 4 and cells[1] in _TREC_ITERATIONS for _, cells in rows):
            columns = [0, 2, 3]
        for line_number, cells in rows:
            number = line_number
            if len(cells) <= max(columns):
                raise ValueError(f"found {len(cells)} columns")
            query, document, score = (cells[column] for column in columns)
            known = qrels.setdefault(query, {}).setdefault(document, _score(score))
            if known != _score(score):
                raise ValueError(f"found the score {score} for {query!r} and {document!r}, which had {known} before")
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}; allowed is a folder in BEIR's format") from None
    except ValueError as error:
        raise ConfigError(
            f"{key}: {path} line {number}: {error}; each line must have {', '.join(COLUMNS)}, separated by tabs"
        ) from None
    return qrels


def _cells(line: bytes) -> list[str]:
    """The columns of a line, separated by tabs or, as TREC does, by spaces."""
    text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8").rstrip("\r\n")
    if "\0" in text:
        raise ValueError("found a null character")
    return text.split("\t") if "\t" in text and text.strip() else text.split()


def _is_judgement(cells: list[str], queries: Container[str]) -> bool:
    return cells[0] in queries or any(_is_number(cell) for cell in cells[2:4])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _score(cell: str) -> int:
    if not _is_number(cell) or not float(cell).is_integer() or float(cell) > MAX_SCORE:
        raise ValueError(f"the score {cell!r} is not a whole number up to {MAX_SCORE:,}")
    return int(float(cell))
