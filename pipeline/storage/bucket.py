"""A path in a bucket of S3 or GCS, used as `pathlib.Path` is where that can be, and the connection behind it.

    root = as_path("s3://bucket/prefix?region=eu-west-1")     # BucketPath; of a folder on disk its Path
    root / "runs" / "r"                                       # s3://bucket/prefix/runs/r?region=eu-west-1
    (root / "run.json").write_bytes(b"{}")                    # one object, which is there whole or not at all

A folder is what names of objects have in common, so there is none to make, and none that is empty. What is read after
it was written is new: both services promise it. A call is a request or more, some 20 ms each on the service's own
network; nothing is kept between calls but the connection. What the service refuses, or no way to it, is a BucketError,
and what is not there a FileNotFoundError.

Options are those of pyarrow's URIs, and `anonymous=true` for public data. Credentials come from the environment.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

SCHEMES = ("s3", "gs", "gcs")
GCS_RETRY_S = 30  # pyarrow would try for 15 minutes and say nothing
CHUNK_BYTES = 8 << 20  # of a copy to and from disk
S3_COPY_BYTES = 5 << 30  # S3 copies no larger object in one request
_SERVICE_ERROR = re.compile(r"AWS Error|google::cloud")


class BucketError(RuntimeError):
    """A bucket that cannot be reached, or refuses: no OSError, for those say that a file is missing or broken."""


class Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class BucketPath:
    scheme: str
    key: str
    """`bucket/prefix/name`, as pyarrow has it."""
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str | PurePosixPath) -> BucketPath:
        return self._at(f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> BucketPath:
        return self._at(self.key.rpartition("/")[0])

    @property
    def bucket(self) -> str:
        return self.key.partition("/")[0]

    @property
    def filesystem(self) -> Any:
        """pyarrow's, in which the path is `key`."""
        return connect(self.scheme, self.bucket, self.query)

    def _at(self, key: str) -> BucketPath:
        return BucketPath(self.scheme, key, self.query)

    def is_file(self) -> bool:
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        return self._info().type.name == "Directory"

    def exists(self) -> bool:
        return self._info().type.name != "NotFound"

    def stat(self) -> Stat:
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(2, "No such object", str(self))
        return Stat(info.size, info.mtime_ns or 0)

    def open(self, mode: str = "rb") -> Any:
        """A file to read at any place."""
        assert mode == "rb"
        with self._reaching():
            return self.filesystem.open_input_file(self.key)

    def read_bytes(self) -> bytes:
        with self._reaching(), self.filesystem.open_input_file(self.key) as file:
            return bytes(file.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        with self._reaching(), self.filesystem.open_output_stream(self.key) as file:
            file.write(data)

    def upload(self, file: Path) -> None:
        """Give a file on disk its place here."""
        with file.open("rb") as source, self._reaching(), self.filesystem.open_output_stream(self.key) as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)

    def download(self, file: Path) -> None:
        """Write what is here to a file on disk, and whatever folders it lacks."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self.open() as source, file.open("wb") as target:
            while True:
                with self._reaching():
                    chunk = source.read(CHUNK_BYTES)
                if not chunk:
                    return
                target.write(chunk)

    def copy_to(self, target: BucketPath) -> None:
        """A copy that the service makes; of what it does not copy in one go, one that passes through this machine."""
        if self.scheme == "s3" and self.stat().st_size > S3_COPY_BYTES:
            with self.open() as source, target._reaching(), self.filesystem.open_output_stream(target.key) as file:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
        else:
            with self._reaching():
                self.filesystem.copy_file(self.key, target.key)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._reaching():
                self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_folder(self) -> None:
        """Delete all that lies below, if anything does."""
        with self._reaching():
            self.filesystem.delete_dir_contents(self.key, missing_dir_ok=True)
            if self.is_dir():  # S3 keeps an object for the folder itself
                self.filesystem.delete_dir(self.key)

    def iterdir(self) -> Iterator[BucketPath]:
        """Objects and folders right below, in order; none where nothing is.

        NOTE: of a listing that is not recursive pyarrow leaves out GCS's folders, so this reads all names below.
        """
        yield from (self / name for name in sorted({name.partition("/")[0] for name in self.files()}))

    def files(self) -> dict[str, Stat]:
        """All objects below, by their names relative to here, in order. A request for each thousand of them."""
        from pyarrow.fs import FileSelector

        with self._reaching():
            found = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True, recursive=True))
        return {
            info.path[len(self.key) + 1 :]: Stat(info.size, info.mtime_ns or 0)
            for info in sorted(found, key=lambda info: str(info.path))
            if info.is_file
        }

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """As pathlib's, without `**`. A listing for each folder that has a wildcard below it."""
        first, _, rest = pattern.partition("/")
        found = (
            [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
            if _magic(first)
            else [self / first]
        )
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif _magic(first) or path.exists():
                yield path

    def _info(self) -> Any:
        with self._reaching():
            return self.filesystem.get_file_info(self.key)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, BucketError):
            raise
        except (OSError, ValueError) as error:  # pyarrow's own are one or the other
            raise BucketError(no_way_into(f"{self.scheme}://{self.key}", error)) from error


AnyPath = Path | BucketPath


def as_path(text: str) -> AnyPath:
    """A folder on disk, or in a bucket where the text is a URI of one."""
    scheme, mark, rest = text.partition("://")
    if not mark or scheme not in SCHEMES:
        return Path(text)
    location, _, query = rest.partition("?")
    return BucketPath(scheme, location.rstrip("/"), query)


@lru_cache(maxsize=32)
def connect(scheme: str, bucket: str, query: str) -> Any:
    """The filesystem of pyarrow's that a bucket is in. Raises OSError or pyarrow's ValueError for wrong options."""
    from pyarrow import fs

    options = dict(parse_qsl(query))
    anonymous = options.pop("anonymous", "false") == "true"
    if scheme == "s3":
        options.setdefault("allow_delayed_open", "true")  # a small object is one request
    if scheme == "s3" and anonymous:  # which pyarrow cannot read from a URI
        options.pop("allow_delayed_open")
        if "endpoint_override" not in options and "region" not in options:
            options["region"] = fs.resolve_s3_region(bucket)
        return fs.S3FileSystem(anonymous=True, **options)
    if scheme != "s3":
        options.setdefault("retry_limit_seconds", str(GCS_RETRY_S))
    login = "anonymous@" if anonymous else ""
    return fs.FileSystem.from_uri(f"{scheme}://{login}{bucket}?{urlencode(options)}")[0]


def is_of_service(error: BaseException) -> bool:
    """Whether the service said it, or the way to it."""
    return bool(_SERVICE_ERROR.search(str(error)))


def cause(error: BaseException) -> str:
    """An error in a few words, without the path, which differs from machine to machine."""
    text = getattr(error, "strerror", None) or str(error)
    service = _SERVICE_ERROR.search(text)
    words = text[service.start() if service else 0 :].partition(". Detail:")[0].split()
    return " ".join(words)[:200] or type(error).__name__


def no_way_into(where: str, error: BaseException) -> str:
    """A sentence's words on a bucket that fails. `where` has no options."""
    return (
        f"found no way into {where} ({cause(error)}); allowed is a bucket that this machine reaches, with its region "
        "and its credentials in the environment"
    )


def _magic(name: str) -> bool:
    return any(character in name for character in "*?[")
