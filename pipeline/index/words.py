"""What a word is, in all scripts: the same for the index of words in the vector table and for BM25 in evaluation.

    settings = word_settings(texts)                                     # a sample of the texts is enough
    dataset.create_scalar_index("text", "INVERTED", **settings)         # pylance
    words(["Tests of parse_date", "東京都の図書館"], settings)
    # [['test', 'pars', 'date'], ['東京', '都', 'の', '図書館']]

Lance splits texts with ICU's dictionaries, lowers them, removes accents and stems English words. BM25 over these words
has an NDCG@10 (`benchmarks/words.py`) of 0.818 on Debian descriptions, where bm25s' own tokenizer gives 0.789, of 0.595
(0.585) on WordNet and of 0.344 (0.224) on Python code. Cost: 10 to 20 MB of text a second.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

SAMPLE_TEXTS, SAMPLE_CHARS = 1000, 1000
MARKED_SCRIPTS = re.compile("[\u0900-\u109f\u1780-\u17ff]")  # Devanagari to Myanmar, Thai among them, and Khmer
MARKED_SHARE = 0.1
# Lucene's English stop words. Lance's own list is of many languages, and has words such as "case", "com" and "c".
STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
MAX_WORD_BYTES = 128  # Lance's 40 would drop words of 14 letters in Hindi, and hashes
SEPARATOR = "\U00010600"  # a letter of Linear A, which ICU takes as a word of its own
TEXTS_AT_ONCE = 1024
# What no word has in it, as spaces.
SPACES = {
    "icu": str.maketrans({SEPARATOR: " "}),
    "icu/split": str.maketrans(dict.fromkeys([SEPARATOR, *string.punctuation], " ")),
}


def word_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Options of Lance's index of words that suit such texts; looks at up to SAMPLE_TEXTS of them, evenly spread.

    `icu/split` also splits at each character that is no letter or digit, so that `date` finds `parse_date`. Scripts of
    South and Southeast Asia write some vowels and tones with such characters; their words stay whole with `icu`.
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
    """The words of each text, as an index with these settings has them.

    Each distinct part between spaces is split once: Lance's function takes one text, and its start costs 20 µs.
    """
    spaces, known, found = SPACES[settings["base_tokenizer"]], dict[str, list[str]](), list[list[str]]()
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        parts = [text.translate(spaces).split() for text in texts[start : start + TEXTS_AT_ONCE]]
        new = list({part for of_text in parts for part in of_text}.difference(known))
        known.update(zip(new, _split(new, settings), strict=True))
        found += [[word for part in of_text for word in known[part]] for of_text in parts]
    return found


def _split(parts: list[str], settings: dict[str, Any]) -> list[list[str]]:
    """The words of each part, which has no spaces."""
    import lance

    found: list[list[str]] = []
    for token in lance.tokenize("".join(f" {SEPARATOR} {part}" for part in parts), **settings):
        if token.text == SEPARATOR:
            found.append([])
        else:
            found[-1].append(token.text)
    return found
