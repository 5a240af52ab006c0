"""Which texts are worth keeping: rules on what can be counted in a text, and where their thresholds are from.

>>> quality_verdict("Buy now! Buy now! Buy now! Buy now!", PRESETS["short"])
'quality_top_2gram'
>>> quality_verdict("A man is playing a guitar.", with_thresholds("short", {"min_words": 7}))
'quality_few_words'

A record is judged whole: it stays as it is, or it goes. So C4's page rules (lorem ipsum, curly brackets, sentences)
reject here too, and of its line rules, which drop lines, those on JavaScript and policies reject by share of lines,
the one on word length by any such word, and the one on terminal punctuation is FineWeb's `min_punctuated_lines`.

A word is a run of letters, marks and digits. Scripts without blanks between words are cut into pieces near their mean
word: Chinese and Japanese into pairs of characters, Thai, Lao, Khmer and Burmese into fours. A line has something
other than blanks on it, which are cut off its ends.

Cost a core, measured on Linux's documentation: web 9 MB/s, 6 where nothing is rejected early; short 9; code 20.
"""

from __future__ import annotations

import difflib
import itertools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property

import regex

from pipeline.text.repetition import DUPLICATE_N, TOP_N, duplicate_shares, ngram_shares


@dataclass(frozen=True)
class QualityRules:
    """Thresholds: a text passes at the threshold itself; None, and 0 of a `min_`, inf of a `max_`, turn a rule off.

    Gopher: arXiv 2112.11446, section A.1.1 and table A1. C4: Raffel et al., JMLR 2020, section 2.2. FineWeb: arXiv
    2406.17557, section 3.6. StarCoder2: arXiv 2402.19173, section 2.1. Ours: see `PRESETS`.
    """

    max_curly_brackets: float | None = None
    """Count of {. C4: 0, as they are of code."""
    max_lorem_ipsum: float | None = None
    """Count of the filler text's first two words. C4: 0."""
    max_line_chars: float | None = None
    """Characters of the longest line. StarCoder2: 1,000."""
    max_mean_line_chars: float | None = None
    """Characters a line on average, of all lines. StarCoder2: 100."""
    max_generated_markers: float | None = None
    """Count of "auto-generated" and the like in the first five lines. StarCoder2: 0."""
    max_encoded_chars: float | None = None
    """Characters of the longest stretch of base64, hexadecimal bytes or \\\\u escapes. StarCoder2: 1,024."""
    max_encoded: float | None = None
    """Share of the characters in such stretches. StarCoder2: 0.5."""
    max_letter_run: float | None = None
    """The most letters a to z in a row that are the same (3 at least, or 0). Ours."""
    min_words: float | None = None
    """Count. Gopher: 50."""
    max_words: float | None = None
    """Count. Gopher: 100,000."""
    min_alphanumeric: float | None = None
    """Share of the characters that are letters, marks or digits. The Stack (bigcode-dataset, preprocessing): 0.25."""
    min_mean_word_chars: float | None = None
    """Characters a word on average; not judged where most are of scripts without blanks. Gopher: 3."""
    max_mean_word_chars: float | None = None
    """Likewise. Gopher: 10."""
    max_word_chars: float | None = None
    """The most ASCII characters without a blank. C4 (its code): 1,000."""
    max_symbols_per_word: float | None = None
    """# or ellipses, the more frequent, a word. Gopher: 0.1."""
    min_alphabetic_words: float | None = None
    """Share of the words that are not digits alone. Gopher: 0.8."""
    min_stop_words: float | None = None
    """How many of eight function words occur, by the best of the languages listed here; not judged where most letters
    are not Latin. Gopher, in English alone: 2."""
    max_word_run: float | None = None
    """The most words in a row that are the same. Ours."""
    min_distinct_words: float | None = None
    """Share of the words that are first of their kind. Ours."""
    max_rare_letter_pairs: float | None = None
    """Share of neighbours in words that are letter pairs as rare as "jq"; judged from 12 neighbours. Ours."""
    max_bullet_lines: float | None = None
    """Share of lines that start with a bullet. Gopher: 0.9."""
    max_ellipsis_lines: float | None = None
    """Share of lines that end with an ellipsis. Gopher: 0.3."""
    max_newlines_per_word: float | None = None
    """FineWeb (datatrove): 0.3."""
    min_punctuated_lines: float | None = None
    """Share of lines that end in terminal punctuation; not judged where most is Thai or Lao. FineWeb: 0.12."""
    max_short_lines: float | None = None
    """Share of lines of at most 30 characters. FineWeb: 0.67."""
    max_javascript_lines: float | None = None
    """Share of lines with the word JavaScript, which C4 drops. The share is ours: 0.3, as Gopher's of ellipses."""
    max_policy_lines: float | None = None
    """Share of lines on cookies, privacy and terms of use, which C4 drops. Ours, likewise: 0.3."""
    max_data_lines: float | None = None
    """Share of lines of literals and brackets alone. Ours."""
    min_sentences: float | None = None
    """Count of terminal punctuation at a word's end; not judged where most is Thai or Lao. C4: 3 (its preprint: 5)."""
    max_duplicate_lines: float | None = None
    """Share of lines that came before. Gopher: 0.3."""
    max_duplicate_line_chars: float | None = None
    """Share of the characters in such lines. Gopher: 0.2. FineWeb: 0.01 in appendix E.4 and in datatrove, though 0.1 in
    section 3.6."""
    max_duplicate_paragraphs: float | None = None
    """Share of paragraphs (between empty lines) that came before. Gopher: 0.3."""
    max_duplicate_paragraph_chars: float | None = None
    """Share of the characters in such paragraphs. Gopher: 0.2."""
    max_top_2gram: float | None = None
    """Count × characters of the most frequent pair of words, of all words' characters. Gopher: 0.2."""
    max_top_3gram: float | None = None
    """Gopher: 0.18."""
    max_top_4gram: float | None = None
    """Gopher: 0.16."""
    max_duplicate_5gram: float | None = None
    """Share of all words' characters that are inside five words that came before. Gopher: 0.15."""
    max_duplicate_6gram: float | None = None
    """Gopher: 0.14."""
    max_duplicate_7gram: float | None = None
    """Gopher: 0.13."""
    max_duplicate_8gram: float | None = None
    """Gopher: 0.12."""
    max_duplicate_9gram: float | None = None
    """Gopher: 0.11."""
    max_duplicate_10gram: float | None = None
    """Gopher: 0.1."""


_OFF = QualityRules()
_WEB = QualityRules(
    max_curly_brackets=0,
    max_lorem_ipsum=0,
    min_words=50,
    max_words=100_000,
    min_mean_word_chars=3,
    max_mean_word_chars=10,
    max_word_chars=1000,
    max_symbols_per_word=0.1,
    min_alphabetic_words=0.8,
    min_stop_words=2,
    max_bullet_lines=0.9,
    max_ellipsis_lines=0.3,
    max_newlines_per_word=0.3,
    min_punctuated_lines=0.12,
    max_short_lines=0.67,
    max_javascript_lines=0.3,
    max_policy_lines=0.3,
    min_sentences=3,
    max_duplicate_lines=0.3,
    max_duplicate_line_chars=0.01,
    max_duplicate_paragraphs=0.3,
    max_duplicate_paragraph_chars=0.2,
    max_top_2gram=0.2,
    max_top_3gram=0.18,
    max_top_4gram=0.16,
    max_duplicate_5gram=0.15,
    max_duplicate_6gram=0.14,
    max_duplicate_7gram=0.13,
    max_duplicate_8gram=0.12,
    max_duplicate_9gram=0.11,
    max_duplicate_10gram=0.1,
)
_SHORT = QualityRules(
    max_letter_run=4,
    min_words=1,
    min_alphanumeric=0.4,
    min_mean_word_chars=1.5,
    max_mean_word_chars=30,
    max_word_chars=100,
    min_alphabetic_words=0.5,
    max_word_run=3,
    min_distinct_words=0.3,
    max_rare_letter_pairs=0.1,
    max_top_2gram=0.6,
    max_top_3gram=0.6,
    max_top_4gram=0.6,
    max_duplicate_5gram=0.5,
)
_CODE = QualityRules(
    max_line_chars=1000,
    max_mean_line_chars=100,
    max_generated_markers=0,
    max_encoded_chars=1024,
    max_encoded=0.5,
    min_alphanumeric=0.25,
    max_data_lines=0.8,
)
PRESETS: dict[str, QualityRules] = {"none": _OFF, "web": _WEB, "short": _SHORT, "code": _CODE}


def quality_verdict(text: str, rules: QualityRules) -> str | None:
    """Name of the first rule that the text fails, such as `quality_few_words`, or None; cheap rules are tried first."""
    seen = _Text(text)
    for reason, measure, is_minimum, threshold in _active(rules):
        value = measure(seen)
        if value is not None and (value < threshold if is_minimum else value > threshold):
            return f"quality_{reason}"
    return None


def with_thresholds(preset: str, thresholds: Mapping[str, float]) -> QualityRules:
    """The preset's rules with some thresholds of one's own. Raises ValueError for a name that is none."""
    names = [field.name for field in fields(QualityRules)]
    for name in thresholds:
        if name not in names:
            known = difflib.get_close_matches(name, names, n=3) or names
            raise ValueError(f"quality threshold `{name}` is unknown: use one of {', '.join(known)}")
    return replace(PRESETS[preset], **thresholds)


@cache
def _active(rules: QualityRules) -> list[tuple[str, _Measure, bool, float]]:
    """Reason, measure, whether the threshold is a minimum, and the threshold, of each rule that is on."""
    on = ((name, threshold) for name, threshold in asdict(rules).items() if threshold is not None)
    return [(*_MEASURES[name], name.startswith("min_"), threshold) for name, threshold in on]


class _Text:
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


_Measure = Callable[[_Text], float | None]

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
_TERMINAL = frozenset(".!?…。！？｡।॥؟۔።։།။\"'”’»」』")
_SENTENCE_END = re.compile(r"""[.!?…。！？｡।॥؟۔።։།။]+(?:(?<=[。！？｡।॥؟۔።։།။])|["'”’»)\]]*(?!\S))""")
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
_RARE_PAIR = re.compile(
    "b(?=[cdfghkmpqxz])|c(?=[bdfgmnpqvx])|d(?=[qx])|f(?=[cghkmpqvxz])|g(?=[cmpqxz])|h(?=[bcghxz])|j(?=[bcfghjpqrwx])"
    "|k(?=[fgpqwx])|l(?=[qx])|m(?=[fhqvx])|nx|p(?=[bqvwx])|q(?=[abcdfghjklmnopqrsvwxyz])|sx|tq|uq|v(?=[bcdfgmpqwx])"
    "|w(?=[bfjqtvx])|x(?=[dfghjklnqrsvwxyz])|y(?=[qx])|z(?=[fjqx])"
)
_STOP_WORDS = [
    frozenset(words.split())
    for words in (
        "the be to of and that have with",  # English, Gopher's own; those below are ours
        "der die und das ist nicht mit ein",
        "le la les et des est dans que",
        "el la los que en y con por",
        "il la di che e per non una",
        "o a que e do para com uma",
        "de het een en van is niet met",
        "och att det som en för inte på",
        "og at det som en er for ikke",
        "ja on ei että se oli myös kuin",
        "i w nie na się z do że",
        "a se v na je že s to",
        "i je u na se da za su",
        "a az és hogy nem is egy van",
        "și în de la cu nu este care",
        "ve bir bu için de ile da olarak",
        "yang dan di untuk dengan dari ini itu",
        "và của là có được cho không một",
    )
]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _lines_with(text: _Text, test: Callable[[str], object]) -> float:
    """Share of the lines that pass a test."""
    return _share(sum(1 for line in text.lines if test(line)), len(text.lines))


def _lines_about(text: _Text, *phrases: str) -> float:
    """Share of the lines that hold one of these phrases, in capitals or not."""
    if not any(phrase in text.lower for phrase in phrases):
        return 0.0
    return _lines_with(text, lambda line: any(phrase in line.lower() for phrase in phrases))


def _mean_line(text: _Text) -> float:
    breaks = text.text.count("\n")
    return (len(text.text) - breaks) / (breaks + 1)


def _generated_markers(text: _Text) -> float:
    return len(_GENERATED.findall("\n".join(text.text.split("\n", 5)[:5]).lower()))


def _letter_run(text: _Text) -> float:
    return max((len(run.group()) for run in _REPEATED_LETTER.finditer(text.lower)), default=0)


def _mean_word(text: _Text) -> float | None:
    return None if 2 * text.no_blanks_chars > text.word_chars else _share(text.word_chars, len(text.words))


def _hashes_or_ellipses(text: _Text) -> float:
    ellipses = sum(map(text.text.count, _ELLIPSES))
    return _share(max(text.text.count("#"), ellipses), len(text.words))


def _stop_words(text: _Text) -> float | None:
    if not text.text.isascii() and 2 * len(_NOT_LATIN.findall(text.text)) > text.word_chars:
        return None
    return max(len(text.distinct_words & language) for language in _STOP_WORDS)


def _word_run(text: _Text) -> float:
    if not any(map(operator.eq, text.words, itertools.islice(text.words, 1, None))):
        return min(len(text.words), 1)
    return max(sum(1 for _ in run) for _, run in itertools.groupby(text.words))


def _rare_letter_pairs(text: _Text) -> float | None:
    neighbours = text.word_chars - len(text.words)
    return _share(len(_RARE_PAIR.findall(text.text)), neighbours) if neighbours >= 8 else None


def _data_lines(text: _Text) -> float:
    lines = [line for line in text.lines if any(map(str.isalnum, line))]  # a bracket alone says nothing
    return _share(sum(1 for line in lines if _DATA_LINE.fullmatch(line)), len(lines))


def _is_unpunctuated(text: _Text) -> bool:
    """Whether most is Thai or Lao, where blanks end sentences."""
    return text.no_blanks_chars > 0 and 2 * len(_THAI_OR_LAO.findall(text.text)) > text.word_chars


def _punctuated_lines(text: _Text) -> float | None:
    return None if _is_unpunctuated(text) else _lines_with(text, lambda line: line[-1] in _TERMINAL)


def _sentences(text: _Text) -> float | None:
    return None if _is_unpunctuated(text) else len(_SENTENCE_END.findall(text.text))


_MEASURES: dict[str, tuple[str, _Measure]] = {
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
    **{f"max_top_{n}gram": (f"top_{n}gram", lambda t, n=n: t.ngrams[n]) for n in TOP_N},
    **{f"max_duplicate_{n}gram": (f"duplicate_{n}gram", lambda t, n=n: t.ngrams[n]) for n in DUPLICATE_N},
}
