"""Upload growing files, such as logs and metrics, to a bucket in the background.

mirror = Mirror(config.run_dir, ["metrics.jsonl"])              # downloads that file first, if the bucket has it
(mirror.folder / "metrics.jsonl").open("a").write("…")          # uploaded within 10 s and by mirror.close()

For a folder on disk, the mirror is that folder. Objects cannot be appended to, so a changed file is uploaded in full. A
kill loses what was not uploaded yet. If the bucket fails, the mirror warns and retries.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.files import SUFFIX, scratch
from pipeline.core.object_store import BucketError
from pipeline.core.path import BucketPath, StoragePath

SEND_EVERY_S = 10.0


class Mirror:
    """Uploads from a background thread until it is closed. Downloads the existing ones of `names` first."""

    def __init__(self, target: StoragePath, names: Sequence[str] = ()) -> None:
        if isinstance(target, Path):
            self.target, self.folder = None, target
            return
        self.target, self.folder = target, Path(tempfile.mkdtemp(prefix="mirror-", dir=scratch()))
        self._failing, self._lock = False, threading.Lock()
        self._sent: dict[Path, tuple[int, int]] = {}
        for name in names:
            if (target / name).is_file():
                (target / name).download(self.folder / name)
                self._sent[self.folder / name] = _state(self.folder / name)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    @classmethod
    def of_log(cls, folder: StoragePath, name: str) -> tuple[Mirror, Path]:
        """A mirror, and the log file in it for this process.

        Jobs cannot append to one object, so in a bucket the log is a folder with one file per job.
        """
        if not isinstance(folder, Path):
            mirror = cls(folder / name)
            return mirror, mirror.folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
        mirror = cls(folder)
        return mirror, mirror.folder / name

    def close(self) -> None:
        """Upload the rest and end."""
        if self.target and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self.send()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _follow(self) -> None:
        while not self._closed.wait(SEND_EVERY_S):
            self.send()

    def send(self) -> None:
        """Upload changed files now."""
        if self.target:
            with self._lock:
                self._send(self.target)

    def _send(self, target: BucketPath) -> None:
        try:
            for path in sorted(self.folder.rglob("*")):
                if not path.is_symlink() and path.is_file() and path.suffix != SUFFIX:
                    self._send_file(path, target / path.relative_to(self.folder).as_posix())
            self._failing = False
        except BucketError as error:
            if not self._failing:
                logging.getLogger("pipeline").warning("cannot upload logs and metrics, will retry: %s", error)
            self._failing = True

    def _send_file(self, path: Path, target: BucketPath) -> None:
        try:
            state = _state(path)
            if self._sent.get(path) != state:
                target.upload(path)
                self._sent[path] = state
        except FileNotFoundError:  # it was temporary
            return


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
