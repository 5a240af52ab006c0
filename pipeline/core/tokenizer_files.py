"""Opens tokenizer.json files of other makers, whose regular expressions the Rust library runs by backtracking.

    tokenizer = parse_tokenizer(path.read_text("utf-8"), path)      # ValueError for patterns that may never end
    with encoding(tokenizer):                                       # JobError if a pattern gives up on a text
        tokenizer.encode_batch(bounded(tokenizer, texts))

The library limits the steps of a match, except inside backreferences and recursion, and panics at the limit. Patterns
other than the common ones may take time that is quadratic in the length of a text, so they get texts cut to MAX_CHARS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from pipeline.core.outcome import JobError

MAX_CHARS = 20_000  # `\s+$` takes 2 s for as many blanks, and 100 times as long for ten times as many (ours, measured)
MAX_WORD_CHARS = 1_000  # for WordPiece, whose time is quadratic in the length of a word; BERT has 100
# GPT-2's pattern, which cuts words at combining marks, with marks and joiners as part of words and signs.
BYTE_LEVEL_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}[\p{L}\p{M}\x{200C}\x{200D}]*| ?\p{N}[\p{N}\p{M}]*| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LINEAR = frozenset(  # whatever makes an alternative fail late, a later one consumes
    {
        BYTE_LEVEL_SPLIT,
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",  # Llama 3
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",  # Qwen
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",  # GPT-4o
    }
)
# A letter or a class, repeated at the end, after at most one optional blank: it cannot match and then fail.
_CLASS = r"\\[sSdDwW]|\\[pP]\{\w+\}"
_ONE_CLASS = re.compile(
    rf" ?\??(?:{_CLASS}|[\w ]|\[(?:[^\[\]\\&]|{_CLASS}|\\[rnt])+\])(?:[+*]|\{{\d{{1,2}}(?:,\d{{0,2}})?\}})?"
)
_BACKREFERENCE = re.compile(r"\\(?:([1-9]|[kg][<'])|.)", re.DOTALL)  # other escapes are consumed, such as \\ in \\1
PANIC = "PanicException"  # of pyo3, not importable; it is a BaseException


def parse_tokenizer(content: str, file: object) -> Tokenizer:
    """Parse a tokenizer.json. Raises ValueError, without the file's name, if it is invalid or may never end."""
    try:
        tokenizer = Tokenizer.from_str(content)
    except BaseException as error:  # tokenizers raises bare Exception, and panics
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise ValueError(str(error)) from None
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    for pattern in _patterns([described(part) for part in parts]):
        if any(match[1] for match in _BACKREFERENCE.finditer(pattern)):
            raise ValueError(
                f"the pattern {pattern[:100]!r} has a backreference or recursion, which can take forever; give a "
                "tokenizer without it"
            )
    if getattr(tokenizer.model, "max_input_chars_per_word", 0) > MAX_WORD_CHARS:
        raise ValueError(
            f"found max_input_chars_per_word {tokenizer.model.max_input_chars_per_word:,}; supported are at most "
            f"{MAX_WORD_CHARS:,}"
        )
    tokenizer.__dict__["file"] = file  # for `encoding`; not pickled
    return tokenizer


def described(part: Any) -> dict[str, Any]:
    """A normalizer, pre-tokenizer or decoder as JSON, as in tokenizer.json."""
    return json.loads(part.__getstate__()) if part else {"type": "Sequence"}  # type: ignore[no-any-return]


def _patterns(content: Any) -> Iterator[str]:
    """The regular expressions: all values of `Regex`."""
    if isinstance(content, dict):
        if isinstance(content.get("Regex"), str):
            yield content["Regex"]
        content = [*content.values()]
    for each in content if isinstance(content, list) else ():
        yield from _patterns(each)


def bounded(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts, cut to MAX_CHARS if the tokenizer has a pattern that may take quadratic time."""
    if "is_linear" not in tokenizer.__dict__:
        parts = [described(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)]
        tokenizer.__dict__["is_linear"] = all(map(_is_linear, _patterns(parts)))
    return texts if tokenizer.__dict__["is_linear"] else [text[:MAX_CHARS] for text in texts]


def _is_linear(pattern: str) -> bool:
    return pattern in LINEAR or bool(_ONE_CLASS.fullmatch(pattern))


@contextmanager
def encoding(tokenizer: Tokenizer) -> Iterator[None]:
    """Raise JobError, which names the tokenizer's file, if the library panics."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        file = getattr(tokenizer, "file", "tokenizer.json")
        raise JobError(
            f"{file}: its patterns cannot split one of the texts ({error}); give another tokenizer, or lower "
            "data.max_chars"
        ) from None
