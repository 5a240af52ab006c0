"""A sweep's memory: Optuna's journal, a line an event, on disk or in a bucket, whole to the last line after any kill.

    storage = JournalStorage(Journal(run_dir / "tune"))      # journal.jsonl in it
    study = optuna.create_study(storage=storage, ...)        # what it is asked and told is there the next time

One driver writes it, alone in its folder, so it goes without the locks of Optuna's own file, which a kill leaves
behind; and half a line at its end, which would spoil that one for good, is cut off here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from pipeline.storage.mirror import Mirror
from pipeline.storage.path import StoragePath

NAME = "journal.jsonl"


class Journal(BaseJournalBackend):
    """Events in the order in which they were written. An event costs an fsync, in a bucket the file's upload."""

    def __init__(self, folder: StoragePath) -> None:
        self.mirror = Mirror(folder, [NAME])
        self.path = self.mirror.folder / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        self.events: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self.events[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(event) + "\n" for event in logs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.events += [json.loads(line) for line in text.splitlines()]  # as they are read back, tuples being lists
        self.mirror.send()

    def close(self) -> None:
        self.mirror.close()
