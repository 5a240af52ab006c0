"""A folder on disk whose files go to a bucket while they grow: logs and metrics, which are written line by line.

mirror = Mirror(config.run_dir, ["metrics.jsonl"])              # fetches that, where it is in the bucket
(mirror.folder / "metrics.jsonl").open("a").write("…")          # is in the bucket 10 s later, and after mirror.close()

Of a folder on disk the mirror is that folder. An object cannot be appended to, so a file that changed is sent whole. A
kill costs what was not sent yet; a bucket that fails costs a warning, and is tried again.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.files import SUFFIX, scratch
from pipeline.storage.bucket import AnyPath, BucketError, BucketPath

SEND_EVERY_S = 10.0


class Mirror:
    """Sends from a thread of its own until it is closed. `names` are fetched first, where they are there."""

    def __init__(self, target: AnyPath, names: Sequence[str] = ()) -> None:
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

    def close(self) -> None:
        """Send what is left."""
        if self.target and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self.send()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _follow(self) -> None:
        while not self._closed.wait(SEND_EVERY_S):
            self.send()

    def send(self) -> None:
        """Send what has changed, now."""
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
                logging.getLogger("pipeline").warning("what is logged does not get there, work goes on: %s", error)
            self._failing = True

    def _send_file(self, path: Path, target: BucketPath) -> None:
        try:
            state = _state(path)
            if self._sent.get(path) != state:
                target.upload(path)
                self._sent[path] = state
        except FileNotFoundError:  # a temporary one
            return


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
