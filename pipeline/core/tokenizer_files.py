"""Opens tokenizer.json files of other makers, whose regular expressions the Rust library runs by backtracking.

    tokenizer = parse_tokenizer(path.read_text("utf-8"), path)      # ValueError for patterns that may never end
    with encoding(tokenizer):                                       # JobError if a pattern gives up on a text
        tokenizer.encode_batch(texts)

The library limits the steps of a match, except inside backreferences and recursion, and panics at the limit. Other
patterns may still take time that is quadratic in the length of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from pipeline.core.outcome import JobError

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
