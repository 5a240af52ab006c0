"""Lists and opens a source's input files, on local disk and in buckets, by path, folder or glob.

    base, files = list_files(source, suffixes=(".jsonl",))  # path: s3://corpus/2024/*.jsonl.gz?region=eu-west-1
    files[0]                                              # File(name='a.jsonl.gz', size=1048576, mtime_ns=17…)
    with open_text(base, files[0].name) as file:          # decompressed by suffix; UTF-16 becomes UTF-8
        for offset, line in lines(file, 4096, 8192): ...  # line ends with b"\\n", except the last

The base is an absolute folder, or a bucket's URI with its options. Names are relative to it, so they do not depend on
where the data is stored. Cost: listing a bucket takes a request per 1,000 files below the part of the path before the
first wildcard; reading lines runs at 500 MB/s.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.config import ConfigError, Source
from pipeline.core.console import log
from pipeline.core.files import find, links_out
from pipeline.core.object_store import BucketError, cause
from pipeline.core.path import absolute, as_path, without_options

COMPRESSED_SUFFIXES = (".gz", ".zst")
BUFFER_BYTES = 1 << 20  # per read from disk or request to a bucket
ZSTD_READ_BYTES = 4096  # Arrow drops the read in which it hits a truncated end, so at most this much is lost
MAX_LINE_BYTES = 16 << 20  # 16 times the default of data.max_chars; as JSON, a longer line may take over 400 MB. Ours
FREE_BYTES = 128 << 20  # that a file may unpack to in memory or on disk, however small it is. Ours
FREE_STREAM_BYTES = 1 << 30  # that a file may unpack to piece by piece: seconds of work. Ours
MAX_RATIO = 200  # of unpacked to packed bytes, beyond these. Ours, measured: text has 3 to 20, zeros over 1,000
_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class File:
    """An input file; its name is relative to the base."""

    name: str
    size: int
    mtime_ns: int


def list_files(
    source: Source, suffixes: tuple[str, ...], skip: Callable[[str], object] = lambda name: False
) -> tuple[str, list[File]]:
    """The base, and the files that a source's path, folder or glob matches, sorted by name, without hidden files.

    A folder yields only files with one of the `suffixes`, compressed or not, whose names are not to `skip`; a path or
    glob is not filtered. Links out of the folder are skipped, with a warning, unless the source follows them. Raises
    ConfigError, naming the source, if there are no files or they cannot be listed.
    """
    path = source.path or sysconfig.get_path("purelib")

    def keep(name: str) -> bool:
        plain = without_compression(name)
        return plain.lower().endswith(suffixes) and not skip(plain)

    try:
        place = absolute(as_path(path))
        folder, found = find(place, keep)
        skipped = set() if source.follow_symlinks or source.path is None else links_out(place, folder, found)
    except (OSError, ValueError, BucketError) as error:
        raise ConfigError(refusal(source.name, path, error)) from None
    if skipped:
        found = {name: stat for name, stat in found.items() if name not in skipped}
        log.warning(
            "source %s: skipped %s files that links lead to outside of %s, such as %s; to read them, set "
            "`follow_symlinks: true` on the source",
            *(source.name, f"{len(skipped):,}", folder, min(skipped)),
        )
    if not found:
        kinds = f" ({', '.join(suffixes)}, or these with .gz or .zst)" if any(suffixes) else ""
        raise ConfigError(
            f"data.sources {source.name}: found nothing to read at {without_options(path)}; give a file, a folder with "
            f"files in it{kinds} or a glob that matches some"
        )
    return str(folder), [File(name, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()]


def open_stream(base: str, name: str, free_bytes: int = FREE_STREAM_BYTES) -> io.BufferedReader:
    """Open a file for reading from its beginning, decompressed. Seekable if the file is not compressed.

    Reading raises UnpackingError for a file of more than `free_bytes` and MAX_RATIO times its size, unpacked.
    """
    return unpacked(_open(base, name), name, free_bytes)


def unpacked(raw: Any, name: str, free_bytes: int = FREE_STREAM_BYTES) -> io.BufferedReader:
    """`open_stream` for a file that is open; its name says how it is compressed."""
    file = io.BufferedReader(raw, BUFFER_BYTES)
    match os.path.splitext(name)[1].lower():
        case ".gz":
            read = _checked(gzip.GzipFile(fileobj=file).read1, file, free_bytes)
            return io.BufferedReader(_Decoded(read, file), BUFFER_BYTES)
        case ".zst":
            stream = pa.CompressedInputStream(file, "zstd")
            read = _checked(lambda size: stream.read(min(size, ZSTD_READ_BYTES)), file, free_bytes)
            return io.BufferedReader(_Decoded(read, file))
        case _:
            return file


def open_messages(base: str, name: str) -> io.BufferedReader:
    """`open_stream` for formats whose parts are read whole, and may be as long as the file."""
    return open_stream(base, name, FREE_BYTES)


def open_text(base: str, name: str) -> io.BufferedReader:
    """`open_stream` for text. A file that begins with the byte order mark of UTF-16 or UTF-32 is read as UTF-8.

    An unpaired surrogate becomes bytes that are not UTF-8, so it breaks its own record only.
    """
    return as_text(open_stream(base, name))


def as_text(file: io.BufferedReader) -> io.BufferedReader:
    """`open_text` for a file that is open."""
    encoding = wide_encoding(file)
    if encoding is None:
        return file
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def read(max_bytes: int) -> bytes:
        while True:
            data = file.read1(max_bytes)
            text = decoder.decode(data, not data)
            if text or not data:
                return text.encode("utf-8", "surrogatepass")

    return io.BufferedReader(_Decoded(read, file), BUFFER_BYTES)


def wide_encoding(file: io.BufferedReader) -> str | None:
    """`utf-16` or `utf-32` if a file begins with its byte order mark."""
    beginning = file.peek(4)
    return next((encoding for mark, encoding in _MARKS.items() if beginning.startswith(mark)), None)


def open_random(base: str, name: str) -> IO[bytes]:
    """Open a file for random access. A compressed file is first unpacked to a temporary one.

    Raises UnpackingError for a file of more than FREE_BYTES and MAX_RATIO times its size, unpacked.
    """
    if not is_compressed(name):
        return cast(IO[bytes], _open(base, name))
    with ExitStack() as stack:
        unpacked = stack.enter_context(tempfile.TemporaryFile())
        with open_stream(base, name) as stream:
            packed_bytes = (as_path(base) / name).stat().st_size
            while data := stream.read1():
                unpacked.write(data)
                check_ratio(unpacked.tell(), packed_bytes)
        unpacked.seek(0)
        stack.pop_all()  # the caller closes it
        return unpacked


def lines(file: io.BufferedReader, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line that begins in bytes `start` to `stop`; consecutive ranges share no line.

    Drops a byte order mark. A line longer than MAX_LINE_BYTES is cut one byte after that, and the rest is skipped.
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
    """Whether the bucket, the network or this machine failed, rather than the file: the job stops and can be retried.

    NOTE: libraries set no errno for damage in a file, except EINVAL for damaged offsets.
    """
    is_remote = isinstance(error, BucketError) or type(error).__module__.startswith("huggingface_hub")
    return is_remote or getattr(error, "errno", None) not in (None, errno.EINVAL)


def refusal(source: str, path: str, error: Exception) -> str:
    """The ConfigError message for a source whose path cannot be listed or opened."""
    if isinstance(error, BucketError):
        return f"data.sources {source}: {error}"
    allowed = "a readable file, folder or glob on local disk, s3://, gs:// or az://"
    return f"data.sources {source}: found {cause(error)} at {without_options(path)}; give {allowed}"


def _open(base: str, name: str) -> Any:
    return (as_path(base) / name).open("rb", buffering=0)


class UnpackingError(Exception):
    """A file stands for far more data than it has bytes."""


def check_ratio(unpacked_bytes: int, packed_bytes: int, free_bytes: int = FREE_BYTES) -> None:
    """Raise UnpackingError if no text is packed so tightly."""
    if unpacked_bytes > max(free_bytes, MAX_RATIO * packed_bytes):
        raise UnpackingError(
            f"found {packed_bytes:,} bytes that unpack to {unpacked_bytes:,} or more, over {MAX_RATIO} times as many; "
            "if you want the file, write it again without compression and in smaller pieces"
        )


def _checked(read: Callable[[int], bytes], packed: io.BufferedReader, free_bytes: int) -> Callable[[int], bytes]:
    """`read`, with a check of how much it has unpacked."""
    unpacked_bytes = 0

    def read_checked(max_bytes: int) -> bytes:
        nonlocal unpacked_bytes
        data = read(max_bytes)
        unpacked_bytes += len(data)
        check_ratio(unpacked_bytes, packed.tell(), free_bytes)
        return data

    return read_checked


class _Decoded(io.RawIOBase):
    """A stream of what `read(max_bytes)` returns; what exceeds `max_bytes` is kept for the next call.

    For a truncated file, `read` first returns the rest, then raises.
    """

    def __init__(self, read: Callable[[int], bytes], encoded: io.BufferedReader) -> None:
        self._read = read
        self._encoded = encoded
        self._kept = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._kept or self._read(len(buffer))
        count = min(len(data), len(buffer))
        buffer[:count], self._kept = data[:count], data[count:]
        return count

    def close(self) -> None:
        self._encoded.close()
        super().close()
