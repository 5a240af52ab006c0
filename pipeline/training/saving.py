"""When the loop saves: a checkpoint put together under another name, checksummed, and given its place when it is whole.

saver = Saver(config, tokenizer_json, place)
run.save = saver.save                         # place(state, folder) on every worker; rank 0's folder is written
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config import Config, ConfigError
from pipeline.model.folder import save_card
from pipeline.objectives.collectives import rank, total
from pipeline.training.checkpoints import (
    TrainState,
    incoming_folder,
    keep_best,
    load_optimizer,
    load_weights,
    save_checkpoint,
    seal,
    step_folder,
)
from pipeline.training.loop import Run, TrainingStopped
from pipeline.training.sharded import is_sharded, load_sharded, save_sharded


class Saver:
    """Rank 0 writes; under fsdp all workers write their parts into its folder, which all of them must see.

    `place` is called on every worker, and takes the folder to where a resume looks for it.
    """

    def __init__(self, config: Config, tokenizer_json: str, place: Callable[[TrainState, Path], None]) -> None:
        self.config, self.tokenizer_json, self.place = config, tokenizer_json, place

    def save(self, run: Run, state: TrainState, is_best: bool) -> None:
        """Raises TrainingStopped on all workers where the checkpoint cannot be written."""
        folder = incoming_folder(self.config.run_dir) / step_folder(state.step)
        problem: OSError | None = None
        try:
            self._write(folder, run, state, is_best)
        except OSError as error:
            problem = error
            shutil.rmtree(folder, ignore_errors=True)
        if total(torch.tensor(float(problem is not None), device=run.device)):
            raise TrainingStopped(
                f"step {state.step}: the checkpoint could not be written to {folder.parent} "
                f"({problem.strerror if problem else 'rank 0 says why'}); make room there and run the same command "
                f"again, it goes on from the last good checkpoint, of step {run.saved_step or 'none'}"
            ) from problem
        self.place(state, folder)

    def _write(self, folder: Path, run: Run, state: TrainState, is_best: bool) -> None:
        max_length = self.config.tokenizer.max_length
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        if run.strategy.lockstep:
            save_sharded(folder, run.learner, run.optimizer)
            if rank() == 0:
                save_card(folder, run.learner.model, self.tokenizer_json, max_length)
                seal(folder, state)
        elif rank() == 0:
            save_checkpoint(
                folder, run.learner, run.optimizer, state, tokenizer_json=self.tokenizer_json, max_length=max_length
            )
        if is_best and rank() == 0:
            keep_best(folder, self.config.run_dir)


def load(checkpoint: Path, run: Run) -> None:
    """Take up the weights and the optimizer of a checkpoint that is whole. Raises ConfigError for ddp's under fsdp."""
    if is_sharded(checkpoint):
        load_sharded(checkpoint, run.learner, run.optimizer)
    elif run.strategy.lockstep:
        raise ConfigError(
            f"training.strategy: found fsdp, and {checkpoint} of a ddp run; allowed is ddp, or another storage.run"
        )
    else:
        load_weights(checkpoint, run.learner)
        load_optimizer(checkpoint, run.optimizer, run.device)


def move(folder: Path, target: Path) -> Path:
    """Give a finished folder its place; on one file system it appears there whole. Returns the place."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    return target
