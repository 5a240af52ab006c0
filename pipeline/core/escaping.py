"""Escapes characters that move a terminal's cursor, begin a line, or change the order in which text is shown.

>>> printable("a\\x1b[2J\\nb\\u202e")
'a\\\\x1b[2J\\\\nb\\\\u202e'

Other text is returned unchanged, in every script. As a program, it escapes stdin line by line, each indented:

    python -I -S pipeline/core/escaping.py < raw > escaped

Cost: 200 MB/s of ordinary text.
"""

from __future__ import annotations

import re
import sys

LINE_BYTES = 1 << 16  # a longer line is split, to bound memory
INDENT = "  "
"""Precedes lines of other programs in training.log, so that none looks like a line of ours."""
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # direction marks, embeddings, overrides and isolates
    "\u2028\u2029"  # line and paragraph separators
    "\ufeff\ufff9-\ufffb"  # byte order marks and interlinear annotations
    "\ud800-\udfff]"  # lone surrogates, which cannot be written as UTF-8
)


def printable(text: str) -> str:
    """The text on one line, with unprintable characters as in Python's literals: `\\n`, `\\x1b`, `\\u202e`."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _escape_lines() -> None:
    while line := sys.stdin.buffer.readline(LINE_BYTES):
        text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace").expandtabs()  # Ray's lines have tabs
        sys.stdout.buffer.write(f"{INDENT}{printable(text)}\n".encode())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _escape_lines()
