"""Which texts are worth keeping: rules on what can be counted in a text, and where their thresholds are from.

>>> quality_verdict("Buy now! Buy now! Buy now! Buy now!", PRESETS["short"])
'quality_few_distinct_words'
>>> quality_verdict("A man is playing a guitar.", with_thresholds("short", {"min_words": 7}))
'quality_few_words'

A record is judged whole: it stays as it is, or it goes. So C4's page rules (lorem ipsum, curly brackets, sentences)
reject here too; of its line rules, which drop lines, those on JavaScript and policies reject by share of lines, the one
on long words rejects by any, and the one on terminal punctuation is FineWeb's `min_punctuated_lines`.

A word is a run of letters, marks and digits. Scripts without blanks between words are cut into pieces near their mean
word: Chinese and Japanese into pairs of characters, Thai, Lao, Khmer and Burmese into fours. Lines are those with
something on them, without the blanks at their ends.

Cost a core, of two that others shared: web 5 to 8 MB/s where every rule is tried, 16 to 24 on Linux's documentation,
most of which fails early; code 15 to 20; short 3 to 10, or 50,000 sentences a second.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache

from pipeline.data.measures import MEASURES, Counted, Measure


@dataclass(frozen=True)
class QualityRules:
    """Thresholds, in the order in which they are tried, cheap ones first. A text passes at the threshold itself.

    None turns a rule off, as do 0 for a `min_` and inf for a `max_`.
    Gopher: arXiv 2112.11446, section A.1.1 and table A1. C4: Raffel et al., JMLR 2020, section 2.2. FineWeb: arXiv
    2406.17557, section 3.6. StarCoder2: arXiv 2402.19173, section 2.1. Ours: measured, see `PRESETS`.
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
    """Characters of the longest stretch of base64, hexadecimal bytes or Unicode escapes. StarCoder2: 1,024."""
    max_encoded: float | None = None
    """Share of the characters in such stretches. StarCoder2: 0.5."""
    max_letter_run: float | None = None
    """The most letters a to z in a row that are the same, from three. Ours."""
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
    """Share of neighbours inside words that are lower-case letters as rarely met as "jq", if there are two such pairs
    and 8 neighbours. Random letters have 0.2. Ours."""
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
    max_word_chars=200,
    min_alphabetic_words=0.5,
    max_word_run=4,
    min_distinct_words=0.34,
    max_rare_letter_pairs=0.1,
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
"""none: nothing is judged. web: Gopher, C4 and FineWeb, for pages whose lines are paragraphs.

short: for titles, descriptions and questions, all thresholds ours. Keeps 99.90% of Debian's 58,461 titles and 99.96% of
its descriptions, 99.99% of WordNet's 117,791 glosses, 99.95% of 17,256 STS sentences, 99.73% of 7,465 docstrings.
Rejects symbols, digits, hashes, and what is said three times over; of random letters, 86 of 100 texts of four words
and 99 of sixteen.

code: for programs. Keeps 91.9% of 3,806 Python files out of site-packages (6.5% say that they are generated) and 99.9%
of 9,003 documented functions in them. Ours is `max_data_lines`, which leaves out tables of constants.
"""


def quality_verdict(text: str, rules: QualityRules) -> str | None:
    """Name of the first rule that the text fails, such as `quality_few_words`, or None; cheap rules are tried first."""
    counted = Counted(text)
    for reason, measure, is_minimum, threshold in _active(rules):
        value = measure(counted)
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
def _active(rules: QualityRules) -> list[tuple[str, Measure, bool, float]]:
    """Reason, measure, whether the threshold is a minimum, and the threshold, of each rule that is on."""
    on = ((name, threshold) for name, threshold in asdict(rules).items() if threshold is not None)
    return [(*MEASURES[name], name.startswith("min_"), threshold) for name, threshold in on]
