"""Text measures for the quality rules. quality.py compares them with thresholds.

>>> Counted("The cat sat.").words
['The', 'cat', 'sat']
>>> duplicate_shares(["menu", "Some text.", "menu", "menu"])  # 2 of 4 items, 8 of 22 characters are repetitions
(0.5, 0.36363636363636365)
>>> ngram_shares("to be or not to be".split())[2]  # "to be" twice: 8 of 13 characters
0.6153846153846154

Cost: most measures take less than 10 ns per character. Finding words takes 10 ns in ASCII and 50 ns in other text,
repeated n-grams 60 ns.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.data.words import dense_chars, pieces

TOP_N = range(2, 5)
DUPLICATE_N = range(5, 11)
Ints = npt.NDArray[np.int64]

_NOT_LATIN = re.compile("[\u0370-\u1dff\u2c80-\ufaff\U00010000-\U0003ffff]")
_THAI_OR_LAO = re.compile("[\u0e00-\u0eff]")
_MARKS = "\u3002\uff01\uff1f\uff61\u0964\u0965\u061f\u06d4\u1362\u0589\u0f0d\u104b\u17d4"  # non-Latin sentence ends
_TERMINAL = frozenset(".!?…\"'”’»」』" + _MARKS)
_SENTENCE_END = re.compile(r"""[.!?…]++["'”’»)\]]*+(\S?)""")  # and the next character unless it is a blank
_SENTENCE_MARK = re.compile(f"[{_MARKS}]+")
BULLETS = frozenset("•‣◦▪●·*–-")
ELLIPSES = ("...", "…")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_REPEATED_LETTER = re.compile(r"([a-z])\1\1+")
_GENERATED = re.compile("auto-?generated|automatically generated|generated automatically|file is generated|do not edit")
_ENCODED = (
    re.compile(r"""(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{60,}(?:[\s"'\\,]*[A-Za-z0-9+/=]{32,})*"""),
    re.compile(r"""(?:(?:0x|\\x)[0-9A-Fa-f]{2}[,\s"']*){8,}"""),
    re.compile(r"(?:\\u[0-9A-Fa-f]{4}){8,}"),
)
_DATA_LINE = re.compile(
    r"""(?>[\[\](){},:;|+\s-]+|\d[\w.]*|[bruf]{0,2}"(?:[^"\\]|\\.)*"|[bruf]{0,2}'(?:[^'\\]|\\.)*'"""
    r"|(?:[Tt]rue|[Ff]alse|None|null)\b)+"
)
_RARE_PAIR = re.compile(  # under 1 in 2,500 pairs in English and in each of 30 other languages of Latin script
    "b(?=[cdfghkmpqxz])|c(?=[bdfgmnpqvx])|d(?=[qx])|f(?=[cghkmpqvxz])|g(?=[cmpqxz])|h(?=[bcghxz])|j(?=[bcfghjpqrwx])"
    "|k(?=[fgpqwx])|l(?=[qx])|m(?=[fhqvx])|nx|p(?=[bqvwx])|q(?=[abcdfghjklmnopqrsvwxyz])|sx|tq|uq|v(?=[bcdfgmpqwx])"
    "|w(?=[bfjqtvx])|x(?=[dfghjklnqrsvwxyz])|y(?=[qx])|z(?=[fjqx])"
)
_STOP_WORDS = [
    frozenset(words.split())
    for words in (
        "the be to of and that have with",  # English, from Gopher; the others are ours
        "der die und das ist nicht mit ein",  # German
        "le la les et des est dans que",  # French
        "el la los que en y con por",  # Spanish
        "il la di che e per non una",  # Italian
        "o a que e do para com uma",  # Portuguese
        "de het een en van is niet met",  # Dutch
        "och att det som en för inte på",  # Swedish
        "og at det som en er for ikke",  # Danish, Norwegian
        "ja on ei että se oli myös kuin",  # Finnish
        "i w nie na się z do że",  # Polish
        "a se v na je že s to",  # Czech, Slovak
        "i je u na se da za su",  # Croatian
        "a az és hogy nem is egy van",  # Hungarian
        "și în de la cu nu este care",  # Romanian
        "ir yra kad su į iš kaip bei",  # Lithuanian
        "un ir ar no par uz ka kas",  # Latvian
        "ve bir bu için de ile da olarak",  # Turkish
        "yang dan di untuk dengan dari ini itu",  # Indonesian, Malay
        "và của là có được cho không một",  # Vietnamese
    )
]


class Counted:
    """A text, and the counts that several measures share, computed once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def words(self) -> list[str]:
        return pieces(self.text)

    @cached_property
    def distinct_words(self) -> set[str]:
        return set(self.words)

    @cached_property
    def word_chars(self) -> int:
        return sum(map(len, self.words))

    @cached_property
    def dense_chars(self) -> int:
        return dense_chars(self.text)

    @cached_property
    def longest_chunk(self) -> int:
        """Length of the longest run of ASCII characters without a blank."""
        chunks = self.text.split()
        return max(map(len, chunks if self.text.isascii() else filter(str.isascii, chunks)), default=0)

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        return duplicate_shares(self.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        return duplicate_shares([p for p in map(str.strip, _EMPTY_LINES.split(self.text)) if p])

    @cached_property
    def ngrams(self) -> dict[int, float]:
        return ngram_shares(self.words)

    @cached_property
    def encoded(self) -> list[int]:
        """Lengths of the stretches of encoded data. A pattern runs only if a cheap check passes."""
        has = (self.longest_chunk >= 60, "0x" in self.text or "\\x" in self.text, "\\u" in self.text)
        patterns = (pattern for pattern, needed in zip(_ENCODED, has, strict=True) if needed)
        return [len(stretch.group()) for pattern in patterns for stretch in pattern.finditer(self.text)]


Measure = Callable[[Counted], float | None]
"""A number, or None (the text passes) if the measure makes no sense for the text's script."""


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def lines_with(text: Counted, test: Callable[[str], object]) -> float:
    """Share of the lines that pass a test."""
    return share(sum(1 for line in text.lines if test(line)), len(text.lines))


def lines_about(text: Counted, *phrases: str) -> float:
    """Share of the lines that contain one of these phrases, ignoring case."""
    if not any(phrase in text.lower for phrase in phrases):
        return 0.0
    return lines_with(text, lambda line: any(phrase in line.lower() for phrase in phrases))


def mean_line(text: Counted) -> float:
    breaks = text.text.count("\n")
    return (len(text.text) - breaks) / (breaks + 1)


def generated_markers(text: Counted) -> float:
    return len(_GENERATED.findall("\n".join(text.text.split("\n", 5)[:5]).lower()))


def letter_run(text: Counted) -> float:
    return max((len(run.group()) for run in _REPEATED_LETTER.finditer(text.lower)), default=0)


def mean_word(text: Counted) -> float | None:
    return None if 2 * text.dense_chars > text.word_chars else share(text.word_chars, len(text.words))


def hashes_or_ellipses(text: Counted) -> float:
    ellipses = sum(map(text.text.count, ELLIPSES))
    return share(max(text.text.count("#"), ellipses), len(text.words))


def alphabetic_words(text: Counted) -> float:
    return share(len(text.words) - sum(map(str.isdigit, text.words)), len(text.words))


def stop_words(text: Counted) -> float | None:
    if not text.text.isascii() and 2 * len(_NOT_LATIN.findall(text.text)) > text.word_chars:
        return None
    return max(len(text.distinct_words & language) for language in _STOP_WORDS)


def word_run(text: Counted) -> float:
    if not any(map(operator.eq, text.words, itertools.islice(text.words, 1, None))):
        return min(len(text.words), 1)
    return max(sum(1 for _ in run) for _, run in itertools.groupby(text.words))


def rare_letter_pairs(text: Counted) -> float:
    rare, neighbours = len(_RARE_PAIR.findall(text.text)), text.word_chars - len(text.words)
    return share(rare, neighbours) if rare > 1 and neighbours >= 8 else 0.0


def data_lines(text: Counted) -> float:
    lines = [line for line in text.lines if any(map(str.isalnum, line))]  # skip lines of brackets only
    return share(sum(1 for line in lines if _DATA_LINE.fullmatch(line)), len(lines))


def ellipsis_lines(text: Counted) -> float:
    return lines_with(text, lambda line: line.endswith(ELLIPSES))


def _is_unpunctuated(text: Counted) -> bool:
    """Whether most of the text is Thai or Lao, where a blank ends a sentence."""
    return text.dense_chars > 0 and 2 * len(_THAI_OR_LAO.findall(text.text)) > text.word_chars


def punctuated_lines(text: Counted) -> float | None:
    return None if _is_unpunctuated(text) else lines_with(text, lambda line: line[-1] in _TERMINAL)


def sentences(text: Counted) -> float | None:
    if _is_unpunctuated(text):
        return None
    return _SENTENCE_END.findall(text.text).count("") + len(_SENTENCE_MARK.findall(text.text))


def duplicate_shares(items: Sequence[str]) -> tuple[float, float]:
    """Share of the items that repeat an earlier one, and their share of the characters."""
    kinds = set(items)
    if len(kinds) == len(items):
        return 0.0, 0.0
    n_chars = sum(map(len, items))
    repeated_chars = n_chars - sum(map(len, kinds))
    return (len(items) - len(kinds)) / len(items), repeated_chars / n_chars if n_chars else 0.0


def ngram_shares(words: Sequence[str]) -> dict[int, float]:
    """For each n, the share of the words' characters in repeated n-grams (Gopher, section A.1.1).

    n = 2 to 4: count × length of the most frequent n-gram, if it occurs more than once; the longest one on a tie.
    Occurrences may overlap, so "a a a a" gives 1.5. n = 5 to 10: characters inside any n-gram that occurred before,
    each counted once. Cost: 0.3 to 0.6 µs per word; 1 µs in texts of a few hundred words.
    """
    shares = dict.fromkeys((*TOP_N, *DUPLICATE_N), 0.0)
    n_words = len(words)
    if n_words < 200 and len(set(itertools.pairwise(words))) >= n_words - 1:
        return shares  # no pair repeats: common in short texts, and faster without arrays
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


def _longer(starts: Ints, groups: Ints) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """The repeated (n+1)-grams, from the repeated n-grams: their starts, their groups, and which are first in a group.

    An (n+1)-gram repeats only if both of its n-grams do, so each step has fewer candidates.
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


def _covered(starts: Ints, n: int, ends: Ints) -> np.int64:
    """Characters of the words inside the n-grams with these starts."""
    change = np.zeros(len(ends), np.int64)
    change[starts] += 1
    change[starts + n] -= 1
    inside = np.cumsum(change)[:-1] > 0
    return (ends[1:] - ends[:-1])[inside].sum()
