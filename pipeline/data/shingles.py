"""How alike two texts are: the Jaccard similarity of their 5-word shingles, and fast ways to the pairs that are alike.

    a, b = shingles("the quick brown fox jumps over"), shingles("The quick, brown fox jumps again")
    jaccard(a, b)                                     # 1/3: of three different shingles they share one

Words are runs of letters, digits and underscores, lower-cased; a text of fewer than five is one shingle. A text without
words has no shingles and is like nothing. Shingles are 64-bit hashes, so two different ones are taken for equal once in
10^19 comparisons. Cost: 10 MB/s a core for shingles; signatures add nothing to speak of.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash
from rensa import RMinHash

Shingles = npt.NDArray[np.uint64]  # sorted, each once

SHINGLE_WORDS = 5
BAND_RECALL = 0.99  # probability that a pair at the threshold shares a band
_SEED = 1
_WORD = re.compile(r"\w+")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: multiplying by it loses nothing
_WORD_HASHES_KEPT = 200_000  # 25 MB
_LONGEST_WORD_KEPT = 32  # characters; longer ones seldom come again


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
    """The shingles of each text; many texts at once are several times faster than one by one."""
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
    mixed ^= mixed >> np.uint64(32)  # the product's low bits know the low bits alone
    inside = owner[:count] == owner[len(hashes) - count :]
    return _sorted_sets(mixed[inside] * _ODD, owner[:count][inside], len(texts))


def _sorted_sets(values: Shingles, owner: npt.NDArray[np.int64], owners: int) -> list[Shingles]:
    """Each owner's values, sorted, each once."""
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
    """(records, bands): texts that are alike share a key in some band. 0 stands for a text without shingles."""
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


class Survivors:
    """Texts that stay. A new one is compared with those that it could be alike to, exactly.

    NOTE: of a set of n shingles, in any fixed order, the first n - ceil(t n) + 1 must hold one that the other set's
    first ones hold too, if the similarity is t or more (Chaudhuri et al. 2006): only these are indexed.
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
        """The most similar text that reaches the threshold, by its place in the order of adding, and its similarity."""
        places = {place for shingle in self._prefix(text) for place in self._first.get(shingle, ())}
        found = ((jaccard(text, self._sets[place]), -place) for place in places if self._sizes_allow(text, place))
        best = max(found, default=(0.0, 0))
        return (-best[1], best[0]) if best[0] >= self.threshold else None

    def _prefix(self, text: Shingles) -> list[int]:
        return text[: len(text) - math.ceil(self.threshold * len(text) - 1e-9) + 1].tolist() if len(text) else []

    def _sizes_allow(self, text: Shingles, place: int) -> bool:
        sizes = sorted((len(text), len(self._sets[place])))
        return sizes[0] >= self.threshold * sizes[1] - 1e-9


def thin_out(sets: Sequence[Shingles], order: Iterable[int], threshold: float) -> dict[int, tuple[int, float]]:
    """Go through texts in `order`; one that is alike to one that stayed goes: {place: (survivor, similarity)}.

    So whatever goes has a survivor at the threshold or above, and no two survivors are that alike.
    """
    survivors = Survivors(threshold)
    stayed: list[int] = []
    gone: dict[int, tuple[int, float]] = {}
    for place in order:
        match = survivors.nearest(sets[place])
        if match:
            gone[place] = (stayed[match[0]], match[1])
        else:
            survivors.add(sets[place])
            stayed.append(place)
    return gone
