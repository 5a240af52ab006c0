"""Save and load: what a checkpoint holds, and when the loop writes one.

    saver = LocalSaver(config, tokenizer_json, holder, trackers)      # or worker.RaySaver
    saver.save(run, state, is_best=True)                              # on every worker
    load_checkpoint(folder, run)

Under ddp, rank 0 writes the model, the weights that are trained next to it, and the optimizer. Under fsdp every worker
writes its part of each, and the model is put together later by `consolidate`:

    <folder>/weights/shard-00001-model-00001-of-00001.safetensors …      one per worker
    <folder>/optimizer/shard-00001-model-00001-of-00001.safetensors …

torch.distributed.checkpoint writes and reads those, and finds in their headers which worker needs which rows of which
file. We use its Hugging Face format, because its usual one has a pickle as its index. It holds named tensors and
nothing else, which is enough for an optimizer: its groups follow from the config, and their rates from the step. Cost:
one more copy of a worker's part in memory while it is written.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import Config, ConfigError
from pipeline.core.files import fetched, replacing, staging
from pipeline.core.path import StoragePath
from pipeline.model.folder import save_card, save_model
from pipeline.model.learner import Learner
from pipeline.training.checkpoints import (
    WEIGHTS,
    Placer,
    TrainState,
    is_sharded,
    next_attempt,
    prune,
    seal,
    step_folder,
)
from pipeline.training.collectives import all_reduce_sum, broadcast, rank, world_size
from pipeline.training.loop import Run, TrainingStopped
from pipeline.training.trackers import Trackers

if TYPE_CHECKING:  # torch's sharded checkpoints take a second to import: only where one is written or read
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

HEADS = "heads.safetensors"  # what is trained next to the model: a decoder, a prediction head, a learned temperature
OPTIMIZER = "optimizer"
BACKBONE = "model.backbone."  # a learner's prefix of the names in model.safetensors


class Saver:
    """Writes checkpoints into a folder of this worker's; a subclass then puts them in their place."""

    def __init__(self, config: Config, tokenizer_json: str, holder: str = "") -> None:
        self.config, self.tokenizer_json = config, tokenizer_json
        writers = world_size() if config.training.strategy == "fsdp" else 1
        start, wait_s = broadcast(uuid.uuid4().hex[:8]), config.scaling.collective_timeout_s
        self.placer = Placer(config.run_dir, rank(), writers, start, wait_s, holder)
        self.writes = rank() < writers
        self.incoming = staging(config.run_dir) / str(rank())

    def save(self, run: Run, state: TrainState, is_best: bool) -> None:
        """Write a checkpoint, on every worker. Raises TrainingStopped on all of them if one cannot write."""
        folder = self.incoming / step_folder(state.step)
        with self._all_or_none(folder, run, state):
            if self.writes:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        # Only now: under fsdp, writing is collective, and would wait for a worker that has no folder.
        with self._all_or_none(folder, run, state):
            if self.writes:
                save_checkpoint(folder, run, state, self.tokenizer_json)
        self.place(folder, state, is_best)

    def place(self, folder: Path, state: TrainState, is_best: bool) -> None:
        """Put a finished folder in its place, on every worker; there is none unless this worker `writes`."""
        raise NotImplementedError

    @contextmanager
    def _all_or_none(self, folder: Path, run: Run, state: TrainState) -> Iterator[None]:
        """Wait for all workers; if one of them met an OSError, raise TrainingStopped on each."""
        problem: OSError | None = None
        try:
            yield
        except OSError as error:
            problem = error
            shutil.rmtree(folder, ignore_errors=True)
        if all_reduce_sum(torch.tensor(float(problem is not None), device=run.device)):
            reason = (problem.strerror or problem) if problem else "another worker says why"
            raise TrainingStopped(
                f"step {state.step}: the checkpoint could not be written to {folder.parent} ({reason}); make room "
                f"there and run the same command again, it resumes from the last good checkpoint, of step "
                f"{run.saved_step or 'none'}"
            ) from problem


class LocalSaver(Saver):
    """Without Ray. Sends the metrics up to the checkpoint first, and deletes old checkpoints after it."""

    def __init__(self, config: Config, tokenizer_json: str, holder: str, trackers: Trackers) -> None:
        super().__init__(config, tokenizer_json, holder)
        self.trackers, self.attempt = trackers, broadcast(next_attempt(config.run_dir))

    def place(self, folder: Path, state: TrainState, is_best: bool) -> None:
        self.trackers.send()
        if self.writes:
            self.placer.place(folder, self.config.run_dir / self.attempt / folder.name, is_best)
        if rank() == 0:
            prune(self.config.run_dir, self.config.checkpointing.max_checkpoints)


def save_checkpoint(folder: Path, run: Run, state: TrainState, tokenizer_json: str) -> None:
    """Write a checkpoint into an empty folder; under fsdp this worker's part of one, on every worker."""
    learner, max_length = run.learner, run.config.tokenizer.max_length
    if run.strategy.is_sharded:
        save_sharded(folder, learner, run.optimizer)
        if rank() == 0:
            save_card(folder, learner.model, tokenizer_json, max_length)
    else:
        save_model(folder, learner.model, tokenizer_json, max_length)
        heads = {name: tensor.contiguous() for name, tensor in learner.state_dict().items() if not _is_model(name)}
        if heads:
            save_file(heads, folder / HEADS)
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    seal(folder, state)


def load_checkpoint(place: StoragePath, run: Run) -> None:
    """Load the weights and the optimizer of a whole checkpoint. Raises ConfigError for one of ddp under fsdp."""
    folder = fetched(place)
    if is_sharded(folder):
        load_sharded(folder, run.learner, run.optimizer)
    elif run.strategy.is_sharded:
        raise ConfigError(
            f"training.strategy: found fsdp, and {place} of a ddp run; allowed is ddp, or another storage.run"
        )
    else:
        load_weights(folder, run.learner)
        load_optimizer(folder, run.optimizer, run.device)


def load_weights(folder: Path, learner: Learner) -> None:
    """Load the model and the heads."""
    learner.model.backbone.load_state_dict(load_file(folder / "model.safetensors"))
    heads = load_file(folder / HEADS) if (folder / HEADS).is_file() else {}
    missing, unexpected = learner.load_state_dict(heads, strict=False)
    assert not unexpected
    assert all(_is_model(name) for name in missing)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))


def _is_model(name: str) -> bool:
    return name.startswith("model.")


def save_sharded(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Write all workers' parts. Raises OSError on every worker where one cannot write."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(learner, FSDPModule):
        learner.reshard()  # which it is not after a forward pass without a backward pass
    _save(folder / WEIGHTS, learner.state_dict())
    _save(folder / OPTIMIZER, _optimizer_state(learner, optimizer))


def load_sharded(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Load the parts of any number of workers, with or without fsdp. Raises OSError where files are missing."""
    _load(folder / WEIGHTS, learner.state_dict())
    parameters = dict(learner.named_parameters())
    optimizer.state.clear()
    for name, found in _headers(folder / OPTIMIZER).items():
        owner, _, key = name.rpartition(".")
        parameter, dtype = parameters[owner], found.properties.dtype
        optimizer.state[parameter][key] = (
            torch.zeros_like(parameter, dtype=dtype)  # sharded as the parameter is
            if found.size == parameter.shape
            else torch.zeros(found.size, dtype=dtype, device=parameter.device)  # as the step count, on every worker
        )
    _load(folder / OPTIMIZER, _optimizer_state(learner, optimizer))


def consolidate(checkpoint: StoragePath) -> None:
    """Write `model.safetensors` and the heads of a checkpoint of which workers wrote parts, unless they are there.

    It needs memory for all weights. In a bucket, it puts together a fetched copy and uploads the two files.
    """
    if not is_sharded(checkpoint) or (checkpoint / "model.safetensors").is_file():
        return
    folder = fetched(checkpoint)
    headers = _headers(folder / WEIGHTS)
    weights = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in headers.items()}
    _load(folder / WEIGHTS, weights, alone=True)
    heads = {name: tensor for name, tensor in weights.items() if not name.startswith(BACKBONE)}
    model = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items() if name.startswith(BACKBONE)}
    for file, tensors in ((HEADS, heads), ("model.safetensors", model)):  # the model last: it marks that both are there
        if tensors:
            with replacing(checkpoint / file) as temporary:
                save_file(tensors, temporary)


def _optimizer_state(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by its parameter's name and its own: `model.backbone.norm.weight.exp_avg`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in learner.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _failures_as_os_errors(folder):
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(state, storage_writer=writer, no_dist=not dist.is_initialized())


def _load(folder: Path, state: dict[str, Tensor], *, alone: bool = False) -> None:
    """Into the tensors of `state`, in place; all workers together, or one `alone`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _failures_as_os_errors(folder):
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone or not dist.is_initialized())


def _headers(folder: Path) -> dict[str, TensorStorageMetadata]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}


@contextmanager
def _failures_as_os_errors(folder: Path) -> Iterator[None]:
    """Raise what one worker met as an OSError on all of them: torch's own error is not an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        # that a single process may have forgotten to start torch.distributed
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            worker, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"{folder}: worker {worker} met {type(cause).__name__}: {cause}") from error
