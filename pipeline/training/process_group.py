"""The process group of the workers. Ray's controller imports this file too, so it imports no training code.

The process group listens only on the address that Ray uses for the node, which is 127.0.0.1 in a session of one
machine. torch's rendezvous store would listen on all interfaces without authentication, whatever address you give it;
so we pass it a socket that is already bound.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
import torch.distributed as dist
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]

LEAVE_S = 30.0  # wait for a worker to leave the process group, as Ray's own backend does


@dataclass
class ProcessGroupConfig(TorchConfig):
    """A `TorchConfig` (gloo on CPUs, nccl on GPUs) whose rendezvous listens only on the node's own address."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _OwnAddressBackend


class _OwnAddressBackend(Backend):
    share_cuda_visible_devices = True  # nccl needs to see the GPUs of the node's other workers

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        timeout = timedelta(seconds=backend_config.timeout_s)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        address, port = worker_group.execute_single(0, _serve, timeout)
        size = len(worker_group)
        ray.get(
            [worker_group.execute_single_async(i, _join, backend, i, size, address, port, timeout) for i in range(size)]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_S)


_store: list[TCPStore] = []
"""The store that this process serves, kept alive as long as the process group."""


def _serve(timeout: timedelta) -> tuple[str, int]:
    """Open the store on this node. Returns its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listening:
        port = listening.getsockname()[1]
        _store[:] = [
            TCPStore(address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach())
        ]
    return address, port


def _join(backend: str, rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> None:
    os.environ["LOCAL_RANK"] = str(ray.train.get_context().get_local_rank())  # read by device meshes
    own = ray.util.get_node_ip_address()
    if (name := interface_of(own)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if ipaddress.ip_address(own).is_loopback:  # elsewhere nccl may use several interfaces
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    store = _store[0] if rank == 0 else TCPStore(address, port, None, False, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IP address, None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
