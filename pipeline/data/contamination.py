"""What of the training data an evaluation set holds too: equal texts and nearly equal ones, found exactly.

    known = contamination(("debian/beir",), 0.8)
    known.of(["apt-get", "The command line package manager of …"])        # ("beir: document 17", 1.0), or None

Cost: about 1 KB of memory a document in each worker, and a look-up in a tenth of a millisecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache

from pipeline.config import ConfigError
from pipeline.data.manifest import sha256
from pipeline.data.shingles import Survivors, shingles
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath, as_path

FILES = {"corpus.jsonl": "document", "queries.jsonl": "query"}


class Contamination:
    """The documents, with their titles and without, and the queries of BEIR folders."""

    def __init__(self, folders: Iterable[str], threshold: float) -> None:
        self.names: list[str] = []
        self._texts = Survivors(threshold)
        for folder in folders:
            for name, text in _texts(as_path(folder)):
                self.names.append(name)
                self._texts.add(shingles(text))

    def of(self, texts: Iterable[str]) -> tuple[str, float] | None:
        """The evaluation text that is most like one of `texts`, and their similarity; None where none is alike."""
        found = [match for text in texts if (match := self._texts.nearest(shingles(text)))]
        best = max(found, key=lambda match: match[1], default=None)
        return (self.names[best[0]], best[1]) if best else None


@lru_cache(maxsize=1)
def contamination(folders: tuple[str, ...], threshold: float) -> Contamination:
    """The same object again for the same folders: each worker builds it once."""
    return Contamination(folders, threshold)


def check_folders(folders: Iterable[str], rehash: bool = False) -> list[tuple[str, int | str]]:
    """Each file's path and time of change (ns), or the hash of its content to `rehash`.

    Raises ConfigError for a folder without the files.
    """
    found = []
    for folder in folders:
        for name in FILES:
            path = as_path(folder) / name
            if not path.is_file():
                raise ConfigError(f"data.decontaminate: found no {name} in {folder}; allowed are BEIR folders")
            found.append((str(path), sha256(path) if rehash else path.stat().st_mtime_ns))
    return found


def _texts(folder: StoragePath) -> Iterator[tuple[str, str]]:
    for file, kind in FILES.items():
        with fetched(folder / file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    name, text, title = f"{folder.name}: {kind} {row['_id']}", row["text"], row.get("title")
                    if not isinstance(text, str):
                        raise TypeError
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise ConfigError(
                        f"data.decontaminate: line {number} of {folder / file} has no _id and text; "
                        "allowed are lines of JSON objects with both"
                    ) from None
                yield name, text
                if title:
                    yield name, f"{title}\n{text}"
