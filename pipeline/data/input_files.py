"""Files of a source, on local disk and in buckets: listed by path, folder or glob, and opened for reading.

    base, files = list_files("pages", "s3://corpus/2024/*.jsonl.gz?region=eu-west-1", suffixes=(".jsonl",))
    files[0]                                              # File(name='a.jsonl.gz', size=1048576, mtime_ns=17…)
    with open_stream(base, files[0].name) as file:        # decompressed, if the name's suffix says so
        for offset, line in lines(file, 4096, 8192): ...  # line ends with b"\\n", except for a file's last

A base is an absolute folder, or a bucket's URI with its options. Names are relative to it, so they do not depend on
where the data lies. Cost: listing a bucket takes a request per 1,000 files below the folder, or below what precedes the
first wildcard; lines are read at 500 MB/s.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.core.files import find
from pipeline.core.object_store import BucketError, cause
from pipeline.core.path import absolute, as_path, without_options

COMPRESSED_SUFFIXES = (".gz", ".zst")
BUFFER_BYTES = 1 << 20  # of a read from disk, and of a request to a bucket
ZSTD_READ_BYTES = 4096  # Arrow drops the read in which it finds a stream cut short, so at most this much is lost
MAX_LINE_BYTES = 64 << 20  # 64 times data.max_chars' default: a longer line is not text


@dataclass(frozen=True)
class File:
    """A file of a source: its name relative to the base, size in bytes and time of change in ns."""

    name: str
    size: int
    mtime_ns: int


def list_files(source: str, path: str, suffixes: tuple[str, ...]) -> tuple[str, list[File]]:
    """The base and the files of a path, a folder or a glob, sorted by name, without hidden files.

    In a folder, only files with one of the `suffixes` count, compressed or not; a path or glob is taken as is. Raises
    ConfigError, naming the source, if nothing is found or the place cannot be listed.
    """

    def keep(name: str) -> bool:
        return without_compression(name).lower().endswith(suffixes)

    try:
        folder, found = find(absolute(as_path(path)), keep)
    except (OSError, ValueError, BucketError) as error:
        raise ConfigError(refusal(source, path, error)) from None
    if not found:
        kinds = f" ({', '.join(suffixes)}, or these with .gz or .zst)" if any(suffixes) else ""
        raise ConfigError(
            f"data.sources {source}: found nothing to read at {without_options(path)}; allowed is a file, a folder "
            f"with files in it{kinds} or a glob that matches some"
        )
    return str(folder), [File(name, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()]


def open_stream(base: str, name: str) -> io.BufferedReader:
    """The bytes of a file from its beginning, decompressed. Seekable where the file is not compressed."""
    file = io.BufferedReader(_open(base, name), BUFFER_BYTES)
    match os.path.splitext(name)[1].lower():
        case ".gz":
            return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=file).read1, file), BUFFER_BYTES)
        case ".zst":
            stream = pa.CompressedInputStream(file, "zstd")
            return io.BufferedReader(_Decompressed(lambda size: stream.read(min(size, ZSTD_READ_BYTES)), file))
        case _:
            return file


def open_random(base: str, name: str) -> IO[bytes]:
    """A file for random access. A compressed one is unpacked to a temporary file first."""
    if not is_compressed(name):
        return cast(IO[bytes], _open(base, name))
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with open_stream(base, name) as stream:
        shutil.copyfileobj(stream, unpacked, BUFFER_BYTES)
    unpacked.seek(0)
    return unpacked


def lines(file: io.BufferedReader, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line that begins in bytes `start` to `stop`, so each line is in exactly one such range.

    A byte order mark is left out. A line longer than MAX_LINE_BYTES is cut one byte after that; the rest is never held.
    """
    offset = start
    if start:
        file.seek(start - 1)
        offset = _skip_line(file, start - 1, stop)
    while stop is None or offset < stop:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        yield offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
        offset += len(line)
        if is_too_long(line) and not line.endswith(b"\n"):
            offset = _skip_line(file, offset, stop)


def is_too_long(line: bytes) -> bool:
    return len(line) > MAX_LINE_BYTES


def _skip_line(file: io.BufferedReader, offset: int, stop: int | None) -> int:
    """Skip to the next line. Returns its offset, or one past `stop`."""
    while stop is None or offset < stop:
        piece = file.readline(io.DEFAULT_BUFFER_SIZE)
        offset += len(piece)
        if not piece or piece.endswith(b"\n"):
            return offset
    return offset


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED_SUFFIXES)


def without_compression(name: str) -> str:
    """`pages.csv.gz` → `pages.csv`."""
    return os.path.splitext(name)[0] if is_compressed(name) else name


def may_pass(error: BaseException) -> bool:
    """Whether the bucket, the network or this machine failed, not the file: then the job stops and can be retried.

    NOTE: libraries set no errno for what is wrong in a file, except EINVAL for damaged offsets into it.
    """
    return isinstance(error, BucketError) or getattr(error, "errno", None) not in (None, errno.EINVAL)


def refusal(source: str, path: str, error: Exception) -> str:
    """The message of the ConfigError for a path of a source that cannot be listed or opened."""
    if isinstance(error, BucketError):
        return f"data.sources {source}: {error}"
    allowed = "a file, a folder or a glob that can be read, on local disk, s3://, gs:// or az://"
    return f"data.sources {source}: found {cause(error)} at {without_options(path)}; allowed is {allowed}"


def _open(base: str, name: str) -> Any:
    return (as_path(base) / name).open("rb", buffering=0)


class _Decompressed(io.RawIOBase):
    """A stream of what `read(max_bytes)` returns. Where a file is cut short, `read` raises after returning the rest."""

    def __init__(self, read: Callable[[int], bytes], compressed: io.BufferedReader) -> None:
        self._read = read
        self._compressed = compressed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._compressed.close()
        super().close()
