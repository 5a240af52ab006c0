"""Prepares texts for BM25 in all scripts: for the vector table's full-text index and for evaluation.

    search_words("Tests of parse_date"), search_words("蓝色的桥")
    # ('Tests of parse date', '蓝 色 蓝色 的 色的 桥 的桥')
    dataset.create_scalar_index("words", "INVERTED", **SETTINGS)        # pylance, over a column of search_words
    index_words(["Tests of parse_date"])                                # [['test', 'pars', 'date']]

Words are those of `data/words.py`. Scripts without blanks between words are searched by letters and by pairs of
neighbouring letters, which find a phrase wherever it stands; a dictionary would split it in several ways. Lance
lower-cases words, removes accents and stems English. NDCG@10 of BM25 with these words, and with bm25s' own tokenizer:
`benchmarks/words.py`. Cost: 10 to 20 MB of text per second.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

from pipeline.data.words import is_plain, word_spans, words

# Lucene's English stop words. Lance's list covers many languages and includes words such as "case", "com" and "c".
STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
MAX_WORD_BYTES = 128  # Lance's 40 would drop words of 14 letters in Hindi, and hashes
SETTINGS: dict[str, Any] = {
    "base_tokenizer": "whitespace",
    "max_token_length": MAX_WORD_BYTES,
    "stem": True,
    "custom_stop_words": STOP_WORDS.split(),
}
"""Options of Lance's full-text index."""
TEXTS_AT_ONCE = 1024
SEPARATOR = "|"  # never in a word
# Accents that form no letter of their own, joiners, the vowel points of Arabic and Hebrew, and Arabic's stretched line:
# most texts lack them.
_OPTIONAL = regex.compile(r"(?V1)[\p{Inherited}[\p{M}&&[\p{Arabic}\p{Hebrew}]]\u0640]")


def search_words(text: str) -> str:
    """The text's words between blanks; a pair of letters without a blank between them follows its second letter."""
    if is_plain(text):
        return " ".join(words(text))
    text = _OPTIONAL.sub("", unicodedata.normalize("NFC", text))
    found, before = list[str](), (-1, -1)
    for start, stop, is_dense in word_spans(text):
        found.append(text[start:stop])
        if is_dense and before[1] == start:
            found.append(text[before[0] : stop])
        before = (start, stop) if is_dense else (-1, -1)
    return " ".join(found)


def index_words(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text, as an index of their `search_words` has them."""
    known, result = dict[str, list[str]](), list[list[str]]()
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        found = [search_words(text).split() for text in texts[start : start + TEXTS_AT_ONCE]]
        new = list({word for text_words in found for word in text_words}.difference(known))
        known.update(zip(new, _filtered(new), strict=True))
        result += [[word for each in text_words for word in known[each]] for text_words in found]
    return result


def _filtered(found: list[str]) -> list[list[str]]:
    """What Lance makes of each word: one word or none. A call costs 20 µs, so there is one for all."""
    import lance

    result: list[list[str]] = []
    for token in lance.tokenize("".join(f" {SEPARATOR} {word}" for word in found), **SETTINGS):
        if token.text == SEPARATOR:
            result.append([])
        else:
            result[-1].append(token.text)
    return result
