"""A checkpoint on its way from a worker's disk to a bucket, where `state.json` comes last and calls it whole.

    upload = Upload(run_dir, Writer(rank=0, writers=2, start="9f0c41aa"), is_best=True, wait_s=600)
    upload(Path("incoming/step-00000200"), run_dir / "attempt-001" / "step-00000200")

    rank 1:  its files ──► written-9f0c41aa-00001.json, its part of state.json
    rank 0:  its files ──► waits for the others' parts ──► best/ ──► state.json, their parts in one

One upload is one object that is there whole or not at all, and a worker that is killed leaves a folder without
state.json. `start` tells this start of the workers from one before it, whose parts may lie in the same folder. The
best is copied inside the bucket, and before state.json: a run that goes on from a step has the best up to it.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.files import for_each, remove_folder
from pipeline.storage.bucket import AnyPath, BucketError, BucketPath
from pipeline.training.checkpoints import without_optimizer

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
    run_dir: BucketPath
    writer: Writer
    is_best: bool
    wait_s: float

    def __call__(self, folder: Path, target: AnyPath) -> None:
        """Take a sealed folder to its place, and delete it here. Raises BucketError where the bucket fails, or another
        worker's part has not come after `wait_s` seconds."""
        assert isinstance(target, BucketPath)
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        names.remove("state.json")
        for_each(target, lambda name: (target / name).upload(folder / name), names)
        if self.writer.rank > 0:
            (target / self.writer.part(self.writer.rank)).upload(folder / "state.json")
        else:
            state_json = self._whole((folder / "state.json").read_text(), target)
            if self.is_best:
                self._keep_best(target, state_json)
            (target / "state.json").write_bytes(state_json.encode())
        shutil.rmtree(folder, ignore_errors=True)

    def _whole(self, own: str, target: BucketPath) -> str:
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

    def _keep_best(self, checkpoint: BucketPath, state_json: str) -> None:
        """As checkpoints.keep_best does on a disk."""
        best = self.run_dir / "best" / checkpoint.name
        remove_folder(best)
        kept = without_optimizer(state_json)
        for_each(best, lambda name: (checkpoint / name).copy_to(best / name), list(json.loads(kept)["files"]))
        (best / "state.json").write_bytes(kept)
        for other in list(best.parent.iterdir()):
            if other != best:
                remove_folder(other)
