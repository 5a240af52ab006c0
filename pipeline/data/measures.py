"""What the quality rules count in a text: for each threshold of `QualityRules`, a function from text to number.

>>> MEASURES["min_words"][1](Counted("The cat sat."))
3

Most take less than 10 ns a character; finding words takes 10 in ASCII and 50 else, repeated n-grams 60.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable
from functools import cached_property

import regex

from pipeline.data.repetition import DUPLICATE_N, TOP_N, duplicate_shares, ngram_shares

_ASCII_WORDS = "".join(chr(c) if chr(c).isalnum() else " " for c in range(128))
_PAIRED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"  # kana, Chinese characters
_FOURED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
_NO_BLANKS = re.compile(f"[{_PAIRED}{_FOURED}]")
_WORDS = regex.compile(r"[^\W_]+")  # its \w holds marks, which Python's own leaves out, and cuts Hindi words at them
_WORDS_AND_PIECES = regex.compile(
    rf"(?V1)[\w&&[{_PAIRED}]]{{1,2}}|[\w&&[{_FOURED}]]{{1,4}}|[\w--[_{_PAIRED}{_FOURED}]]+"
)
_NOT_LATIN = re.compile("[\u0370-\u1dff\u2c80-\ufaff\U00010000-\U0003ffff]")
_THAI_OR_LAO = re.compile("[\u0e00-\u0eff]")
_MARKS = "\u3002\uff01\uff1f\uff61\u0964\u0965\u061f\u06d4\u1362\u0589\u0f0d\u104b\u17d4"  # ends of sentences not Latin
_TERMINAL = frozenset(".!?…\"'”’»」』" + _MARKS)
_SENTENCE_END = re.compile(r"""[.!?…]++["'”’»)\]]*+(\S?)""")  # and what follows, if no blank
_SENTENCE_MARK = re.compile(f"[{_MARKS}]+")
_BULLETS = frozenset("•‣◦▪●·*–-")
_ELLIPSES = ("...", "…")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_EMPTY_LINES = re.compile(r"\n\s*\n")
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
_RARE_PAIR = re.compile(  # less than 1 in 2,500 pairs in English and in each of 30 other languages of Latin script
    "b(?=[cdfghkmpqxz])|c(?=[bdfgmnpqvx])|d(?=[qx])|f(?=[cghkmpqvxz])|g(?=[cmpqxz])|h(?=[bcghxz])|j(?=[bcfghjpqrwx])"
    "|k(?=[fgpqwx])|l(?=[qx])|m(?=[fhqvx])|nx|p(?=[bqvwx])|q(?=[abcdfghjklmnopqrsvwxyz])|sx|tq|uq|v(?=[bcdfgmpqwx])"
    "|w(?=[bfjqtvx])|x(?=[dfghjklnqrsvwxyz])|y(?=[qx])|z(?=[fjqx])"
)
_STOP_WORDS = [
    frozenset(words.split())
    for words in (
        "the be to of and that have with",  # English, and Gopher's own; the others are ours
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
    """A text, and what several rules count in it, counted once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def words(self) -> list[str]:
        if self.text.isascii():
            return self.text.translate(_ASCII_WORDS).split()  # three times as fast as a pattern
        return (_WORDS_AND_PIECES if self.no_blanks_chars else _WORDS).findall(self.text)

    @cached_property
    def distinct_words(self) -> set[str]:
        return set(self.words)

    @cached_property
    def word_chars(self) -> int:
        return sum(map(len, self.words))

    @cached_property
    def no_blanks_chars(self) -> int:
        """Characters of scripts without blanks between words."""
        return 0 if self.text.isascii() else len(_NO_BLANKS.findall(self.text))

    @cached_property
    def longest_chunk(self) -> int:
        """The most ASCII characters without a blank."""
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
        """Characters of each stretch of encoded data; what a pattern needs is looked for first, being cheap."""
        has = (self.longest_chunk >= 60, "0x" in self.text or "\\x" in self.text, "\\u" in self.text)
        patterns = (pattern for pattern, needed in zip(_ENCODED, has, strict=True) if needed)
        return [len(stretch.group()) for pattern in patterns for stretch in pattern.finditer(self.text)]


Measure = Callable[[Counted], float | None]  # None: not to be judged


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _lines_with(text: Counted, test: Callable[[str], object]) -> float:
    """Share of the lines that pass a test."""
    return _share(sum(1 for line in text.lines if test(line)), len(text.lines))


def _lines_about(text: Counted, *phrases: str) -> float:
    """Share of the lines that hold one of these phrases, in capitals or not."""
    if not any(phrase in text.lower for phrase in phrases):
        return 0.0
    return _lines_with(text, lambda line: any(phrase in line.lower() for phrase in phrases))


def _mean_line(text: Counted) -> float:
    breaks = text.text.count("\n")
    return (len(text.text) - breaks) / (breaks + 1)


def _generated_markers(text: Counted) -> float:
    return len(_GENERATED.findall("\n".join(text.text.split("\n", 5)[:5]).lower()))


def _letter_run(text: Counted) -> float:
    return max((len(run.group()) for run in _REPEATED_LETTER.finditer(text.lower)), default=0)


def _mean_word(text: Counted) -> float | None:
    return None if 2 * text.no_blanks_chars > text.word_chars else _share(text.word_chars, len(text.words))


def _hashes_or_ellipses(text: Counted) -> float:
    ellipses = sum(map(text.text.count, _ELLIPSES))
    return _share(max(text.text.count("#"), ellipses), len(text.words))


def _stop_words(text: Counted) -> float | None:
    if not text.text.isascii() and 2 * len(_NOT_LATIN.findall(text.text)) > text.word_chars:
        return None
    return max(len(text.distinct_words & language) for language in _STOP_WORDS)


def _word_run(text: Counted) -> float:
    if not any(map(operator.eq, text.words, itertools.islice(text.words, 1, None))):
        return min(len(text.words), 1)
    return max(sum(1 for _ in run) for _, run in itertools.groupby(text.words))


def _rare_letter_pairs(text: Counted) -> float:
    rare, neighbours = len(_RARE_PAIR.findall(text.text)), text.word_chars - len(text.words)
    return _share(rare, neighbours) if rare > 1 and neighbours >= 8 else 0.0


def _data_lines(text: Counted) -> float:
    lines = [line for line in text.lines if any(map(str.isalnum, line))]  # a bracket alone says nothing
    return _share(sum(1 for line in lines if _DATA_LINE.fullmatch(line)), len(lines))


def _is_unpunctuated(text: Counted) -> bool:
    """Whether most is Thai or Lao, where blanks end sentences."""
    return text.no_blanks_chars > 0 and 2 * len(_THAI_OR_LAO.findall(text.text)) > text.word_chars


def _punctuated_lines(text: Counted) -> float | None:
    return None if _is_unpunctuated(text) else _lines_with(text, lambda line: line[-1] in _TERMINAL)


def _sentences(text: Counted) -> float | None:
    if _is_unpunctuated(text):
        return None
    return _SENTENCE_END.findall(text.text).count("") + len(_SENTENCE_MARK.findall(text.text))


def _ngrams(n: int) -> Measure:
    return lambda text: text.ngrams[n]


MEASURES: dict[str, tuple[str, Measure]] = {
    "max_curly_brackets": ("curly_brackets", lambda t: t.text.count("{")),
    "max_lorem_ipsum": ("lorem_ipsum", lambda t: t.lower.count("lorem ipsum")),
    "max_line_chars": ("long_line", lambda t: max(map(len, t.text.split("\n")))),
    "max_mean_line_chars": ("long_lines", _mean_line),
    "max_generated_markers": ("generated", _generated_markers),
    "max_encoded_chars": ("long_encoded", lambda t: max(t.encoded, default=0)),
    "max_encoded": ("encoded", lambda t: _share(sum(t.encoded), len(t.text))),
    "max_letter_run": ("letter_run", _letter_run),
    "min_words": ("few_words", lambda t: len(t.words)),
    "max_words": ("many_words", lambda t: len(t.words)),
    "min_alphanumeric": ("symbols", lambda t: _share(t.word_chars, len(t.text))),
    "min_mean_word_chars": ("short_words", _mean_word),
    "max_mean_word_chars": ("long_words", _mean_word),
    "max_word_chars": ("long_word", lambda t: t.longest_chunk),
    "max_symbols_per_word": ("hashes_or_ellipses", _hashes_or_ellipses),
    "min_alphabetic_words": ("numbers", lambda t: _share(len(t.words) - sum(map(str.isdigit, t.words)), len(t.words))),
    "min_stop_words": ("few_stop_words", _stop_words),
    "max_word_run": ("word_run", _word_run),
    "min_distinct_words": ("few_distinct_words", lambda t: _share(len(t.distinct_words), len(t.words))),
    "max_rare_letter_pairs": ("rare_letter_pairs", _rare_letter_pairs),
    "max_bullet_lines": ("bullet_lines", lambda t: _lines_with(t, lambda line: line[0] in _BULLETS)),
    "max_ellipsis_lines": ("ellipsis_lines", lambda t: _lines_with(t, lambda line: line.endswith(_ELLIPSES))),
    "max_newlines_per_word": ("newlines", lambda t: _share(t.text.count("\n"), len(t.words))),
    "min_punctuated_lines": ("few_punctuated_lines", _punctuated_lines),
    "max_short_lines": ("short_lines", lambda t: _lines_with(t, lambda line: len(line) <= 30)),
    "max_javascript_lines": ("javascript_lines", lambda t: _lines_about(t, "javascript")),
    "max_policy_lines": ("policy_lines", lambda t: _lines_about(t, *_POLICIES)),
    "max_data_lines": ("data_lines", _data_lines),
    "min_sentences": ("few_sentences", _sentences),
    "max_duplicate_lines": ("duplicate_lines", lambda t: t.duplicate_lines[0]),
    "max_duplicate_line_chars": ("duplicate_line_chars", lambda t: t.duplicate_lines[1]),
    "max_duplicate_paragraphs": ("duplicate_paragraphs", lambda t: t.duplicate_paragraphs[0]),
    "max_duplicate_paragraph_chars": ("duplicate_paragraph_chars", lambda t: t.duplicate_paragraphs[1]),
    **{f"max_top_{n}gram": (f"top_{n}gram", _ngrams(n)) for n in TOP_N},
    **{f"max_duplicate_{n}gram": (f"duplicate_{n}gram", _ngrams(n)) for n in DUPLICATE_N},
}
