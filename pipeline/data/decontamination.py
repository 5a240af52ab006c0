"""Finds the evaluation texts among the records: the queries and documents of BEIR folders.

    known = contamination(data)
    known.nearest(["apt-get", "The command line package manager of …"])         # ("beir: document 17", 1.0), or None

Evaluation texts are sanitized and redacted like the records, so that a text in another Unicode form, with soft hyphens
or with broken encoding is found too. Cost: about 1 KB of memory per document in each worker, and 0.1 ms per look-up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from pipeline.config import ConfigError, Data
from pipeline.core.files import digest_of
from pipeline.core.path import StoragePath, as_path
from pipeline.data.beir import TEXTS, beir_rows
from pipeline.data.filtering import record_normaliser
from pipeline.data.similarity import SimilarityIndex, shingles

KEY = "data.decontaminate"


class Contamination:
    """Finds texts similar to the queries and documents, with and without titles, of BEIR folders."""

    def __init__(self, folders: Iterable[str], threshold: float, normalise: Callable[[str], str]) -> None:
        self.names: list[str] = []
        self._index = SimilarityIndex(threshold)
        for folder in folders:
            for name, text in _texts(as_path(folder)):
                self.add(name, normalise(text))

    def add(self, name: str, text: str) -> None:
        self.names.append(name)
        self._index.add(shingles(text))

    def nearest(self, texts: Iterable[str]) -> tuple[str, float] | None:
        """(name, similarity) of the evaluation text most similar to any of `texts`, or None below the threshold."""
        matches = [match for text in texts if (match := self._index.nearest(shingles(text)))]
        best = max(matches, key=lambda match: match[1], default=None)
        return (self.names[best[0]], best[1]) if best else None


def contamination(data: Data) -> Contamination:
    """The texts of `data.decontaminate`. Cached by value, so each worker builds it once."""
    return _contamination(data.model_dump_json())


@lru_cache(maxsize=1)
def _contamination(settings: str) -> Contamination:
    data = Data.model_validate_json(settings)
    return Contamination(data.decontaminate, data.decontaminate_threshold, record_normaliser(data))


def check_beir_folders(folders: Iterable[str], rehash: bool = False) -> list[tuple[str, int | str]]:
    """Path and modification time (ns) of each file, or with `rehash` its path and content hash.

    Raises ConfigError if a folder lacks a file.
    """
    found = []
    for folder in folders:
        for name in TEXTS:
            path = as_path(folder) / name
            if not path.is_file():
                raise ConfigError(f"{KEY}: found no {name} in {folder}; give a folder with {' and '.join(TEXTS)}")
            found.append((str(path), digest_of(path, hashlib.sha256()) if rehash else path.stat().st_mtime_ns))
    return found


def _texts(folder: StoragePath) -> Iterator[tuple[str, str]]:
    for file, kind in TEXTS.items():
        for _, _, row in beir_rows(folder / file, KEY):
            name = f"{folder.name}: {kind} {row['_id']}"
            yield name, row["text"]
            if row.get("title"):
                yield name, f"{row['title']}\n{row['text']}"
