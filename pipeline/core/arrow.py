"""A bucket as a filesystem of pyarrow's, which is what Ray Train and Ray Tune keep their own files in.

path, filesystem = arrow_location(run_dir)
RunConfig(storage_path=path, storage_filesystem=filesystem)
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from obstore.fsspec import FsspecStore

from pipeline.core.path import StoragePath


class _Files(FsspecStore):
    """obstore's filesystem of fsspec's, with two corrections."""

    def _open(self, *args: Any, **options: Any) -> Any:
        file: Any = super()._open(*args, **options)
        write = file.write
        file.write = lambda data: write(bytes(data))  # pyarrow's buffers are of signed numbers, which obstore refuses
        return file

    async def _rm_file(self, path: str, **options: Any) -> None:
        with suppress(FileNotFoundError):  # as for a folder itself, which is no object
            await super()._rm_file(path, **options)


def arrow_location(path: StoragePath) -> tuple[str, Any]:
    """A path as Ray takes it, which begins with the bucket's name, and its filesystem: None for the local one."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    if isinstance(path, Path):
        return str(path), None
    files: Any = _Files
    handler = FSSpecHandler(files(path.store.scheme, **path.store.settings))
    return f"{path.store.bucket}/{path.key}", PyFileSystem(handler)
