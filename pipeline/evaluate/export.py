"""Exports: artifacts in a folder that the user names. They never overwrite files that an export did not write.

with exporting(Path("exported"), "export.json", {"version": 1}) as folder:      # exported.<hex>.tmp, beside it
    (folder / "README.md").write_text("…")

The manifest, here called `export.json`, holds every file's size and hash. A later export may take the folder's place as
long as all files in it are listed there. In a bucket the files are uploaded one by one, the manifest last: until then
it says that it is unfinished, and an export that was killed can be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.runtime.artifact import entries_of
from pipeline.storage.files import files_below, replacing_folder
from pipeline.storage.path import StoragePath


def refuse_foreign(folder: StoragePath, manifest: str) -> None:
    """Raise ConfigError where `folder` holds anything that the manifest in it does not list."""
    if folder.is_symlink() or folder.is_file():
        raise ConfigError(f"{folder} is no folder; name one that is new, empty or an earlier export")
    foreign = sorted(files_below(folder).keys() - _listed(folder / manifest))
    if foreign:
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which no export wrote; name a folder that is new, empty or an earlier export"
        )


@contextmanager
def exporting(folder: StoragePath, manifest: str, content: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill, which then gets the manifest, with `content`, and takes `folder`'s place.

    Raises ConfigError as `refuse_foreign` does.
    """
    refuse_foreign(folder, manifest)

    def claim(names: list[str]) -> bytes:
        return json.dumps({**content, "unfinished": True, "files": {name: {} for name in names}}).encode()

    with replacing_folder(folder, manifest, claim) as temporary:
        yield temporary
        text = json.dumps({**content, "files": entries_of(temporary)}, indent=2) + "\n"
        (temporary / manifest).write_text(text, encoding="utf-8")
        refuse_foreign(folder, manifest)  # the work may have taken hours


def _listed(manifest: StoragePath) -> set[str]:
    try:
        return {manifest.name, *json.loads(manifest.read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
