"""Save and load checkpoints.

    saver = LocalSaver(config, tokenizer_json, holder, trackers)      # or worker.RaySaver
    saver.save(run, state, is_best=True)                              # on every worker
    load_checkpoint(folder, run)

Under ddp, rank 0 writes the model, the heads (weights trained in addition to the model) and the optimizer. Under fsdp,
every worker writes its shard of each; `consolidate` later merges the shards into one model:

    <folder>/weights/shard-00001-model-00001-of-00001.safetensors …      one per worker
    <folder>/optimizer/shard-00001-model-00001-of-00001.safetensors …

torch.distributed.checkpoint reads and writes the shards. We use its Hugging Face format, because the index of its
default format is a pickle. The format holds only named tensors, which is enough for an optimizer: its groups follow
from the config, and their rates from the step. Cost: one more copy of a worker's shard in memory while it is written.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import Config, ConfigError
from pipeline.core.files import local_copy, replacing, staging
from pipeline.core.path import StoragePath
from pipeline.model.folder import save_model, save_model_spec
from pipeline.model.learner import Learner
from pipeline.model.lora import is_adapted, is_adapter, merged
from pipeline.training.checkpoints import (
    WEIGHTS,
    Committer,
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

if TYPE_CHECKING:  # takes a second to import, so imported only when a sharded checkpoint is written or read
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

OnSaved = Callable[[StoragePath, TrainState], None]
"""Called on rank 0 with each new checkpoint and its state."""
HEADS = "heads.safetensors"  # a decoder, a prediction head, a learned temperature, adapters of LoRA
OPTIMIZER = "optimizer"
MODEL = "model."  # prefix of a learner's parameters that go to model.safetensors


class Saver(ABC):
    """Writes checkpoints into a staging folder; subclasses move them into the run's folder."""

    def __init__(self, config: Config, tokenizer_json: str, holder: str = "") -> None:
        self.config, self.tokenizer_json = config, tokenizer_json
        writers = world_size() if config.training.strategy == "fsdp" else 1
        start, wait_s = broadcast(uuid.uuid4().hex[:8]), config.scaling.collective_timeout_s
        self.committer = Committer(config.run_dir, rank(), writers, start, wait_s, holder)
        self.writes = rank() < writers
        self.incoming = staging(config.run_dir) / str(rank())

    def save(self, run: Run, state: TrainState, is_best: bool) -> None:
        """Write a checkpoint. Call it on every worker; if one cannot write, all raise TrainingStopped."""
        folder = self.incoming / step_folder(state.step)
        with self._all_or_none(folder, run, state):
            if self.writes:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        # A second block, because writing is collective under fsdp and would wait for a worker that has no folder.
        with self._all_or_none(folder, run, state):
            if self.writes:
                save_checkpoint(folder, run, state, self.tokenizer_json)
        self.commit(folder, state, is_best)

    @abstractmethod
    def commit(self, folder: Path, state: TrainState, is_best: bool) -> None:
        """Move a finished folder into the run's folder. Called on every worker; only those with `writes` have one."""

    @contextmanager
    def _all_or_none(self, folder: Path, run: Run, state: TrainState) -> Iterator[None]:
        """Wait for all workers; if one had an OSError, raise TrainingStopped on all."""
        problem: OSError | None = None
        try:
            yield
        except OSError as error:
            problem = error
            shutil.rmtree(folder, ignore_errors=True)
        if all_reduce_sum(torch.tensor(float(problem is not None), device=run.device)):
            reason = (problem.strerror or problem) if problem else "see another worker's error"
            raise TrainingStopped(
                f"step {state.step}: cannot write the checkpoint to {folder.parent} ({reason}); make room there and "
                f"run the same command again to resume from the last good checkpoint, of step "
                f"{run.saved_step or 'none'}"
            ) from problem


class LocalSaver(Saver):
    """Saves without Ray. Uploads the metrics before each checkpoint, and deletes old checkpoints after it."""

    def __init__(
        self,
        config: Config,
        tokenizer_json: str,
        holder: str,
        trackers: Trackers,
        on_saved: OnSaved = lambda folder, state: None,
    ) -> None:
        super().__init__(config, tokenizer_json, holder)
        self.trackers, self.attempt, self.on_saved = trackers, broadcast(next_attempt(config.run_dir)), on_saved

    def commit(self, folder: Path, state: TrainState, is_best: bool) -> None:
        self.trackers.send()
        target = self.config.run_dir / self.attempt / folder.name
        if self.writes:
            self.committer.commit(folder, target, is_best)
        if rank() == 0:
            prune(self.config.run_dir, self.config.checkpointing.max_checkpoints)
            self.on_saved(target, state)


def save_checkpoint(folder: Path, run: Run, state: TrainState, tokenizer_json: str) -> None:
    """Write a checkpoint into an empty folder; under fsdp, call it on every worker to write its shard."""
    learner, max_length = run.learner, run.config.tokenizer.max_length
    if run.strategy.is_sharded:
        save_sharded(folder, learner, run.optimizer)
        if rank() == 0:
            save_model_spec(folder, learner.model, tokenizer_json, max_length)
    else:
        save_model(folder, learner.model, tokenizer_json, max_length)
        weights = learner.state_dict()
        heads = {name: weights[name].contiguous() for name in weights if not _is_model(name) or is_adapter(name)}
        if heads:
            save_file(heads, folder / HEADS)
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    seal(folder, state)


def load_checkpoint(checkpoint: StoragePath, run: Run) -> None:
    """Load the weights and the optimizer of a checkpoint. Raises ConfigError for a ddp checkpoint under fsdp."""
    folder = local_copy(checkpoint)
    if is_sharded(folder):
        load_sharded(folder, run.learner, run.optimizer)
    elif run.strategy.is_sharded:
        raise ConfigError(
            f"training.strategy: found fsdp, but {checkpoint} was written under ddp; use ddp, or another storage.run"
        )
    else:
        load_weights(folder, run.learner)
        load_optimizer(folder, run.optimizer, run.device)


def load_weights(folder: Path, learner: Learner) -> None:
    """Load the model and the heads. Raises ConfigError if the base that adapters were trained on has changed."""
    weights = load_file(folder / "model.safetensors")
    learner.model.load_weights(weights)
    heads = load_file(folder / HEADS) if (folder / HEADS).is_file() else {}
    missing, unexpected = learner.load_state_dict(heads, strict=False)
    assert not unexpected
    assert all(_is_model(name) for name in missing)
    if is_adapted(learner.model.backbone):
        found = learner.model.weights()
        for name, tensor in weights.items():
            if not torch.allclose(found[name].cpu(), tensor, rtol=1e-3, atol=1e-4):
                raise ConfigError(
                    f"model.pretrained: its {name} is not what the run began with; give the same model, or another "
                    "storage.run"
                )


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Load the moments. Rates, decay and betas follow from the config, which may have changed, as under fsdp."""
    saved = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})


def _is_model(name: str) -> bool:
    return name.startswith(MODEL)


def save_sharded(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Write this worker's shard; call it on all. If one cannot write, all raise OSError."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(learner, FSDPModule):
        learner.reshard()  # a forward pass without a backward pass leaves weights gathered
    _save(folder / WEIGHTS, learner.state_dict())
    _save(folder / OPTIMIZER, _optimizer_state(learner, optimizer))


def load_sharded(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Load the shards of any number of workers, with or without fsdp. Raises OSError if files are missing."""
    _load(folder / WEIGHTS, learner.state_dict())
    parameters = dict(learner.named_parameters())
    optimizer.state.clear()
    for name, header in _headers(folder / OPTIMIZER).items():
        owner, _, key = name.rpartition(".")
        parameter, dtype = parameters[owner], header.properties.dtype
        optimizer.state[parameter][key] = (
            torch.zeros_like(parameter, dtype=dtype)  # sharded like the parameter
            if header.size == parameter.shape
            else torch.zeros(header.size, dtype=dtype, device=parameter.device)  # the step count: on every worker
        )
    _load(folder / OPTIMIZER, _optimizer_state(learner, optimizer))


def consolidate(checkpoint: StoragePath) -> None:
    """Merge the shards of a checkpoint into `model.safetensors` and the heads, unless that was done already.

    It needs memory for all weights. In a bucket, it downloads the shards and uploads the two files.
    """
    if not is_sharded(checkpoint) or (checkpoint / "model.safetensors").is_file():
        return
    folder = local_copy(checkpoint)
    headers = _headers(folder / WEIGHTS)
    weights = {name: torch.empty(header.size, dtype=header.properties.dtype) for name, header in headers.items()}
    _load(folder / WEIGHTS, weights, single_process=True)
    heads = {name: tensor for name, tensor in weights.items() if not _is_model(name)}
    model = {name.removeprefix(MODEL).removeprefix("backbone."): weights[name] for name in weights if _is_model(name)}
    for file, tensors in ((HEADS, heads), ("model.safetensors", merged(model))):  # the model last: it marks completion
        if tensors:
            with replacing(checkpoint / file) as temporary:
                save_file(tensors, temporary)


def _optimizer_state(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter and key, such as `model.backbone.norm.weight.exp_avg`."""
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


def _load(folder: Path, state: dict[str, Tensor], *, single_process: bool = False) -> None:
    """Load into the tensors of `state`, in place. Collective, unless `single_process`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _failures_as_os_errors(folder):
        no_dist = single_process or not dist.is_initialized()
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)


def _headers(folder: Path) -> dict[str, TensorStorageMetadata]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    headers = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: header for name, header in headers.items() if isinstance(header, TensorStorageMetadata)}


@contextmanager
def _failures_as_os_errors(folder: Path) -> Iterator[None]:
    """If one worker fails, raise OSError on all: torch's own error is a BaseException."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended in a single process
        try:
            yield
        except CheckpointException as error:
            worker, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"{folder}: worker {worker} raised {type(cause).__name__}: {cause}") from error
