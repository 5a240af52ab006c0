"""Checkpoints under Ray Train: put together under another name, then moved to where Ray and a resume look for them.

Ray calls the move in a thread of its own while training goes on, and keeps the newest K of one start of the driver; the
best lies outside its list.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.objectives.collectives import rank, total
from pipeline.training.checkpoints import (
    TrainState,
    incoming_folder,
    keep_best,
    load_optimizer,
    load_weights,
    save_checkpoint,
    step_folder,
)
from pipeline.training.loop import Run, TrainingStopped

if TYPE_CHECKING:
    from ray.train import Checkpoint


class Saver:
    """Rank 0 writes; every rank reports, which is a barrier."""

    def __init__(self, config: Config, tokenizer_json: str) -> None:
        self.config, self.tokenizer_json = config, tokenizer_json

    def save(self, run: Run, state: TrainState, is_best: bool) -> None:
        """Raises TrainingStopped on all workers where the checkpoint cannot be written, with what there was left."""
        from ray.train import Checkpoint, CheckpointUploadMode, report

        name = step_folder(state.step)
        folder = incoming_folder(self.config.run_dir) / name
        self._write_or_stop(folder, run, state, is_best)
        report(
            state.metrics,
            checkpoint=Checkpoint.from_directory(str(folder)) if rank() == 0 else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=_move,
        )

    def _write_or_stop(self, folder: Path, run: Run, state: TrainState, is_best: bool) -> None:
        import torch

        problem: OSError | None = None
        try:
            if rank() == 0:
                self._write(folder, run, state, is_best)
        except OSError as error:
            problem = error
            shutil.rmtree(folder, ignore_errors=True)
        if total(torch.tensor(float(problem is not None), device=run.device)):
            raise TrainingStopped(
                f"step {state.step}: the checkpoint could not be written to {folder.parent} "
                f"({problem.strerror if problem else 'another worker says why'}); make room there and run the same "
                f"command again, it goes on from the last good checkpoint, of step {run.saved_step or 'none'}"
            )

    def _write(self, folder: Path, run: Run, state: TrainState, is_best: bool) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_checkpoint(
            folder,
            run.learner,
            run.optimizer,
            state,
            tokenizer_json=self.tokenizer_json,
            max_length=self.config.tokenizer.max_length,
        )
        if is_best:
            keep_best(folder, self.config.run_dir)


def load(checkpoint: Path, run: Run) -> None:
    """Weights and optimizer of a checkpoint that is whole."""
    load_weights(checkpoint, run.learner)
    load_optimizer(checkpoint, run.optimizer, run.device)


def _move(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Give a finished folder its place in the attempt's; on one file system it appears there whole."""
    from ray.train import Checkpoint, get_context

    storage: Any = get_context().get_storage()
    target = Path(storage.experiment_fs_path) / name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(checkpoint.path).rename(target)
    return Checkpoint(str(target), storage.storage_filesystem)
