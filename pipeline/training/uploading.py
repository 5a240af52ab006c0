"""Give a checkpoint its place in the run's folder: `state.json` is written last and marks it complete.

    upload = Upload(run_dir, Writer(rank=0, writers=2, start="9f0c41aa"), is_best=True, wait_s=600)
    upload(Path("incoming/0/step-00000200"), run_dir / "attempt-001" / "step-00000200")

    rank 1:  its files ──► written-9f0c41aa-00001.json, its part of state.json
    rank 0:  its files ──► waits for the others' parts ──► best/ ──► state.json, all parts in one

Each file appears whole or not at all, and a worker that is killed leaves a folder without state.json. `start` separates
this start of the workers from an earlier one, whose parts may lie in the same folder. The best is copied before
state.json is written: a run that resumes from a step has the best up to it.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.files import files_below, for_each, place, write_atomically
from pipeline.storage.lock import LockLost, holder_of
from pipeline.storage.object_store import BucketError
from pipeline.storage.path import StoragePath
from pipeline.training.checkpoints import keep_best

POLL_S = 0.5


@dataclass(frozen=True)
class Writer:
    """One of the workers that have a part of the checkpoint."""

    rank: int
    writers: int
    start: str

    def part(self, rank: int) -> str:
        return f"written-{self.start}-{rank:05d}.json"


@dataclass(frozen=True)
class Upload:
    run_dir: StoragePath
    writer: Writer
    is_best: bool
    wait_s: float
    holder: str = ""
    """Who held the run's folder when training began: the driver."""

    def __call__(self, folder: Path, target: StoragePath) -> None:
        """Take a sealed folder to its place, and delete it here.

        Raises BucketError if the bucket fails, or if another worker's part has not come after `wait_s` seconds, and
        LockLost if another job holds the run's folder by now.
        """
        if holder_of(self.run_dir) != self.holder:
            raise LockLost(f"another job has taken over {self.run_dir}")
        names = [name for name in files_below(folder) if name != "state.json"]
        if self.writer.rank == 0:
            (target / "state.json").unlink(missing_ok=True)  # of the same step before a restart
        for_each(target, lambda name: place(folder / name, target / name), names)
        if self.writer.rank > 0:
            place(folder / "state.json", target / self.writer.part(self.writer.rank))
        else:
            state_json = self._whole((folder / "state.json").read_text(), target)
            if self.is_best:
                keep_best(target, self.run_dir, state_json)
            write_atomically(target / "state.json", state_json.encode())
        shutil.rmtree(folder, ignore_errors=True)

    def _whole(self, own: str, target: StoragePath) -> str:
        """state.json with the files of all workers."""
        if self.writer.writers == 1:
            return own
        content, deadline = json.loads(own), time.monotonic() + self.wait_s
        for rank in range(1, self.writer.writers):
            part = target / self.writer.part(rank)
            while not part.is_file():
                if time.monotonic() > deadline:
                    raise BucketError(f"worker {rank} has not written its part of {target} in {self.wait_s:g} s")
                time.sleep(POLL_S)
            content["files"] |= json.loads(part.read_text())["files"]
        return json.dumps(content, indent=2)
