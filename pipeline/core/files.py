"""File operations that differ between disks and buckets, for both kinds of path.

    write_atomically(root / "run.json", b"{}")                # readers see the complete file or none
    with replacing(root / "big.parquet") as temporary: ...    # write `temporary`; it then replaces the path
    fetched(root / "best")                                    # a local copy, downloaded once for all processes

On disk, these use pathlib and shutil. In a bucket, reading or writing a file takes one request, and listing a folder
one request per 1,000 files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from filelock import FileLock

from pipeline.core.object_store import bucket_errors
from pipeline.core.path import CHUNK_BYTES, BucketPath, Stat, StoragePath, check_guards

SUFFIX = ".tmp"
S3_COPY_BYTES = 5 << 30  # S3 copies no larger object in one request
REQUESTS_AT_ONCE = 16  # of one process to a bucket
KEPT_S = 24 * 3600  # local copies are deleted this long after their last use

Item = TypeVar("Item")
Found = TypeVar("Found")


@contextmanager
def replacing(path: StoragePath) -> Iterator[Path]:
    """Yield a temporary file on disk, which replaces the path if the block ends without an error.

    The file is flushed to disk first. Its name is unique, because a worker that outlives its driver may write the same
    file again.
    """
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{SUFFIX}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: StoragePath, last: str, claim: Callable[[list[str]], bytes]) -> Iterator[Path]:
    """Yield a temporary folder on disk, which replaces `folder` if the block ends without an error.

    On disk, the old folder is renamed, then the new one: a kill in between leaves both under temporary names. In a
    bucket, the file named `last` is uploaded last; until then, it holds `claim(names)` for all files, old and new.
    """
    stem = f"{folder.name}.{uuid.uuid4().hex}"
    if isinstance(folder, BucketPath):
        with tempfile.TemporaryDirectory(dir=scratch()) as name:
            temporary = Path(name) / folder.name
            temporary.mkdir()
            yield temporary
            names = [*(name for name in files_below(temporary) if name != last), last]
            gone = folder.files().keys() - set(names)
            (folder / last).write_bytes(claim(sorted({*names, *gone})))
            for_each(folder, lambda name: (folder / name).upload(temporary / name), names[:-1])
            for_each(folder, lambda name: (folder / name).unlink(missing_ok=True), list(gone))
            (folder / last).upload(temporary / last)
        return
    temporary, old = folder.with_name(stem + SUFFIX), folder.with_name(f"{stem}.old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: StoragePath, data: bytes) -> None:
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def link_or_copy(source: StoragePath, target: StoragePath) -> None:
    """Hard-link a file to `target`, or copy it if links are not supported. A bucket gets a copy."""
    if source == target:
        return
    if isinstance(target, Path):
        assert isinstance(source, Path)
        with replacing(target) as temporary:
            try:
                temporary.hardlink_to(source.resolve())  # or a symbolic link would get another name, and lead nowhere
            except OSError:
                shutil.copyfile(source, temporary)
    elif isinstance(source, Path):
        target.upload(source)
    else:
        _copy(source, target)


def _copy(source: BucketPath, target: BucketPath) -> None:
    """Copy on the server if possible, else through this machine."""
    import obstore

    check_guards(target)
    with bucket_errors(source.store, source.key):
        if source.store != target.store or source.stat().st_size > S3_COPY_BYTES:
            content = obstore.get(source.store.connect(), source.key).stream(min_chunk_size=CHUNK_BYTES)
            obstore.put(target.store.connect(), target.key, content, chunk_size=CHUNK_BYTES)
        else:
            obstore.copy(source.store.connect(), source.key, target.key)


def remove_folder(folder: StoragePath) -> None:
    """Delete a folder and everything below it, if it exists."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    import obstore

    check_guards(folder)
    names = sorted(folder.files(), key=lambda name: name == ".lock")  # the lock last, to hold it until then
    keys = [f"{folder.key}/{name}" for name in names]
    with bucket_errors(folder.store, folder.key):
        if keys:
            obstore.delete(folder.store.connect(), keys)


def files_below(folder: StoragePath, *, hidden: bool = True) -> dict[str, Stat]:
    """All files below a folder by relative name, sorted; none if the folder is missing.

    `hidden=False` skips files and folders whose names begin with a dot. Links to folders are not followed, because they
    may form a cycle.
    """
    if isinstance(folder, BucketPath):
        return {name: stat for name, stat in folder.files().items() if hidden or not _is_hidden(name)}
    found: dict[str, Stat] = {}
    folders = [""] if folder.is_dir() else []
    while folders:
        inside = folders.pop()
        with os.scandir(folder / inside) as entries:  # 92,000 files per second, four times as fast as pathlib
            for entry in entries:
                if not hidden and entry.name.startswith("."):
                    continue
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file():
                    stat = entry.stat()
                    found[name] = Stat(stat.st_size, stat.st_mtime_ns)
    return {name: found[name] for name in sorted(found)}


def find(path: StoragePath, keep: Callable[[str], bool]) -> tuple[StoragePath, dict[str, Stat]]:
    """The files of a path: a file itself, the files below a folder that `keep` accepts, or the matches of a glob.

    A folder that exists is taken literally, also if its name holds brackets or other wildcards. Returns their common
    folder and their names relative to it, sorted. Hidden files are skipped.
    """
    if path.is_file():
        return path.parent, {path.name: _disk_stat(path) if isinstance(path, Path) else path.stat()}
    if path.is_dir():
        return path, {name: stat for name, stat in files_below(path, hidden=False).items() if keep(name)}
    parts = list(path.parts) if isinstance(path, Path) else path.key.split("/")
    prefixes = [path]  # of 0, 1, … parts
    for _ in parts:
        prefixes.insert(0, prefixes[0].parent)
    wild = (i for i, part in enumerate(parts) if glob.has_magic(part) and not prefixes[i + 1].is_dir())
    first = next(wild, None)
    if first is None:
        return path.parent, {}
    folder, pattern = prefixes[first], "/".join(parts[first:])
    if isinstance(folder, Path):
        names = glob.glob(pattern, root_dir=folder, recursive=True)
        return folder, {name: _disk_stat(folder / name) for name in sorted(names) if (folder / name).is_file()}
    from fsspec.utils import glob_translate

    match = re.compile(glob_translate(pattern)).match
    return folder, {name: stat for name, stat in files_below(folder, hidden=False).items() if match(name)}


def links_out(place: StoragePath, folder: StoragePath, found: dict[str, Stat]) -> set[str]:
    """The files of `find` that a link leads to outside of the folder. A `place` that is one file may be a link."""
    if not isinstance(folder, Path) or place.is_file():
        return set()
    home, parents = folder.resolve(), {(folder / name).parent for name in found}
    outside = {parent for parent in parents if not parent.resolve().is_relative_to(home)}
    paths = {name: folder / name for name in found}
    return {
        name
        for name, path in paths.items()
        if path.parent in outside or (path.is_symlink() and not path.resolve().is_relative_to(home))
    }


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _disk_stat(path: Path) -> Stat:
    stat = path.stat()
    return Stat(stat.st_size, stat.st_mtime_ns)


def sorted_glob(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """The matches of `folder.glob(pattern)`, sorted by name."""
    found: list[StoragePath] = [*folder.glob(pattern)]
    return sorted(found, key=str)


def file_sizes(paths: Sequence[StoragePath]) -> list[int | None]:
    """The size of each file in bytes, None if it is missing. In a bucket, this lists each folder once."""
    listed: dict[StoragePath, int] = {}
    for parent in {path.parent for path in paths if isinstance(path, BucketPath)}:
        listed |= {parent / name: stat.st_size for name, stat in parent.files().items()}
    return [listed.get(path) if isinstance(path, BucketPath) else _size(path) for path in paths]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def for_each(root: StoragePath, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work(item)` for each item, in order; concurrent if `root` is in a bucket, to hide its latency."""
    if isinstance(root, Path):
        return list(map(work, items))
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(work, items))


def parquet_file(path: StoragePath) -> Any:
    """A pyarrow.parquet.ParquetFile that verifies page checksums; in a bucket, it reads a row group per request."""
    import pyarrow.parquet as pq

    source = path if isinstance(path, Path) else path.open()
    return pq.ParquetFile(source, pre_buffer=isinstance(path, BucketPath), page_checksum_verification=True)


def lance_location(path: StoragePath) -> tuple[str, dict[str, str] | None]:
    """A path as LanceDB's URI and storage options."""
    return (str(path), None) if isinstance(path, Path) else (path.uri, path.store.lance_options)


def disk_bytes(folder: StoragePath) -> float:
    """The disk space of a folder. A file with several hard links counts for its share."""
    if isinstance(folder, BucketPath):
        return sum(stat.st_size for stat in files_below(folder).values())
    stats = ((folder / name).stat() for name in files_below(folder))
    return sum(stat.st_size / stat.st_nlink for stat in stats)


def digest_of(path: StoragePath, digest: Any) -> str:
    """The hex digest of a file; `digest` is a hash object of hashlib or xxhash."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def xxh3_of(path: StoragePath) -> str:
    """The XXH3 hash of a file, as manifests and checkpoints record it."""
    return digest_of(path, xxhash.xxh3_128())


def may_write(path: StoragePath) -> bool:
    """Whether this user has write permission on disk; always true for a bucket, which cannot tell in advance."""
    if isinstance(path, BucketPath):
        return True
    return os.access(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir()), os.W_OK)


def free_bytes(path: StoragePath) -> int | None:
    """Free space on the disk that holds a path; None for a bucket, which has no limit."""
    if isinstance(path, BucketPath):
        return None
    return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free


def staging(folder: StoragePath) -> Path:
    """A staging folder for files that will move to `folder`: on the same disk, or on this machine for a bucket."""
    if isinstance(folder, Path):
        return folder / "incoming"
    return scratch() / "incoming" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def scratch() -> Path:
    """This user's private folder for files on their way to or from a bucket."""
    folder = Path(tempfile.gettempdir()) / f"text-embedding-pipeline-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(1, f"{folder} belongs to another user; set TMPDIR to your own folder")
    return folder


def local_copy(path: StoragePath) -> Path:
    """A local path to a file or folder: the path itself, or a cached download from a bucket.

    The cache key has the names, sizes and times of all files. The first process downloads, others wait. Copies are
    deleted a day after their last use.
    """
    if isinstance(path, Path):
        return path
    files = {path / name: stat for name, stat in path.files().items()} or {path: path.stat()}
    named = [(str(file), stat) for file, stat in files.items()]
    key = hashlib.sha256(json.dumps([str(path), named]).encode()).hexdigest()[:32]
    copy = scratch() / "copies" / key / (path.name or path.store.bucket)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.parent.with_suffix(".lock")):
        os.utime(copy.parent)
        if not copy.exists():
            _remove_old(copy.parent.parent)
            temporary = copy.with_name(f"{copy.name}{SUFFIX}")
            shutil.rmtree(temporary, ignore_errors=True)
            start = len(path.key)
            for_each(path, lambda file: file.download(Path(f"{temporary}{file.key[start:]}")), list(files))
            temporary.rename(copy)
    return copy


def _remove_old(home: Path) -> None:
    for path in home.iterdir():
        with suppress(FileNotFoundError):  # another process may remove it too
            if path.stat().st_mtime < time.time() - KEPT_S:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
