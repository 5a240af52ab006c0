"""Files that appear whole or not at all, on disk and in buckets, and what else the two do in different ways.

with replacing(Path("counts.json")) as temporary:
    temporary.write_text("{}")                     # counts.json is there once the block ends without an error
fetched(bucket / "best" / "step-00000200")         # a copy on this machine, made once for all its processes

Where a path is one on disk, everything here is what pathlib and shutil do, and costs what they cost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from pipeline.storage.bucket import AnyPath, BucketPath

SUFFIX = ".tmp"
REQUESTS_AT_ONCE = 16  # of one process to a bucket: each waits some 20 ms for its answer
KEPT_S = 24 * 3600  # of a copy that nobody has asked for since

Item = TypeVar("Item")
Found = TypeVar("Found")


@contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """A file on disk to write that then takes `path`'s place, in a bucket by one upload.

    Its name is its own: after a kill, a worker that has not noticed yet may write the same file once more.
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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: AnyPath, data: bytes) -> None:
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def place(source: AnyPath, target: AnyPath) -> None:
    """Give a file a second name; a copy where there are no links, as in a bucket."""
    if isinstance(target, BucketPath):
        target.upload(source) if isinstance(source, Path) else source.copy_to(target)
        return
    assert isinstance(source, Path)
    with replacing(target) as temporary:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_folder(folder: AnyPath) -> None:
    """Delete a folder and all below it, if it is there."""
    if isinstance(folder, BucketPath):
        folder.remove_folder()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def readable(path: AnyPath) -> Any:
    """What readers of pyarrow take: the path, or a file of its own where it lies in a bucket."""
    return path.open() if isinstance(path, BucketPath) else path


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """What `glob` finds, in order of the names."""
    found: list[AnyPath] = [*folder.glob(pattern)]
    return sorted(found, key=str)


def sizes(paths: Sequence[AnyPath]) -> list[int | None]:
    """Bytes of each file, None where there is none. In a bucket, for a listing of each folder that they are in."""
    there: dict[AnyPath, int] = {}
    for parent in {path.parent for path in paths if isinstance(path, BucketPath)}:
        there |= {parent / name: stat.st_size for name, stat in parent.files().items()}
    return [there.get(path) if isinstance(path, BucketPath) else _size(path) for path in paths]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def for_each(root: AnyPath, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` of each item, in order; several at once where `root` is in a bucket, for whose answers they wait."""
    if isinstance(root, Path):
        return list(map(work, items))
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(work, items))


def scratch() -> Path:
    """This machine's folder for what is on its way to a bucket, or from one; nobody but its user may enter."""
    folder = Path(tempfile.gettempdir()) / f"text-embedding-pipeline-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(1, f"{folder} is another user's; set TMPDIR to a folder of your own")
    return folder


def fetched(folder: AnyPath) -> Path:
    """A folder on this machine: itself, or a copy of one in a bucket, as it is now by names, sizes and times of change.

    The first process to ask makes the copy, the others wait for it; it stays for a day after the last one asked.
    """
    if isinstance(folder, Path):
        return folder
    files = folder.files()
    key = hashlib.sha256(json.dumps([str(folder), list(files.items())]).encode()).hexdigest()[:32]
    copy = scratch() / "fetched" / key / folder.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.parent.with_suffix(".lock")):
        os.utime(copy.parent)
        if not copy.is_dir():
            _forget_old(copy.parent.parent)
            temporary = copy.with_name(f"{copy.name}{SUFFIX}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for_each(folder, lambda name: (folder / name).download(temporary / name), list(files))
            temporary.rename(copy)
    return copy


def _forget_old(home: Path) -> None:
    for path in home.iterdir():
        if path.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
