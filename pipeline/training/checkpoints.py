"""The checkpoints of a run: find the newest valid one, commit a new one, delete old ones.

    point = newest_valid(run_dir)                          # reads and hashes the newest checkpoint, once
    point.folder, point.state, point.skipped

    <run>/attempt-001/step-00000200/{model.safetensors, model.json, tokenizer.json, heads.safetensors, optimizer.pt,
                                     state.json}
    <run>/best/step-00000200/…

`state.json` holds the step, the metrics and the hash of each file. It is written last: a folder without it, or with a
file that does not match its hash, is not a checkpoint. Each start of a run writes into a new `attempt-*` folder.

Why we also rotate checkpoints ourselves: Ray's CheckpointConfig keeps the newest K of one start of the driver, but a
run needs the newest K of all its starts (to fall back on if the newest is broken) and the best, also without Ray. So
Ray keeps the newest K of an attempt, `prune` the newest K of all attempts, and the best is linked into `best/`.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipeline.core.console import log
from pipeline.core.files import (
    files_below,
    for_each,
    link_or_copy,
    local_copy,
    remove_folder,
    sorted_glob,
    staging,
    write_atomically,
    xxh3_of,
)
from pipeline.core.lock import LockLost, holder_of
from pipeline.core.object_store import BucketError
from pipeline.core.path import StoragePath, stays_below

OOM_SPLITS = "oom_splits"
POLL_S = 0.5
WEIGHTS = "weights"  # replaces model.safetensors if each worker wrote a shard


@dataclass
class TrainState:
    """The training state that a checkpoint stores.

    The position in the data, the learning rate and all seeds are functions of `step`, so they are not stored.
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
    """How often micro-batches were halved after running out of memory."""
    scaler: dict[str, float] = field(default_factory=dict)
    """The state of torch's GradScaler; only used in fp16."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumePoint:
    """The newest valid checkpoint and its state; without a checkpoint, the state of step 0."""

    folder: StoragePath | None = None
    state: TrainState = field(default_factory=TrainState)
    skipped: tuple[str, ...] = ()
    """A sentence for each newer checkpoint that is broken."""


def is_sharded(folder: StoragePath) -> bool:
    """Whether each worker wrote a shard of the checkpoint."""
    return (folder / WEIGHTS).is_dir()


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def next_attempt(run_dir: StoragePath) -> str:
    """An unused folder name: Ray would restore the state of an earlier attempt with the same name."""
    taken = [int(folder.name.removeprefix("attempt-")) for folder in run_dir.glob("attempt-[0-9]*")]
    return f"attempt-{max(taken, default=0) + 1:03d}"


def note_oom_splits(run_dir: StoragePath, oom_splits: int) -> None:
    """Store how often to halve micro-batches, for a run that must restart after running out of memory."""
    write_atomically(run_dir / OOM_SPLITS, str(oom_splits).encode())


def noted_oom_splits(run_dir: StoragePath) -> int:
    path = run_dir / OOM_SPLITS
    return int(path.read_text()) if path.is_file() else 0


def seal(folder: Path, state: TrainState) -> None:
    """Write `state.json` with the hashes of all files in the folder."""
    hashes = {name: xxh3_of(folder / name) for name in files_below(folder)}
    write_atomically(folder / "state.json", _sealed(state, hashes))


def _sealed(state: TrainState, hashes: dict[str, str]) -> bytes:
    return json.dumps({**asdict(state), "files": hashes}, indent=2).encode()


def read_state(folder: StoragePath) -> TrainState:
    """Verify the hashes of a checkpoint's files and return its state. Raises ValueError naming a broken file."""
    if not (folder / "state.json").is_file():
        raise ValueError("its state.json is missing or broken")
    local = local_copy(folder)
    try:
        content = json.loads((local / "state.json").read_text())
        hashes: dict[str, str] = content.pop("files")
        state = TrainState(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its state.json is missing or broken") from None
    for name, expected in hashes.items():
        path = local / name
        if not stays_below(name) or not path.is_file() or xxh3_of(path) != expected:
            raise ValueError(f"its {name} is missing or broken")
    return state


def newest_valid(run_dir: StoragePath, known: ResumePoint | None = None) -> ResumePoint:
    """The newest checkpoint whose files match their hashes. If `known` is still the newest, it is not read again."""
    skipped: list[str] = []
    for folder in _newest_first(run_dir):
        if known and folder == known.folder:
            return known
        try:
            return ResumePoint(folder, read_state(folder), tuple(skipped))
        except ValueError as error:
            skipped.append(f"skipped {folder}: {error}")
    return ResumePoint(skipped=tuple(skipped))


def resume_point(run_dir: StoragePath, known: ResumePoint | None = None) -> ResumePoint:
    """`newest_valid`, with a warning for each checkpoint that it skipped."""
    point = newest_valid(run_dir, known)
    for sentence in point.skipped if point is not known else ():
        log.warning("train: %s", sentence)
    return point


def best_checkpoint(run_dir: StoragePath) -> StoragePath | None:
    """The checkpoint with the best validation score; if it is missing or broken, the newest valid one."""
    for folder in reversed(sorted_glob(run_dir / "best", "step-*[0-9]")):
        try:
            read_state(folder)
            return folder
        except ValueError:
            continue
    return newest_valid(run_dir).folder


def start_from(run_dir: StoragePath, source: Path | None) -> None:
    """Make a copy of the checkpoint `source` the only one of a run; with None, leave the run no checkpoint.

    The best score stays the run's own, like the model in `best/`. Raises ValueError if a file of `source` is broken.
    """
    best_metric, earlier = newest_valid(run_dir).state.best_metric, sorted_glob(run_dir, "attempt-[0-9]*")
    if source:
        state = replace(read_state(source), best_metric=best_metric)
        target = run_dir / next_attempt(run_dir) / step_folder(state.step)
        hashes = json.loads((source / "state.json").read_text())["files"]
        for_each(target, lambda name: link_or_copy(source / name, target / name), list(hashes))
        write_atomically(target / "state.json", _sealed(state, hashes))
    for attempt in earlier:
        remove_folder(attempt)


def prune(run_dir: StoragePath, keep: int, newest: StoragePath | None = None) -> None:
    """Keep the newest `keep` checkpoints over all attempts; delete the others and leftover files.

    Don't call it while a Ray trainer runs: the trainer expects its checkpoints to exist. `newest` is the newest
    checkpoint whose hashes were verified. It is kept; newer ones are broken and deleted, like those that lack files.
    """
    shutil.rmtree(staging(run_dir), ignore_errors=True)
    folders, kept = _newest_first(run_dir), list[StoragePath]()
    broken = folders[: folders.index(newest)] if newest and newest in folders else []
    for folder in folders:
        if folder == newest or (folder not in broken and len(kept) < keep and _has_all_files(folder)):
            kept.append(folder)
        else:
            remove_folder(folder)
    for attempt in sorted_glob(run_dir, "attempt-[0-9]*"):
        if attempt not in {folder.parent for folder in kept}:
            remove_folder(attempt)


@dataclass(frozen=True)
class Committer:
    """Moves a worker's files of a checkpoint into the run's folder.

        committer = Committer(run_dir, rank=0, writers=2, start="9f0c41aa", wait_s=600)
        committer.commit(Path("incoming/0/step-00000200"), run_dir / "attempt-001" / "step-00000200", is_best=True)

        rank 1:  moves its files ──► written-9f0c41aa-00001.json, its part of state.json
        rank 0:  moves its files ──► waits for the other parts ──► best/ ──► state.json, merged from all parts

    Each file is moved atomically, and state.json comes last: a killed worker leaves no broken checkpoint. `best/` is
    updated before state.json, so a run that resumes from a step has the best checkpoint up to it.
    """

    run_dir: StoragePath
    rank: int
    writers: int
    start: str
    """An id of this start of the workers; an earlier start may have left parts in the same folder."""
    wait_s: float
    holder: str = ""
    """The holder of the run folder's lock when training began (the driver)."""

    def commit(self, folder: Path, target: StoragePath, is_best: bool) -> None:
        """Move a sealed folder to `target`.

        Raises BucketError if the bucket fails or another worker's part is missing after `wait_s` seconds, and LockLost
        if another job now holds the run's folder.
        """
        if holder_of(self.run_dir) != self.holder:
            raise LockLost(f"another job has taken over {self.run_dir}")
        names = [name for name in files_below(folder) if name != "state.json"]
        if self.rank == 0:
            (target / "state.json").unlink(missing_ok=True)  # of the same step before a restart
        for_each(target, lambda name: link_or_copy(folder / name, target / name), names)
        if self.rank > 0:
            link_or_copy(folder / "state.json", target / self.part(self.rank))
        else:
            state_json = self._merged_state((folder / "state.json").read_text(), target)
            if is_best:
                link_best(target, self.run_dir, state_json)
            write_atomically(target / "state.json", state_json.encode())
        shutil.rmtree(folder, ignore_errors=True)

    def part(self, rank: int) -> str:
        """The name of a worker's part of state.json."""
        return f"written-{self.start}-{rank:05d}.json"

    def _merged_state(self, state_json: str, target: StoragePath) -> str:
        """This worker's state.json, extended by the files of all others."""
        if self.writers == 1:
            return state_json
        content, deadline = json.loads(state_json), time.monotonic() + self.wait_s
        for rank in range(1, self.writers):
            part = target / self.part(rank)
            while not part.is_file():
                if time.monotonic() > deadline:
                    raise BucketError(f"worker {rank} has not written its part of {target} in {self.wait_s:g} s")
                time.sleep(POLL_S)
            content["files"] |= json.loads(part.read_text())["files"]
        return json.dumps(content, indent=2)


def link_best(checkpoint: StoragePath, run_dir: StoragePath, state_json: str) -> None:
    """Link a checkpoint, without its optimizer, into `best/`, then delete the previous best."""
    best = run_dir / "best" / checkpoint.name
    remove_folder(best)
    content = json.loads(state_json)
    content["files"] = {name: digest for name, digest in content["files"].items() if not name.startswith("optimizer")}
    for_each(best, lambda name: link_or_copy(checkpoint / name, best / name), list(content["files"]))
    write_atomically(best / "state.json", json.dumps(content, indent=2).encode())
    for other in sorted_glob(best.parent, "*"):
        if other != best:
            remove_folder(other)


def _newest_first(run_dir: StoragePath) -> list[StoragePath]:
    folders = sorted_glob(run_dir, "attempt-[0-9]*/step-[0-9]*")
    return sorted(folders, key=lambda folder: (folder.name, folder.parent.name), reverse=True)


def _has_all_files(folder: StoragePath) -> bool:
    try:
        return bool(json.loads((folder / "state.json").read_text())["files"].keys() <= files_below(folder).keys())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False
