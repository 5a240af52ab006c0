"""Paths on local disks and in buckets.

    root = as_path("s3://bucket/prefix?region=eu-west-1")     # a BucketPath; for a path on disk, a pathlib.Path
    root / "runs" / "r"                                       # s3://bucket/prefix/runs/r?region=eu-west-1
    (root / "run.json").write_bytes(b"{}")                    # writes one object, atomically

A BucketPath has the methods of pathlib.Path that a bucket supports. Only `core` checks which kind a path is; other code
calls core/files.py. Only connections are cached, so listings are never stale. A request takes about 20 ms within
the provider's network. A folder in a bucket is a prefix of keys: it needs no mkdir and is never empty. Errors of the
service raise BucketError; a missing object raises FileNotFoundError.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from pipeline.core.object_store import OPTIONS, SCHEMES, ObjectStore, bucket_errors

CHUNK_BYTES = 8 << 20  # of a transfer to and from a bucket

_GUARDS: dict[uuid.UUID, tuple[BucketPath, Callable[[], None]]] = {}
"""Folders that this process has locked, with the check of each lock; see `guarded`."""


class Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class BucketPath:
    """An object in a bucket, or a prefix of objects. `key` is "" for the bucket itself."""

    store: ObjectStore
    key: str

    def __str__(self) -> str:
        return self.uri + (f"?{self.store.query}" if self.store.query else "")

    def __truediv__(self, name: str | PurePosixPath) -> BucketPath:
        return BucketPath(self.store, f"{self.key}/{name}".strip("/"))

    @property
    def uri(self) -> str:
        """The URI without options."""
        return f"{self.store}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> BucketPath:
        return BucketPath(self.store, self.key.rpartition("/")[0])

    def is_file(self) -> bool:
        try:
            return bool(self.key) and bool(self.stat())
        except FileNotFoundError:
            return False

    def is_symlink(self) -> bool:
        return False

    def is_dir(self) -> bool:
        return next(self._listed(chunk_size=2), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> Stat:
        import obstore

        with bucket_errors(self.store, self.key):
            return _stat(obstore.head(self.store.connect(), self.key))

    def open(self, mode: str = "rb", buffering: int = 0) -> io.RawIOBase:
        """A seekable, unbuffered file for reading; each `read(n)` is one request."""
        assert mode == "rb"
        return _ObjectReader(self, self.stat().st_size)

    def read_bytes(self) -> bytes:
        import obstore

        with bucket_errors(self.store, self.key):
            return bytes(obstore.get(self.store.connect(), self.key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        self._put(data)

    def upload(self, file: Path) -> None:
        """Copy a file on disk to this object."""
        self._put(file)

    def _put(self, content: Any) -> None:
        import obstore

        check_guards(self)
        with bucket_errors(self.store, self.key):
            obstore.put(self.store.connect(), self.key, content, chunk_size=CHUNK_BYTES)

    def download(self, file: Path) -> None:
        """Copy this object to a file on disk; creates its folders."""
        import obstore

        file.parent.mkdir(parents=True, exist_ok=True)
        with bucket_errors(self.store, self.key), file.open("wb") as target:  # a full disk stays an OSError
            for chunk in obstore.get(self.store.connect(), self.key).stream(min_chunk_size=CHUNK_BYTES):
                target.write(chunk)

    def unlink(self, missing_ok: bool = False) -> None:
        import obstore

        check_guards(self)
        try:
            self.stat()  # deleting a missing object succeeds on S3 and fails on the others
            with bucket_errors(self.store, self.key):
                obstore.delete(self.store.connect(), self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def iterdir(self) -> Iterator[BucketPath]:
        """Objects and folders directly below, sorted."""
        import obstore

        with bucket_errors(self.store, self.key):
            found = obstore.list_with_delimiter(self.store.connect(), self.key or None)
        keys = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        yield from (BucketPath(self.store, key) for key in sorted(set(keys)) if key != self.key)

    def files(self) -> dict[str, Stat]:
        """All objects below by relative name, sorted. One request per 1,000 objects."""
        start = len(self.key) + 1 if self.key else 0
        found = {each["path"][start:]: _stat(each) for chunk in self._listed(chunk_size=1000) for each in chunk}
        folders = {str(parent) for name in found for parent in PurePosixPath(name).parents}
        # web consoles create empty objects for folders
        return {name: found[name] for name in sorted(found) if name and name not in folders}

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Like pathlib's, without `**`. Lists each folder that has a wildcard below it."""
        first, _, rest = pattern.partition("/")
        found = (
            [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
            if glob.has_magic(first)
            else [self / first]
        )
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif glob.has_magic(first) or path.exists():
                yield path

    def _listed(self, chunk_size: int) -> Iterator[Any]:
        import obstore

        with bucket_errors(self.store, self.key):
            for chunk in obstore.list(self.store.connect(), self.key or None, chunk_size=chunk_size):
                if chunk:
                    yield chunk


class _ObjectReader(io.RawIOBase):
    def __init__(self, path: BucketPath, size: int) -> None:
        self.path, self.size, self.position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(22, "seek before the beginning")
        self.position = base + offset
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        import obstore

        left = max(0, self.size - self.position)
        length = left if size is None or size < 0 else min(size, left)
        if not length:
            return b""
        with bucket_errors(self.path.store, self.path.key):
            store = self.path.store.connect()
            data = bytes(obstore.get_range(store, self.path.key, start=self.position, length=length))
        self.position += length
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


StoragePath = Path | BucketPath


@contextmanager
def guarded(folder: BucketPath, check: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `check` before every write of this process below a folder; an error prevents it."""
    key = uuid.uuid4()
    _GUARDS[key] = folder, check
    try:
        yield
    finally:
        del _GUARDS[key]


def check_guards(path: StoragePath) -> None:
    """Check the locks of this process on folders above a path. Raises LockLost if one was lost."""
    for folder, check in list(_GUARDS.values()):
        if isinstance(path, BucketPath) and path.store == folder.store and f"{path.key}/".startswith(f"{folder.key}/"):
            check()


def as_path(text: str) -> StoragePath:
    """Parse a URI or a path on disk. Raises ValueError with an unknown scheme or option."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        return Path(text)
    if scheme == "file":
        return Path(unquote(rest))
    location, _, query = rest.partition("?")
    bucket, _, key = location.partition("/")
    if scheme not in SCHEMES or not bucket:
        raise ValueError(f"{scheme}://")
    unknown = [name for name, _ in parse_qsl(query, keep_blank_values=True) if name not in OPTIONS]
    if unknown:
        raise ValueError(f"the option {unknown[0]!r}")
    return BucketPath(ObjectStore(SCHEMES[scheme], bucket, query), re.sub("/+", "/", key).strip("/"))


def below(root: StoragePath, text: str) -> StoragePath:
    """Parse a URI or path; a relative path on disk is relative to `root`."""
    path = as_path(text)
    return root / text if isinstance(path, Path) and not path.is_absolute() else path


def without_options(text: str) -> str:
    """A URI without its options, for messages."""
    return text.partition("?")[0] if "://" in text else text


def on_disk(path: StoragePath) -> Path | None:
    """The path if it is on disk, else None; for features that buckets cannot support, such as memory maps."""
    return path if isinstance(path, Path) else None


def public_uri(path: StoragePath) -> str:
    """The URI for a service that reads the bucket itself: https for Azure, without options for others."""
    if isinstance(path, Path):
        return path.as_uri()
    account = path.store.account
    return f"https://{account}.blob.core.windows.net/{path.store.bucket}/{path.key}" if account else path.uri


def stays_below(name: str) -> bool:
    """Whether joining a name to a folder cannot leave the folder: it is relative and has no `..`.

    For names that come from files. Links in the folder are not followed.
    """
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def absolute(path: StoragePath) -> StoragePath:
    return Path(os.path.abspath(path)) if isinstance(path, Path) else path


def _stat(found: Any) -> Stat:
    return Stat(found["size"], round(found["last_modified"].timestamp() * 1e6) * 1000)
