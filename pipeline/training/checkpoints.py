"""Checkpoints: a model folder, what was trained beside the model, the optimizer, and `state.json`, written last.

`state.json` holds the step, the metrics and every file's hash, so a folder without it, or with a file that does not
match it, is passed over; `newest_valid` says which those were. Ray's rotation keeps the newest K of one start of the
driver; `newest_valid` looks over all starts (`attempt-*`), and the best by validation lies outside Ray's list, in
`best/`, because Ray's rotation cannot keep both the newest and the best. A checkpoint in a bucket is fetched to be
read.

    <run>/attempt-001/step-00000200/{model.safetensors, model.json, tokenizer.json, partners.safetensors, optimizer.pt,
                                     state.json}
    <run>/best/step-00000200/…
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.storage.files import (
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
from pipeline.storage.path import StoragePath

if TYPE_CHECKING:  # torch takes a second, which search and a run with nothing to do can go without
    import torch

    from pipeline.model.learner import Learner

HALVINGS = "halvings"
PARTNERS = "partners.safetensors"  # a decoder, a prediction head, a learned temperature
WEIGHTS = "weights"  # the folder in place of model.safetensors, where each worker wrote its part


@dataclass
class TrainState:
    """Where training stands.

    The feed's position, the schedule's and every worker's seeds of chance are functions of `step`: what is not here
    need not be kept.
    """

    step: int = 0
    train_seconds: float = 0.0
    best_metric: float | None = None
    """Score of the best validation so far, higher for the better."""
    validations_without_gain: int = 0
    ended_early: bool = False
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    halvings: int = 0
    """How often micro-batches were halved for want of memory."""
    scaler: dict[str, float] = field(default_factory=dict)
    """torch's GradScaler, where training is in fp16."""
    metrics: dict[str, float] = field(default_factory=dict)


def is_sharded(folder: Path) -> bool:
    """Whether each worker wrote its part of the checkpoint: see training/sharded.py."""
    return (folder / WEIGHTS).is_dir()


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    tokenizer_json: str,
    max_length: int,
) -> None:
    """Write a checkpoint into an empty folder, `state.json` last."""
    import torch
    from safetensors.torch import save_file

    from pipeline.model.folder import save_model

    save_model(folder, learner.model, tokenizer_json, max_length)
    partners = {name: tensor.contiguous() for name, tensor in learner.state_dict().items() if not _is_model(name)}
    if partners:
        save_file(partners, folder / PARTNERS)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    seal(folder, state)


def seal(folder: Path, state: TrainState) -> None:
    """Write `state.json`, and so call what lies in the folder whole."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    hashes = {str(path.relative_to(folder)): _hash(path) for path in files}
    temporary = folder / "state.json.tmp"
    temporary.write_text(json.dumps({**asdict(state), "files": hashes}, indent=2))
    temporary.rename(folder / "state.json")


def read_state(folder: StoragePath) -> TrainState:
    """The state of a checkpoint whose files all match their hashes. Raises ValueError saying what does not."""
    if not (folder / "state.json").is_file():
        raise ValueError("its state.json is missing or broken")
    local = fetched(folder)
    try:
        content: dict[str, Any] = json.loads((local / "state.json").read_text())
        hashes = content.pop("files")
        state = TrainState(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its state.json is missing or broken") from None
    for name, expected in hashes.items():
        path = local / name
        if not path.is_file() or _hash(path) != expected:
            raise ValueError(f"its {name} is missing or broken")
    return state


def load_weights(folder: Path, learner: Learner) -> None:
    """The model, and what is trained beside it."""
    from safetensors.torch import load_file

    learner.model.backbone.load_state_dict(load_file(folder / "model.safetensors"))
    partners = load_file(folder / PARTNERS) if (folder / PARTNERS).is_file() else {}
    missing, unexpected = learner.load_state_dict(partners, strict=False)
    assert not unexpected
    assert all(_is_model(name) for name in missing)


def _is_model(name: str) -> bool:
    return name.startswith("model.")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    import torch

    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))


def newest_valid(run_dir: StoragePath) -> tuple[StoragePath | None, list[str]]:
    """The checkpoint furthest on whose files are whole, and a sentence for each one that was passed over."""
    passed_over: list[str] = []
    for folder in _newest_first(run_dir):
        try:
            read_state(folder)
            return folder, passed_over
        except ValueError as error:
            passed_over.append(f"{folder} was passed over: {error}")
    return None, passed_over


def best_checkpoint(run_dir: StoragePath) -> StoragePath | None:
    """The checkpoint kept for its validation score, else the newest whole one."""
    best = sorted(matching(run_dir / "best", "step-*[0-9]"), key=lambda folder: folder.name, reverse=True)
    return next((folder for folder in best if _is_valid(folder)), None) or newest_valid(run_dir)[0]


def keep_best(checkpoint: StoragePath, run_dir: StoragePath, state_json: str) -> None:
    """Give a checkpoint a second place in `best/`, without what only training needs, then drop the one it beats."""
    best = run_dir / "best" / checkpoint.name
    remove_folder(best)
    content = json.loads(state_json)
    content["files"] = {name: found for name, found in content["files"].items() if not name.startswith("optimizer")}
    for_each(best, lambda name: place(checkpoint / name, best / name), list(content["files"]))
    write_atomically(best / "state.json", json.dumps(content, indent=2).encode())
    for other in matching(best.parent, "*"):
        if other != best:
            remove_folder(other)


def next_attempt(run_dir: StoragePath) -> str:
    """A folder name no start of the driver has had: Ray takes an old one for a run to restore."""
    taken = [int(folder.name.removeprefix("attempt-")) for folder in run_dir.glob("attempt-[0-9]*")]
    return f"attempt-{max(taken, default=0) + 1:03d}"


def note_halvings(run_dir: StoragePath, halvings: int) -> None:
    """For the next start of a run that cannot go on without one: its micro-batches are to be halved so often."""
    write_atomically(run_dir / HALVINGS, str(halvings).encode())


def noted_halvings(run_dir: StoragePath) -> int:
    path = run_dir / HALVINGS
    return int(path.read_text()) if path.is_file() else 0


def prune(run_dir: StoragePath, keep: int, spared: StoragePath | None = None) -> None:
    """Keep the newest `keep` whole checkpoints over all attempts; drop the rest, and what attempts leave behind.

    Not while an attempt is under way: Ray must find the checkpoints that it knows of. A checkpoint counts as whole if
    all its files are there. Hashes are not checked here: `spared`, which passed that check, stays in any case.
    """
    shutil.rmtree(staging(run_dir), ignore_errors=True)
    kept: list[StoragePath] = []
    for folder in _newest_first(run_dir):
        if folder == spared or (len(kept) < keep and _seems_valid(folder)):
            kept.append(folder)
        else:
            remove_folder(folder)
    for attempt in matching(run_dir, "attempt-[0-9]*"):
        if attempt not in {folder.parent for folder in kept}:
            remove_folder(attempt)


def _newest_first(run_dir: StoragePath) -> list[StoragePath]:
    folders = matching(run_dir, "attempt-[0-9]*/step-[0-9]*")
    return sorted(folders, key=lambda folder: (folder.name, folder.parent.name), reverse=True)


def _seems_valid(folder: StoragePath) -> bool:
    """Whole, as far as that shows without reading it."""
    try:
        return bool(json.loads((folder / "state.json").read_text())["files"].keys() <= files_below(folder).keys())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_valid(folder: StoragePath) -> bool:
    try:
        return bool(read_state(folder))
    except ValueError:
        return False


def _hash(path: Path) -> str:
    return digest_of(path, xxhash.xxh3_128())
