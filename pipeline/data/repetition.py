"""How much of a text repeats itself: the statistics of Gopher's repetition rules (arXiv 2112.11446, section A.1.1).

>>> duplicate_shares(["menu", "Some text.", "menu", "menu"])  # 2 of 4 items, 8 of 22 characters came before
(0.5, 0.36363636363636365)
>>> ngram_shares("to be or not to be".split())[2]  # "to be" twice: 8 of 13 characters
0.6153846153846154

Cost: 0.3 to 0.6 µs a word, more in texts of some hundred words (1 µs) than in long ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOP_N = range(2, 5)
DUPLICATE_N = range(5, 11)
_Ints = NDArray[np.int64]


def duplicate_shares(items: Sequence[str]) -> tuple[float, float]:
    """Shares of the items, and of their characters, that are repetitions: the first of each kind is none."""
    kinds = set(items)
    if len(kinds) == len(items):
        return 0.0, 0.0
    n_chars = sum(map(len, items))
    repeated_chars = n_chars - sum(map(len, kinds))
    return (len(items) - len(kinds)) / len(items), repeated_chars / n_chars if n_chars else 0.0


def ngram_shares(words: Sequence[str]) -> dict[int, float]:
    """Share of the words' characters that repeated n-grams hold, by n (what lies between words is not counted).

    n = 2 to 4: count × length of the n-gram that is found most often, if more than once; the longest of equals. As
    occurrences may overlap, "a a a a" comes to 1.5. n = 5 to 10: characters inside any n-gram that came before, each
    character once.
    """
    shares = dict.fromkeys((*TOP_N, *DUPLICATE_N), 0.0)
    n_words = len(words)
    if n_words < 200 and len(set(itertools.pairwise(words))) >= n_words - 1:
        return shares  # no pair of words comes twice, which in short texts is usual, and quicker seen without arrays
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    groups = np.fromiter(map(ids.__getitem__, words), np.int64, n_words)
    ends = np.zeros(n_words + 1, np.int64)
    np.cumsum(np.fromiter(map(len, words), np.int64, n_words), out=ends[1:])
    starts = np.flatnonzero(np.bincount(groups)[groups] > 1)
    groups = groups[starts]
    for n in range(2, DUPLICATE_N.stop):
        starts, groups, first = _longer(starts, groups)
        if not len(starts):
            break
        if n in TOP_N:
            counts = np.bincount(groups)
            often = starts[first & (counts[groups] == counts.max())]
            chars = counts.max() * (ends[often + n] - ends[often]).max()
        else:
            chars = _covered(starts[~first], n, ends)
        shares[n] = float(chars / ends[-1])
    return shares


def _longer(starts: _Ints, groups: _Ints) -> tuple[_Ints, _Ints, NDArray[np.bool_]]:
    """From the starts of repeated n-grams, and which are equal, to those of (n+1)-grams, and which are first of equals.

    An (n+1)-gram is its first and its second n-gram, and repeats only if both do: so each step looks at what is left.
    """
    follows = np.flatnonzero(starts[1:] - starts[:-1] == 1)
    starts, keys = starts[follows], groups[follows] * (groups.max(initial=0) + 1) + groups[follows + 1]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    new = np.ones(len(keys) + 1, bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:-1])
    repeated, first = np.empty((2, len(keys)), bool)
    repeated[order] = ~(new[:-1] & new[1:])
    first[order] = new[:-1]
    groups = np.empty(len(keys), np.int64)
    groups[order] = np.cumsum(new[:-1])
    return starts[repeated], groups[repeated], first[repeated]


def _covered(starts: _Ints, n: int, ends: _Ints) -> np.int64:
    """Characters of the words that n-grams from these starts hold."""
    change = np.zeros(len(ends), np.int64)
    change[starts] += 1
    change[starts + n] -= 1
    inside = np.cumsum(change)[:-1] > 0
    return (ends[1:] - ends[:-1])[inside].sum()
