"""The checkpoints of a run: find the newest one that is whole, put a new one in its place, delete old ones.

    point = newest_valid(run_dir)                          # reads and hashes the newest checkpoint, once
    point.folder, point.state, point.passed_over

    <run>/attempt-001/step-00000200/{model.safetensors, model.json, tokenizer.json, heads.safetensors, optimizer.pt,
                                     state.json}
    <run>/best/step-00000200/…

`state.json` holds the step, the metrics and the hash of each file. It is written last, so a folder without it, or with
a file that does not match its hash, is not a checkpoint. Each start of a run writes into an `attempt-*` of its own.

Why we also rotate checkpoints ourselves: Ray's CheckpointConfig keeps the newest K, or with a score the top K and the
latest, of one start of the driver, but a run needs the newest K (to fall back on if the newest is broken) and the best
of all its starts, with Ray and without. So Ray keeps the newest K of an attempt, `prune` the newest K of all attempts,
and the best is linked into `best/`.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import xxhash

from pipeline.core.console import log
from pipeline.core.files import (
    digest_of,
    fetched,
    files_below,
    for_each,
    matching,
    place,
    remove_folder,
    staging,
    write_atomically,
)
from pipeline.core.lock import LockLost, holder_of
from pipeline.core.object_store import BucketError
from pipeline.core.path import StoragePath

OOM_SPLITS = "oom_splits"
POLL_S = 0.5
WEIGHTS = "weights"  # the folder that replaces model.safetensors if each worker wrote its part


@dataclass
class TrainState:
    """Where training stands.

    The position in the data, the learning rate and all random seeds are functions of `step`, so they are not stored.
    """

    step: int = 0
    train_seconds: float = 0.0
    best_metric: float | None = None
    """Score of the best validation so far; higher is better."""
    validations_without_gain: int = 0
    ended_early: bool = False
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    oom_splits: int = 0
    """How often micro-batches were halved because memory ran out."""
    scaler: dict[str, float] = field(default_factory=dict)
    """The state of torch's GradScaler, in fp16."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumePoint:
    """The newest whole checkpoint and its state; without one, the first step."""

    folder: StoragePath | None = None
    state: TrainState = field(default_factory=TrainState)
    passed_over: tuple[str, ...] = ()
    """A sentence for each newer checkpoint that is not whole."""


def is_sharded(folder: StoragePath) -> bool:
    """Whether each worker wrote its part of the checkpoint."""
    return (folder / WEIGHTS).is_dir()


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def next_attempt(run_dir: StoragePath) -> str:
    """A folder name that no start of the run has had: Ray would restore the state of a run with the same name."""
    taken = [int(folder.name.removeprefix("attempt-")) for folder in run_dir.glob("attempt-[0-9]*")]
    return f"attempt-{max(taken, default=0) + 1:03d}"


def note_oom_splits(run_dir: StoragePath, oom_splits: int) -> None:
    """Tell the next start how often to halve micro-batches; for runs that must restart when memory runs out."""
    write_atomically(run_dir / OOM_SPLITS, str(oom_splits).encode())


def noted_oom_splits(run_dir: StoragePath) -> int:
    path = run_dir / OOM_SPLITS
    return int(path.read_text()) if path.is_file() else 0


def seal(folder: Path, state: TrainState) -> None:
    """Write `state.json` with the hashes of all files in the folder."""
    hashes = {name: _hash(folder / name) for name in files_below(folder)}
    write_atomically(folder / "state.json", json.dumps({**asdict(state), "files": hashes}, indent=2).encode())


def read_state(folder: StoragePath) -> TrainState:
    """The state of a checkpoint whose files all match their hashes. Raises ValueError naming a file that does not."""
    if not (folder / "state.json").is_file():
        raise ValueError("its state.json is missing or broken")
    local = fetched(folder)
    try:
        content = json.loads((local / "state.json").read_text())
        hashes: dict[str, str] = content.pop("files")
        state = TrainState(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its state.json is missing or broken") from None
    for name, expected in hashes.items():
        path = local / name
        if not path.is_file() or _hash(path) != expected:
            raise ValueError(f"its {name} is missing or broken")
    return state


def newest_valid(run_dir: StoragePath, known: ResumePoint | None = None) -> ResumePoint:
    """The newest checkpoint whose files are whole. A `known` one that still is the newest is not read again."""
    passed_over: list[str] = []
    for folder in _newest_first(run_dir):
        if known and folder == known.folder:
            return known
        try:
            return ResumePoint(folder, read_state(folder), tuple(passed_over))
        except ValueError as error:
            passed_over.append(f"{folder} was passed over: {error}")
    return ResumePoint(passed_over=tuple(passed_over))


def resume_point(run_dir: StoragePath, known: ResumePoint | None = None) -> ResumePoint:
    """`newest_valid`, with a warning for each checkpoint that was passed over."""
    point = newest_valid(run_dir, known)
    for sentence in point.passed_over if point is not known else ():
        log.warning("train: %s", sentence)
    return point


def best_checkpoint(run_dir: StoragePath) -> StoragePath | None:
    """The checkpoint with the best validation score; if it is missing or broken, the newest one that is whole."""
    for folder in reversed(matching(run_dir / "best", "step-*[0-9]")):
        try:
            read_state(folder)
            return folder
        except ValueError:
            continue
    return newest_valid(run_dir).folder


def prune(run_dir: StoragePath, keep: int, newest: StoragePath | None = None) -> None:
    """Keep the newest `keep` checkpoints over all attempts; delete the others, and what attempts leave behind.

    Not while a Ray trainer runs, which must find the checkpoints that it knows of. `newest` is the newest checkpoint
    whose hashes were checked: it stays, and newer ones are broken and go. Of the others, those that lack files go.
    """
    shutil.rmtree(staging(run_dir), ignore_errors=True)
    folders, kept = _newest_first(run_dir), list[StoragePath]()
    broken = folders[: folders.index(newest)] if newest and newest in folders else []
    for folder in folders:
        if folder == newest or (folder not in broken and len(kept) < keep and _has_all_files(folder)):
            kept.append(folder)
        else:
            remove_folder(folder)
    for attempt in matching(run_dir, "attempt-[0-9]*"):
        if attempt not in {folder.parent for folder in kept}:
            remove_folder(attempt)


@dataclass(frozen=True)
class Placer:
    """Moves what a worker wrote of a checkpoint to its place in the run's folder.

        placer = Placer(run_dir, rank=0, writers=2, start="9f0c41aa", wait_s=600)
        placer.place(Path("incoming/0/step-00000200"), run_dir / "attempt-001" / "step-00000200", is_best=True)

        rank 1:  its files ──► written-9f0c41aa-00001.json, its part of state.json
        rank 0:  its files ──► waits for the others' parts ──► best/ ──► state.json, all parts in one

    Each file appears whole or not at all, and a worker that is killed leaves a folder without state.json. The best is
    copied before state.json is written, so a run that resumes from a step has the best up to it.
    """

    run_dir: StoragePath
    rank: int
    writers: int
    start: str
    """Separates this start of the workers from an earlier one, whose parts may lie in the same folder."""
    wait_s: float
    holder: str = ""
    """Who held the lock on the run's folder when training began: the driver."""

    def place(self, folder: Path, target: StoragePath, is_best: bool) -> None:
        """Move a sealed folder to its place.

        Raises BucketError if the bucket fails, or if another worker's part is missing after `wait_s` seconds, and
        LockLost if another job holds the run's folder by now.
        """
        if holder_of(self.run_dir) != self.holder:
            raise LockLost(f"another job has taken over {self.run_dir}")
        names = [name for name in files_below(folder) if name != "state.json"]
        if self.rank == 0:
            (target / "state.json").unlink(missing_ok=True)  # of the same step before a restart
        for_each(target, lambda name: place(folder / name, target / name), names)
        if self.rank > 0:
            place(folder / "state.json", target / self.part(self.rank))
        else:
            state_json = self._merged_state((folder / "state.json").read_text(), target)
            if is_best:
                keep_best(target, self.run_dir, state_json)
            write_atomically(target / "state.json", state_json.encode())
        shutil.rmtree(folder, ignore_errors=True)

    def part(self, rank: int) -> str:
        """The name of a worker's part of state.json."""
        return f"written-{self.start}-{rank:05d}.json"

    def _merged_state(self, own: str, target: StoragePath) -> str:
        """state.json with the files of all workers."""
        if self.writers == 1:
            return own
        content, deadline = json.loads(own), time.monotonic() + self.wait_s
        for rank in range(1, self.writers):
            part = target / self.part(rank)
            while not part.is_file():
                if time.monotonic() > deadline:
                    raise BucketError(f"worker {rank} has not written its part of {target} in {self.wait_s:g} s")
                time.sleep(POLL_S)
            content["files"] |= json.loads(part.read_text())["files"]
        return json.dumps(content, indent=2)


def keep_best(checkpoint: StoragePath, run_dir: StoragePath, state_json: str) -> None:
    """Link a checkpoint into `best/`, without the optimizer, then delete the one that was there."""
    best = run_dir / "best" / checkpoint.name
    remove_folder(best)
    content = json.loads(state_json)
    content["files"] = {name: found for name, found in content["files"].items() if not name.startswith("optimizer")}
    for_each(best, lambda name: place(checkpoint / name, best / name), list(content["files"]))
    write_atomically(best / "state.json", json.dumps(content, indent=2).encode())
    for other in matching(best.parent, "*"):
        if other != best:
            remove_folder(other)


def _newest_first(run_dir: StoragePath) -> list[StoragePath]:
    folders = matching(run_dir, "attempt-[0-9]*/step-[0-9]*")
    return sorted(folders, key=lambda folder: (folder.name, folder.parent.name), reverse=True)


def _has_all_files(folder: StoragePath) -> bool:
    try:
        return bool(json.loads((folder / "state.json").read_text())["files"].keys() <= files_below(folder).keys())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _hash(path: Path) -> str:
    return digest_of(path, xxhash.xxh3_128())
