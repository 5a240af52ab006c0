"""Jaccard similarity of texts over 5-word shingles, and fast ways to find similar pairs.

    a, b = shingles("the quick brown fox jumps over"), shingles("The quick, brown fox jumps again")
    jaccard(a, b)                                                          # 1/3: they share one of three shingles

Words are those of words.py, in lower case; in Chinese or Thai each letter is one. A text of fewer than five words is
one shingle; a text without words has none and is similar to nothing. Shingles are 64-bit hashes: two different ones
collide once in 10^19 comparisons. Cost: 10 MB/s per core for shingles; signatures add little.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash
from rensa import RMinHash

from pipeline.data.words import words

Shingles = npt.NDArray[np.uint64]  # sorted, without duplicates

SHINGLE_WORDS = 5
BAND_RECALL = 0.99  # probability that a pair at the threshold shares a band
_SEED = 1
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio; odd, so multiplying by it loses no information
_WORD_HASHES_KEPT = 200_000  # 25 MB
_LONGEST_WORD_KEPT = 32  # characters; longer words rarely occur again


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
    """The shingles of each text. Batching is several times faster than one text at a time."""
    hashes: list[int] = []
    bounds = [0]
    for text in texts:
        found = [_word_hashes[word] for word in words(text.lower())]
        hashes += [0] * (SHINGLE_WORDS - len(found)) if 0 < len(found) < SHINGLE_WORDS else []
        hashes += found
        bounds.append(len(hashes))
    owner = np.repeat(np.arange(len(texts)), np.diff(bounds))
    count = max(len(hashes) - SHINGLE_WORDS + 1, 0)
    words_of_all = np.array(hashes, dtype=np.uint64)
    mixed = np.zeros(count, dtype=np.uint64)
    for i in range(SHINGLE_WORDS):
        mixed = mixed * _ODD + words_of_all[i : i + count]
    mixed ^= mixed >> np.uint64(32)  # because the low bits of a product depend only on low bits
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
    """|a ∩ b| / |a ∪ b|; 0 if both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def bands_of(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows per band): the longest bands that still find a pair at the threshold with BAND_RECALL.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    found = {
        rows: 1 - (1 - threshold**rows) ** (permutations // rows) for rows in range(1, int(math.sqrt(permutations)) + 1)
    }
    rows = max((rows for rows, recall in found.items() if recall >= BAND_RECALL), default=1)
    return permutations // rows, rows


def band_keys(sets: Sequence[Shingles], threshold: float, permutations: int) -> npt.NDArray[np.uint64]:
    """(texts, bands): similar texts share a key in at least one band. A text without shingles has keys 0."""
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
    """Finds the most similar of the added texts, exactly.

    NOTE: if two sets have similarity t or more, their prefixes share a shingle, where the prefix of a set of n shingles
    is the first n - ceil(t n) + 1 in any fixed order (Chaudhuri et al. 2006). Only prefixes are indexed.
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
        """(index, similarity) of the most similar text at or above the threshold, or None."""
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
    """Visit texts in `order` and drop each that is similar to a kept one: {dropped: (kept, similarity)}.

    Every dropped text is similar to a kept one, and no two kept texts are similar.
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
