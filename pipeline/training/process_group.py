"""Torch's process group over the workers of a Ray trainer, reachable at the node's own address alone.

torch's store for the rendezvous listens on every interface of its node, whatever address it is given, and asks nobody
who they are. Here it gets a socket that is bound to the address by which Ray knows the node: 127.0.0.1 in a session of
one machine.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.backend import BackendConfig
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_held: list[TCPStore] = []
"""The store that this process serves, for as long as its group lives."""


def _serve(timeout: timedelta) -> tuple[str, int]:
    """Open the store on this node; returns its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listening:
        port = listening.getsockname()[1]
        _held[:] = [
            TCPStore(address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach())
        ]
    return address, port


def _join(backend: str, rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> None:
    _set_torch_distributed_env_vars()
    if ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    store = _held[0] if rank == 0 else TCPStore(address, port, None, False, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


class _OwnAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        timeout = timedelta(seconds=backend_config.timeout_s)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        address, port = worker_group.execute_single(0, _serve, timeout)
        size = len(worker_group)
        ray.get(
            [worker_group.execute_single_async(i, _join, backend, i, size, address, port, timeout) for i in range(size)]
        )


@dataclass
class ProcessGroupConfig(TorchConfig):
    """A `TorchConfig` for gloo on CPUs and nccl on GPUs, whose rendezvous is as private as the node's address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OwnAddressBackend
