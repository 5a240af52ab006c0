"""A checkpoint that all workers write, each its part of the weights and of the optimizer's state.

    save_sharded(folder, learner, optimizer)     # on every worker, into one folder that all of them see
    load_sharded(folder, learner, optimizer)     # on every worker, of which there may be more or fewer
    consolidate(folder)                          # in one process: model.safetensors, partners.safetensors

    <folder>/weights/shard-00001-model-00001-of-00001.safetensors …      one of each worker
    <folder>/optimizer/shard-00001-model-00001-of-00001.safetensors …

torch.distributed.checkpoint writes and reads them, and finds in their headers which worker needs which rows of which
file. Its usual writer keeps an index beside them that is a pickle; that of Hugging Face's format does without. It holds
tensors under names and nothing else: of the optimizer that is all, as its groups follow from the config, and their
rates from the step. Cost: each worker's part once more in memory while it is written. Importing this module takes a
second, so import it only where a checkpoint is sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule

from pipeline.model.learner import Learner
from pipeline.storage.files import fetched, place, replacing
from pipeline.storage.path import StoragePath
from pipeline.training.checkpoints import PARTNERS, WEIGHTS, is_sharded

OPTIMIZER = "optimizer"
BACKBONE = "model.backbone."  # what a learner's names have and those of model.safetensors have not


def save_sharded(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Write all workers' parts. Raises OSError on every worker where one cannot write."""
    if isinstance(learner, FSDPModule):
        learner.reshard()  # which it is not after a forward pass without a backward pass
    _save(folder / WEIGHTS, learner.state_dict())
    _save(folder / OPTIMIZER, _state_of(learner, optimizer))


def load_sharded(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Take up weights and state, whoever wrote them, with fsdp or without. Raises OSError where files are missing."""
    _load(folder / WEIGHTS, learner.state_dict())
    parameters = dict(learner.named_parameters())
    optimizer.state.clear()
    for name, found in _headers(folder / OPTIMIZER).items():
        of, _, key = name.rpartition(".")
        optimizer.state[parameters[of]][key] = _room_for(found, parameters[of])
    _load(folder / OPTIMIZER, _state_of(learner, optimizer))


def consolidate(folder: Path) -> None:
    """Write the whole model, and what is trained beside it, where workers left only their parts of them.

    In one process, which holds all weights in memory. `model.safetensors` comes last: where it is, nothing is done.
    """
    if not is_sharded(folder) or (folder / "model.safetensors").is_file():
        return
    weights = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in _headers(folder / WEIGHTS).items()
    }
    _load(folder / WEIGHTS, weights, alone=True)
    partners = {name: tensor for name, tensor in weights.items() if not name.startswith(BACKBONE)}
    if partners:
        with replacing(folder / PARTNERS) as temporary:
            save_file(partners, temporary)
    model = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items() if name not in partners}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(model, temporary)


def consolidate_where_it_lies(folder: StoragePath) -> None:
    """`consolidate`; for a folder in a bucket with a copy that is fetched, whose whole model then goes there."""
    if not (folder / "model.safetensors").is_file():
        copy = fetched(folder)
        consolidate(copy)
        for name in (PARTNERS, "model.safetensors"):
            if (copy / name).is_file():
                place(copy / name, folder / name)


def _state_of(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by its parameter's name and its own: `model.backbone.norm.weight.exp_avg`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in learner.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _room_for(found: TensorStorageMetadata, parameter: nn.Parameter) -> Tensor:
    """A tensor cut as the parameter is, where it has its size; else one that every worker has, as the step count."""
    if found.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=found.properties.dtype)
    return torch.zeros(found.size, dtype=found.properties.dtype, device=parameter.device)


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _failures_as_os_errors(folder):
        save(state, storage_writer=writer, no_dist=not dist.is_initialized())


def _load(folder: Path, state: dict[str, Tensor], *, alone: bool = False) -> None:
    """Into the tensors of `state`, in place; all workers together, or one `alone`."""
    reader = HuggingFaceStorageReader(str(folder))
    with _failures_as_os_errors(folder):
        load(state, storage_reader=reader, no_dist=alone or not dist.is_initialized())


@contextmanager
def _failures_as_os_errors(folder: Path) -> Iterator[None]:
    """What one worker met, on all of them: torch's own error is no Exception, and would pass by all that tidies up."""
    with warnings.catch_warnings():
        # of a single process, as of something that may have been forgotten
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            worker, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"{folder}: worker {worker} met {type(cause).__name__}: {cause}") from error


def _headers(folder: Path) -> dict[str, TensorStorageMetadata]:
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}
