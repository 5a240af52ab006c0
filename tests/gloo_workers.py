"""Processes joined by torch.distributed over gloo, for tests of what workers compute together.

result = run_workers(4, function, *arguments)     # of function(rank, world_size, *arguments), what rank 0 returns
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Result = dict[str, torch.Tensor]
PRELOADED = [
    "pytest",
    "transformers",
    "matplotlib.pyplot",
    "tensorboardX",
    "pipeline.training.assembly",
    "pipeline.training.fsdp",
]
"""What takes seconds to import, once, in a process that workers are forked from, and that has started no thread."""


def run_workers(world_size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function` must be of a module, so that processes can import it. What it raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(PRELOADED)
        mp.start_processes(  # type: ignore[no-untyped-call]
            _worker, (world_size, function, arguments, folder), world_size, start_method="forkserver"
        )
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def _worker(rank: int, world_size: int, function: Callable[..., Result], arguments: Any, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    result = function(rank, world_size, *arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    # NOTE: not by way of destructors. Gloo's thread may wait for the interpreter to let go of a tensor while the
    # group's destructor, which holds the interpreter, waits for that thread (seen with torch 2.13).
    os._exit(0)
