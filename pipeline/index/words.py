"""Tokenizes texts to words for BM25, in all scripts: in the vector table's full-text index and in evaluation.

    settings = word_settings(texts)                                     # a sample of the texts is enough
    dataset.create_scalar_index("text", "INVERTED", **settings)         # pylance
    words(["Tests of parse_date", "東京都の図書館"], settings)
    # [['test', 'pars', 'date'], ['東京', '都', 'の', '図書館']]

Lance splits texts with ICU's dictionaries, lower-cases them, removes accents and stems English words. NDCG@10 of BM25
with these words, and with bm25s' own tokenizer (`benchmarks/words.py`): 0.818 and 0.789 on Debian descriptions, 0.595
and 0.585 on WordNet, 0.344 and 0.224 on Python code. Cost: 10 to 20 MB of text per second.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

SAMPLE_TEXTS, SAMPLE_CHARS = 1000, 1000
MARKED_SCRIPTS = re.compile("[\u0900-\u109f\u1780-\u17ff]")  # Devanagari to Myanmar, Thai among them, and Khmer
MARKED_SHARE = 0.1
# Lucene's English stop words. Lance's list covers many languages and includes words such as "case", "com" and "c".
STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
MAX_WORD_BYTES = 128  # Lance's 40 would drop words of 14 letters in Hindi, and hashes
SEPARATOR = "\U00010600"  # a letter of Linear A, which ICU always splits off as a word
TEXTS_AT_ONCE = 1024
# Characters that never occur in a word, mapped to spaces.
SPACES = {
    "icu": str.maketrans({SEPARATOR: " "}),
    "icu/split": str.maketrans(dict.fromkeys([SEPARATOR, *string.punctuation], " ")),
}


def word_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Options of Lance's full-text index for these texts, chosen from an even sample of up to SAMPLE_TEXTS texts.

    `icu/split` also splits at every character that is not a letter or digit, so that `date` finds `parse_date`. Scripts
    of South and Southeast Asia write some vowels and tones with such characters, so they use `icu`.
    """
    step = max(1, len(texts) // SAMPLE_TEXTS)
    sample = "".join("".join(text[:SAMPLE_CHARS].split()) for text in texts[::step])
    marked = len(MARKED_SCRIPTS.findall(sample)) > MARKED_SHARE * len(sample)
    return {
        "base_tokenizer": "icu" if marked else "icu/split",
        "max_token_length": MAX_WORD_BYTES,
        "stem": True,
        "custom_stop_words": STOP_WORDS.split(),
    }


def words(texts: Sequence[str], settings: dict[str, Any]) -> list[list[str]]:
    """The words of each text, as an index with these settings sees them.

    Each distinct part between spaces is split only once, because a call of Lance's function costs 20 µs.
    """
    spaces, known, result = SPACES[settings["base_tokenizer"]], dict[str, list[str]](), list[list[str]]()
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        parts = [text.translate(spaces).split() for text in texts[start : start + TEXTS_AT_ONCE]]
        new = list({part for text_parts in parts for part in text_parts}.difference(known))
        known.update(zip(new, _split(new, settings), strict=True))
        result += [[word for part in text_parts for word in known[part]] for text_parts in parts]
    return result


def _split(parts: list[str], settings: dict[str, Any]) -> list[list[str]]:
    """The words of each part, which has no spaces."""
    import lance

    result: list[list[str]] = []
    for token in lance.tokenize("".join(f" {SEPARATOR} {part}" for part in parts), **settings):
        if token.text == SEPARATOR:
            result.append([])
        else:
            result[-1].append(token.text)
    return result
