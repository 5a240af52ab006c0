"""A folder that appears whole, or not at all, and never in place of files that it did not write itself.

with replacing_folder(Path("exported"), "export.json") as folder:      # exported.<hex>.tmp, beside it
    (folder / "README.md").write_text("…")
    write_marker(folder, "export.json", {"version": 1})

A later export may take the folder's place as long as all that lies in it is listed in its marker.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.storage.files import SUFFIX


def refuse_foreign(folder: Path, marker: str) -> None:
    """Raise ConfigError where `folder` holds anything that `marker` in it does not list."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; name one that is new, empty or an earlier export")
    foreign = sorted(_files(folder) - _listed(folder / marker)) if folder.is_dir() else []
    if foreign:
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which no export wrote; name a folder that is new, empty or an earlier export"
        )


@contextmanager
def replacing_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A folder to fill that then takes `folder`'s place. Raises ConfigError as `refuse_foreign` does.

    NOTE: between the renames of the old folder and of the new one, neither has the name; a kill there leaves both
    beside it.
    """
    refuse_foreign(folder, marker)
    stem = f"{folder.name}.{uuid.uuid4().hex}"
    temporary, old = folder.with_name(stem + SUFFIX), folder.with_name(f"{stem}.old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        refuse_foreign(folder, marker)  # the work may have taken hours
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_marker(folder: Path, marker: str, content: dict[str, Any]) -> None:
    """Write `content` and the names of the files that are there, as `files` where it has none."""
    listed = {"files": sorted(_files(folder))} | content
    (folder / marker).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _listed(marker: Path) -> set[str]:
    try:
        return {marker.name, *json.loads(marker.read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
