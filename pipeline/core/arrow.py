"""A path as a pyarrow filesystem, for the files that Ray Train and Ray Tune store themselves.

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
    """obstore's fsspec filesystem, with two fixes."""

    def _open(self, *args: Any, **options: Any) -> Any:
        file: Any = super()._open(*args, **options)
        write = file.write
        file.write = lambda data: write(bytes(data))  # obstore rejects pyarrow's buffers of signed bytes
        return file

    async def _rm_file(self, path: str, **options: Any) -> None:
        with suppress(FileNotFoundError):  # a folder is not an object
            await super()._rm_file(path, **options)


def arrow_location(path: StoragePath) -> tuple[str, Any]:
    """A path as Ray expects it (`bucket/key`), and its filesystem; None for a local path."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    if isinstance(path, Path):
        return str(path), None
    files: Any = _Files
    handler = FSSpecHandler(files(path.store.scheme, **path.store.settings))
    return f"{path.store.bucket}/{path.key}", PyFileSystem(handler)
