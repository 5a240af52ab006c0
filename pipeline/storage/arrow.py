"""A bucket as a filesystem of pyarrow's, which is what Ray Train and Ray Tune keep their own files in.

RunConfig(storage_path=path, storage_filesystem=filesystem) with path, filesystem = arrow_location(run_dir)

Paths in it begin with the bucket's name. Requests go through the same connection as all others.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from pipeline.storage.files import place, remove_folder
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.path import BucketPath, StoragePath


def arrow_location(path: StoragePath) -> tuple[str, Any]:
    """A path as Ray takes it, and its filesystem; None stands for the local one."""
    if isinstance(path, Path):
        return str(path), None
    return f"{path.store.bucket}/{path.key}", PyFileSystem(_Handler(path.store))


class _Handler(FileSystemHandler):  # type: ignore[misc]
    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and self.store == other.store

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _at(self, path: str) -> BucketPath:
        return BucketPath(self.store, path.partition("/")[2].strip("/"))

    def get_type_name(self) -> str:
        return str(self.store)

    def normalize_path(self, path: str) -> str:
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> FileInfo:
        found = self._at(path)
        if found.is_file():
            stat = found.stat()
            return FileInfo(path, FileType.File, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        return FileInfo(path, FileType.Directory if found.is_dir() else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        home, found = selector.base_dir.strip("/"), self._at(selector.base_dir)
        files = found.files()
        if not files and not selector.allow_not_found:
            raise FileNotFoundError(2, "No such folder", home)
        folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        infos = [FileInfo(f"{home}/{name}", FileType.Directory) for name in sorted(folders)]
        for name, stat in files.items():
            infos.append(FileInfo(f"{home}/{name}", FileType.File, size=stat.st_size, mtime_ns=stat.st_mtime_ns))
        deep = len(home.split("/")) + 1
        return [info for info in infos if selector.recursive or len(info.path.split("/")) == deep]

    def create_dir(self, path: str, recursive: bool) -> None:
        """There is nothing to make."""

    def delete_dir(self, path: str) -> None:
        remove_folder(self._at(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        remove_folder(self._at(path))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._at(path).unlink()

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        place(self._at(src), self._at(dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(self._at(path).open(), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Upload(self._at(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError


class _Upload:
    """A file that is in the bucket once it is closed."""

    def __init__(self, path: BucketPath) -> None:
        self.path, self.closed = path, False
        self.file = tempfile.NamedTemporaryFile()  # noqa: SIM115 (pyarrow closes it)

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.file.flush()
            self.path.upload(Path(self.file.name))
            self.file.close()
