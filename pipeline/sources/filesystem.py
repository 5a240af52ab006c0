"""Files of a source, on local disk, S3 and GCS: listed by path, folder or glob, and opened for reading.

    base, files = list_files("pages", "s3://corpus/2024/*.jsonl.gz?region=eu-west-1", suffixes=(".jsonl",))
    files[0]                                        # File(name='a.jsonl.gz', size=1048576, mtime_ns=17…)
    with open_stream(base, files[0].name) as lines: # decompressed by the name's suffix
        lines.readline(1 << 20)

A base is an absolute folder, or a bucket's URI with its options; names are relative to it, so that they are the same
wherever the data lies. Listing a folder of a bucket costs a request per 1,000 files, a glob one more per file.
"""

from __future__ import annotations

import errno
import glob
import gzip
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import ConfigError
from pipeline.storage.bucket import SCHEMES, cause, connect, is_of_service, no_way_into

COMPRESSED_SUFFIXES = (".gz", ".zst")
BUFFER_BYTES = 1 << 20  # of a read from disk, and of a request to a bucket
ZSTD_READ_BYTES = 4096  # Arrow drops the read in which it finds a stream cut short, so that much is lost at most


@dataclass(frozen=True)
class File:
    """A file of a source: its name relative to the base, size in bytes and time of change in ns."""

    name: str
    size: int
    mtime_ns: int


def list_files(source: str, path: str, suffixes: tuple[str, ...]) -> tuple[str, list[File]]:
    """The base and the files of a path, a folder or a glob, sorted by name; hidden files do not count.

    Of a folder these are the files with one of the `suffixes`, compressed or not; a path and a glob are taken at their
    word. Raises ConfigError, which names the source, where there is nothing or no way to look.
    """
    try:
        place = _place(path)
        folder, files = _in_bucket(place, suffixes) if place.scheme else _on_disk(place.path, suffixes)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(refusal(source, path, error)) from None
    if not files:
        kinds = f" ({', '.join(suffixes)}, or these with .gz or .zst)" if any(suffixes) else ""
        raise ConfigError(
            f"data.sources {source}: found nothing to read at {_shown(path)}; allowed is a file, a folder with files "
            f"in it{kinds} or a glob that matches some"
        )
    return str(place._replace(path=folder)), sorted(files, key=lambda file: file.name)


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
    """A file that can be read at any place; a compressed one is unpacked to a temporary file first."""
    if not is_compressed(name):
        return cast(IO[bytes], _open(base, name))
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with open_stream(base, name) as stream:
        shutil.copyfileobj(stream, unpacked, BUFFER_BYTES)
    unpacked.seek(0)
    return unpacked


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED_SUFFIXES)


def without_compression(name: str) -> str:
    """`pages.csv.gz` → `pages.csv`."""
    return os.path.splitext(name)[0] if is_compressed(name) else name


def may_pass(error: BaseException) -> bool:
    """Whether a bucket, the way to it or this machine failed, and not the file: a reason to stop, not to count it.

    NOTE: libraries give no errno with what they find wrong in a file, but EINVAL comes of damaged offsets into it.
    """
    return is_of_service(error) or getattr(error, "errno", None) not in (None, errno.EINVAL)


def refusal(source: str, path: str, error: Exception) -> str:
    """The sentence of a ConfigError on a path of a source that cannot be listed or opened."""
    if not is_of_service(error):
        allowed = "a file, a folder or a glob that can be read, on local disk, s3:// or gs://"
        return f"data.sources {source}: found {cause(error)} at {_shown(path)}; allowed is {allowed}"
    return f"data.sources {source}: {no_way_into(_shown(path), error)}"


class _Place(NamedTuple):
    """`s3://bucket/a/b?region=x` in parts: scheme, bucket and path, options."""

    scheme: str  # "" on local disk
    path: str
    query: str

    def __str__(self) -> str:
        return (f"{self.scheme}://" if self.scheme else "") + self.path + (f"?{self.query}" if self.query else "")


def _place(path: str) -> _Place:
    scheme, mark, rest = path.partition("://")
    if not mark:
        return _Place("", os.path.abspath(path), "")
    if scheme == "file":
        return _Place("", os.path.abspath(unquote(rest)), "")
    if scheme not in SCHEMES:
        raise OSError(None, f"{scheme}://")
    location, _, query = rest.partition("?")
    return _Place(scheme, location.rstrip("/"), query)


def _filesystem(place: _Place) -> Any:
    return connect(place.scheme, place.path.partition("/")[0], place.query)


def _open(base: str, name: str) -> Any:
    place = _place(base)
    if not place.scheme:
        return open(os.path.join(place.path, name), "rb", buffering=0)
    return _filesystem(place).open_input_file(f"{place.path}/{name}")


def _on_disk(path: str, suffixes: tuple[str, ...]) -> tuple[str, list[File]]:
    if os.path.isfile(path):
        folder, names = os.path.dirname(path), [os.path.basename(path)]
    elif os.path.isdir(path):
        folder, names = path, [name for name in _walk(path) if _matches(name, suffixes)]
    else:
        folder, pattern = _split_glob(path)
        names = glob.glob(pattern, root_dir=folder, recursive=True)
    full = {name: os.path.join(folder, name) for name in names}
    stats = {name: os.stat(path) for name, path in full.items() if os.path.isfile(path)}
    return folder, [File(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]


def _walk(folder: str) -> Iterator[str]:
    """Names of the files under a folder; links to folders are not followed, for they can lead in circles."""
    for current, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(current, folder)
        yield from (os.path.normpath(os.path.join(inside, name)) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _in_bucket(place: _Place, suffixes: tuple[str, ...]) -> tuple[str, list[File]]:
    from fsspec.implementations.arrow import ArrowFSWrapper

    filesystem, path = _filesystem(place), place.path
    bucket = path.partition("/")[0]
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound and filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise FileNotFoundError(2, f"no bucket {bucket}")
    if info.type == pafs.FileType.File:
        folder, found = path.rpartition("/")[0], [info]
    elif info.type == pafs.FileType.Directory:
        folder = path
        inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        found = [info for info in inside if _matches(info.path, suffixes)]
    else:
        folder, _ = _split_glob(path)
        found = filesystem.get_file_info(ArrowFSWrapper(filesystem).glob(path)) if folder != path else []
    files = [
        File(info.path[len(folder) + 1 :], info.size, info.mtime_ns or 0)
        for info in found
        if info.type == pafs.FileType.File
    ]
    return folder, [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]


def _matches(name: str, suffixes: tuple[str, ...]) -> bool:
    return without_compression(name).lower().endswith(suffixes)


def _split_glob(pattern: str) -> tuple[str, str]:
    """The folder above the first wildcard, and what follows: `/a/b*/c` → `/a`, `b*/c`. No wildcard: all, and ""."""
    magic = re.search(r"[*?\[]", pattern)
    cut = pattern.rfind("/", 0, magic.start()) if magic else len(pattern)
    return pattern[:cut] or "/", pattern[cut + 1 :]


def _shown(path: str) -> str:
    """A path without a bucket's options."""
    return path.partition("?")[0] if "://" in path else path


class _Decompressed(io.RawIOBase):
    """What `read` gives, which takes the most bytes wanted and raises at a cut only once all before it was given."""

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
