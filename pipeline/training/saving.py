"""When the loop saves: a checkpoint put together under another name, checksummed, and given its place when it is whole.

saver = Saver(config, tokenizer_json, place)
run.save = saver.save          # place(state, folder, take) on every worker; take(folder, target) where one has written
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import Config, ConfigError
from pipeline.model.folder import save_card
from pipeline.objectives.collectives import rank, total, world_size
from pipeline.storage.files import fetched, staging
from pipeline.storage.path import StoragePath
from pipeline.training.checkpoints import (
    TrainState,
    is_sharded,
    load_optimizer,
    load_weights,
    save_checkpoint,
    seal,
    step_folder,
)
from pipeline.training.loop import Run, TrainingStopped
from pipeline.training.uploading import Upload, Writer

Take = Callable[[Path, StoragePath], None]
"""Gives a finished folder its place."""
Place = Callable[[TrainState, Path, Take | None], None]


class Saver:
    """Rank 0 writes; under fsdp every worker writes its part, into a folder of its own.

    `place` is called on every worker, and says where a resume looks for the checkpoint; what it is to call with the
    folder and that place is None on a worker that has written nothing.
    """

    def __init__(self, config: Config, tokenizer_json: str, place: Place, holder: str = "") -> None:
        self.config, self.tokenizer_json, self.place, self.holder = config, tokenizer_json, place, holder
        self.incoming = staging(config.run_dir) / str(rank())
        self.start = agreed(uuid.uuid4().hex[:8])

    def save(self, run: Run, state: TrainState, is_best: bool) -> None:
        """Raises TrainingStopped on all workers where the checkpoint cannot be written."""
        folder = self.incoming / step_folder(state.step)
        with self._on_all_or_none(folder, run, state):
            if self._writes(run):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        # Only now: under fsdp, writing is collective, and would wait for a worker that has no folder.
        with self._on_all_or_none(folder, run, state):
            if self._writes(run):
                self._write(folder, run, state)
        self.place(state, folder, self._take(run, is_best))

    @contextmanager
    def _on_all_or_none(self, folder: Path, run: Run, state: TrainState) -> Iterator[None]:
        """Wait for all workers; where one of them met an OSError, raise TrainingStopped on each."""
        problem: OSError | None = None
        try:
            yield
        except OSError as error:
            problem = error
            shutil.rmtree(folder, ignore_errors=True)
        if total(torch.tensor(float(problem is not None), device=run.device)):
            reason = (problem.strerror or problem) if problem else "another worker says why"
            raise TrainingStopped(
                f"step {state.step}: the checkpoint could not be written to {folder.parent} ({reason}); make room "
                f"there and run the same command again, it goes on from the last good checkpoint, of step "
                f"{run.saved_step or 'none'}"
            ) from problem

    def _take(self, run: Run, is_best: bool) -> Take | None:
        if not self._writes(run):
            return None
        writers = world_size() if run.strategy.lockstep else 1
        wait_s = self.config.scaling.collective_timeout_s
        return Upload(self.config.run_dir, Writer(rank(), writers, self.start), is_best, wait_s, self.holder)

    def _writes(self, run: Run) -> bool:
        """Whether this worker has a folder of its own to give its place."""
        return rank() == 0 or run.strategy.lockstep

    def _write(self, folder: Path, run: Run, state: TrainState) -> None:
        max_length = self.config.tokenizer.max_length
        if run.strategy.lockstep:
            from pipeline.training.sharded import save_sharded

            save_sharded(folder, run.learner, run.optimizer)
            if rank() == 0:
                save_card(folder, run.learner.model, self.tokenizer_json, max_length)
            seal(folder, state)
        else:
            save_checkpoint(
                folder, run.learner, run.optimizer, state, tokenizer_json=self.tokenizer_json, max_length=max_length
            )


def agreed(value: str) -> str:
    """Rank 0's value, on all workers."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def load(place: StoragePath, run: Run) -> None:
    """Take up the weights and the optimizer of a checkpoint that is whole. Raises ConfigError for ddp's under fsdp."""
    checkpoint = fetched(place)
    if is_sharded(checkpoint):
        from pipeline.training.sharded import load_sharded

        load_sharded(checkpoint, run.learner, run.optimizer)
    elif run.strategy.lockstep:
        raise ConfigError(
            f"training.strategy: found fsdp, and {place} of a ddp run; allowed is ddp, or another storage.run"
        )
    else:
        load_weights(checkpoint, run.learner)
        load_optimizer(checkpoint, run.optimizer, run.device)
