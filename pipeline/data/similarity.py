"""Similarity of texts: the Jaccard similarity of their 5-word shingles, and fast ways to find similar pairs.

    a, b = shingles("the quick brown fox jumps over"), shingles("The quick, brown fox jumps again")
    jaccard(a, b)                                                          # 1/3: they share one of three shingles
    known = contamination(("debian/beir",), 0.8)
    known.of(["apt-get", "The command line package manager of …"])         # ("beir: document 17", 1.0), or None

Words are runs of letters, digits and underscores, in lower case. A text of fewer than five words is one shingle; a text
without words has none and is similar to nothing. Shingles are 64-bit hashes: two different ones are taken for equal
once in 10^19 comparisons. Cost: 10 MB/s a core for shingles; signatures add next to nothing. Contamination: about 1 KB
of memory a document in each worker, and a look-up in a tenth of a millisecond.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash
from rensa import RMinHash

from pipeline.config import ConfigError
from pipeline.core.files import digest_of, fetched
from pipeline.core.path import StoragePath, as_path

Shingles = npt.NDArray[np.uint64]  # sorted, each once

SHINGLE_WORDS = 5
BEIR_FILES = {"corpus.jsonl": "document", "queries.jsonl": "query"}
BAND_RECALL = 0.99  # probability that a pair at the threshold shares a band
_SEED = 1
_WORD = re.compile(r"\w+")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: multiplying by it loses nothing
_WORD_HASHES_KEPT = 200_000  # 25 MB
_LONGEST_WORD_KEPT = 32  # characters; longer words seldom occur again


class _WordHashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        value = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        if len(word) <= _LONGEST_WORD_KEPT:
            if len(self) >= _WORD_HASHES_KEPT:
                self.clear()
            self[word] = value
        return value


_word_hashes = _WordHashes()


def shingle_sets(texts: Sequence[str]) -> list[Shingles]:
    """The shingles of each text. Many texts at once are several times faster than one by one."""
    hashes: list[int] = []
    bounds = [0]
    for text in texts:
        words = [_word_hashes[word] for word in _WORD.findall(text.lower())]
        hashes += [0] * (SHINGLE_WORDS - len(words)) if 0 < len(words) < SHINGLE_WORDS else []
        hashes += words
        bounds.append(len(hashes))
    owner = np.repeat(np.arange(len(texts)), np.diff(bounds))
    count = max(len(hashes) - SHINGLE_WORDS + 1, 0)
    words_of_all = np.array(hashes, dtype=np.uint64)
    mixed = np.zeros(count, dtype=np.uint64)
    for i in range(SHINGLE_WORDS):
        mixed = mixed * _ODD + words_of_all[i : i + count]
    mixed ^= mixed >> np.uint64(32)  # the low bits of a product depend on low bits only
    inside = owner[:count] == owner[len(hashes) - count :]
    return _sorted_sets(mixed[inside] * _ODD, owner[:count][inside], len(texts))


def _sorted_sets(values: Shingles, owner: npt.NDArray[np.int64], owners: int) -> list[Shingles]:
    """The values of each owner, sorted and without duplicates."""
    order = np.lexsort((values, owner))
    values, owner = values[order], owner[order]
    first = np.ones(len(values), dtype=bool)
    first[1:] = (values[1:] != values[:-1]) | (owner[1:] != owner[:-1])
    values, owner = values[first], owner[first]
    return np.split(values, np.searchsorted(owner, np.arange(1, owners))) if owners else []


def shingles(text: str) -> Shingles:
    """The text's shingles."""
    return shingle_sets([text])[0]


def jaccard(a: Shingles, b: Shingles) -> float:
    """|a ∩ b| / |a ∪ b|; 0 where both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def bands_of(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows a band: the longest bands with which a pair at the threshold is found with BAND_RECALL.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    found = {
        rows: 1 - (1 - threshold**rows) ** (permutations // rows) for rows in range(1, int(math.sqrt(permutations)) + 1)
    }
    rows = max((rows for rows, recall in found.items() if recall >= BAND_RECALL), default=1)
    return permutations // rows, rows


def band_keys(sets: Sequence[Shingles], threshold: float, permutations: int) -> npt.NDArray[np.uint64]:
    """(texts, bands): similar texts share a key in some band. The keys of a text without shingles are 0."""
    bands, rows = bands_of(threshold, permutations)
    keys = np.zeros((len(sets), bands), dtype=np.uint64)
    if not any(map(len, sets)):
        return keys
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in sets])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, permutations, _SEED)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64)[:, : bands * rows].reshape(len(sets), bands, rows)
    for row in range(rows):
        keys = keys * _ODD + signatures[:, :, row] + np.uint64(1)
    keys[[len(one) == 0 for one in sets]] = 0
    return keys


class SimilarityIndex:
    """Finds, exactly, the most similar of the texts that were added.

    NOTE: of a set of n shingles, in any fixed order, the first n - ceil(t n) + 1 must contain one that is among the
    other set's first ones, if the similarity is t or more (Chaudhuri et al. 2006). Only these are indexed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sets: list[Shingles] = []
        self._first: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, text: Shingles) -> None:
        for shingle in self._prefix(text):
            self._first[shingle].append(len(self._sets))
        self._sets.append(text)

    def nearest(self, text: Shingles) -> tuple[int, float] | None:
        """The most similar text that reaches the threshold, as (how many were added before it, similarity)."""
        places = {place for shingle in self._prefix(text) for place in self._first.get(shingle, ())}
        found = ((jaccard(text, self._sets[place]), -place) for place in places if self._sizes_allow(text, place))
        best = max(found, default=(0.0, 0))
        return (-best[1], best[0]) if best[0] >= self.threshold else None

    def _prefix(self, text: Shingles) -> list[int]:
        return text[: len(text) - math.ceil(self.threshold * len(text) - 1e-9) + 1].tolist() if len(text) else []

    def _sizes_allow(self, text: Shingles, place: int) -> bool:
        sizes = sorted((len(text), len(self._sets[place])))
        return sizes[0] >= self.threshold * sizes[1] - 1e-9


def drop_similar(sets: Sequence[Shingles], order: Iterable[int], threshold: float) -> dict[int, tuple[int, float]]:
    """Go through texts in `order` and drop each that is similar to one kept before: {dropped: (kept, similarity)}.

    Each dropped text has a kept one at the threshold or above, and no two kept ones are that similar.
    """
    index = SimilarityIndex(threshold)
    kept: list[int] = []
    dropped: dict[int, tuple[int, float]] = {}
    for place in order:
        if match := index.nearest(sets[place]):
            dropped[place] = (kept[match[0]], match[1])
        else:
            index.add(sets[place])
            kept.append(place)
    return dropped


class Contamination:
    """The documents, with and without their titles, and the queries of BEIR folders. Finds texts similar to them."""

    def __init__(self, folders: Iterable[str], threshold: float) -> None:
        self.names: list[str] = []
        self._index = SimilarityIndex(threshold)
        for folder in folders:
            for name, text in _beir_texts(as_path(folder)):
                self.add(name, text)

    def add(self, name: str, text: str) -> None:
        self.names.append(name)
        self._index.add(shingles(text))

    def of(self, texts: Iterable[str]) -> tuple[str, float] | None:
        """The evaluation text most similar to one of `texts`, and the similarity; None if it is below the threshold."""
        found = [match for text in texts if (match := self._index.nearest(shingles(text)))]
        best = max(found, key=lambda match: match[1], default=None)
        return (self.names[best[0]], best[1]) if best else None


@lru_cache(maxsize=1)
def contamination(folders: tuple[str, ...], threshold: float) -> Contamination:
    """Cached, so that each worker builds it once."""
    return Contamination(folders, threshold)


def check_beir_folders(folders: Iterable[str], rehash: bool = False) -> list[tuple[str, int | str]]:
    """What identifies their files: path and time of change (ns), or with `rehash` path and hash of the content.

    Raises ConfigError for a folder without the files.
    """
    found = []
    for folder in folders:
        for name in BEIR_FILES:
            path = as_path(folder) / name
            if not path.is_file():
                raise ConfigError(f"data.decontaminate: found no {name} in {folder}; allowed are BEIR folders")
            found.append((str(path), digest_of(path, hashlib.sha256()) if rehash else path.stat().st_mtime_ns))
    return found


def _beir_texts(folder: StoragePath) -> Iterator[tuple[str, str]]:
    for file, kind in BEIR_FILES.items():
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
