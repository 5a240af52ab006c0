"""A training worker of Ray Train: what Ray does for a run.

Ray places the workers and restarts them. Batches come through Ray Data, checkpoints go through Ray's reports, metrics
and alerts go to the driver. The run learns when the driver wants to stop, and when Ray is about to lose a node.

The workers' process group can be reached only at the address by which Ray knows their node, which is 127.0.0.1 in a
session of one machine. By default, torch's store for the rendezvous listens on all interfaces, without authentication,
whatever address it is given; here it gets a socket that is already bound.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig, get_device
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.config import ConfigError
from pipeline.core.arrow import arrow_location
from pipeline.core.cluster import place_data
from pipeline.core.console import log, log_timeline
from pipeline.data.feed import RayFeed
from pipeline.training.assembly import Task, run_task
from pipeline.training.checkpoints import ResumePoint, TrainState
from pipeline.training.history import Metrics
from pipeline.training.loop import ControlFlags, Hooks, TrainingStopped
from pipeline.training.saving import Saver

LEAVE_S = 30.0  # for a worker to leave the process group, as Ray's own backend waits
POLL_S = 1.0


@dataclass(frozen=True)
class Sent:
    """What a worker is sent."""

    task: Task
    threads: int
    """torch threads of each worker."""
    progress: Any
    """The driver's progress."""
    point: ResumePoint
    """The newest checkpoint, which the driver has read."""
    start_s: float
    """When the job started, in seconds since the epoch."""


def train_worker(message: dict[str, Any]) -> None:
    """Train to the end, or until asked to stop. An error that a restart would not fix is sent to the driver."""
    sent: Sent = message["sent"]
    config, context = sent.task.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(sent.threads)

    def send(message: dict[str, Any]) -> None:
        if rank == 0:
            sent.progress.post.remote(message)

    def alert(title: str, text: str, step: int) -> None:
        send({"alert": {"title": title, "text": text, "step": step}})

    _send_log(send, config.logging.level)
    log_timeline("the workers are placed and have imported torch", sent.start_s)
    place_data(config.scaling.labels.data)
    feed = RayFeed(sent.task.plan, rank, world_size)
    try:
        saver = RaySaver(config, sent.task.tokenizer_json, sent.task.holder)
        hooks = Hooks(saver.save, partial(_report, sent.progress), alert, _control_flags(sent, rank))
        run_task(sent.task, feed.batches, hooks, get_device(), sent.point)
        ray.train.report({})  # waits until all checkpoints are in their places
    except (TrainingStopped, ConfigError) as error:  # on all workers alike
        send({"fatal": str(error), "config": isinstance(error, ConfigError)})


class RaySaver(Saver):
    """Reports checkpoints to Ray, on every rank, which is a barrier. Ray calls `_upload` in a thread of its own."""

    def place(self, folder: Path, state: TrainState, is_best: bool) -> None:
        ray.train.report(
            state.metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if self.writes else None,
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=partial(self._upload, is_best) if self.writes else None,
        )

    def _upload(self, is_best: bool, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        attempt, run_dir = ray.train.get_context().get_experiment_name(), self.config.run_dir
        self.placer.place(Path(checkpoint.path), run_dir / attempt / name, is_best)
        location, filesystem = arrow_location(run_dir)
        return ray.train.Checkpoint(f"{location}/{attempt}/{name}", filesystem)


def _send_log(send: Callable[[dict[str, Any]], None], level: str) -> None:
    """Send this process's log lines to the driver."""

    class ToDriver(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send({"log": record.getMessage(), "level": record.levelno})

    log.handlers[:] = [ToDriver()]
    log.setLevel(level)
    log.propagate = False


def _report(progress: Any, metrics: Metrics) -> None:
    """Send rank 0's metrics to the driver, which draws the bar and keeps the trackers."""
    message: dict[str, Any] = {"metrics": metrics}
    if "loss" in metrics:
        progress.put.remote("steps", int(metrics["step"]))
        message["shown"] = f"loss {metrics['loss']:.3f}, {metrics['pairs_per_s']:,.0f} pairs/s"
    else:
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "step")
        message["log"] = f"train: step {metrics['step']:,.0f}: {values}"
    progress.post.remote(message)


def _control_flags(sent: Sent, rank: int) -> Callable[[int], ControlFlags]:
    """Rank 0 asks the driver's progress once a second. All workers ask Ray, every few steps, at the same steps."""
    progress, config, start_s = sent.progress, sent.task.config, sent.start_s
    stop, saved_for = threading.Event(), set[str]()
    events = iter(("the first batch is there", "the first step is done"))

    def follow() -> None:
        with suppress(ray.exceptions.RayError):  # the session is going down
            while not stop.wait(POLL_S):
                if ray.get(progress.is_stop_wanted.remote()):
                    stop.set()

    if rank == 0:
        threading.Thread(target=follow, name="control flags", daemon=True).start()

    def control_flags(step: int) -> ControlFlags:
        if event := next(events, None):
            log_timeline(event, start_s)
        leaving: set[str] = set()
        if step % config.training.log_every_steps == 0:
            notice = ray.train.get_preemption_info()
            leaving = set(notice.preempted_node_ids) - saved_for if notice else set()
            saved_for.update(leaving)
        return ControlFlags(stop.is_set(), bool(leaving))

    return control_flags


@dataclass
class ProcessGroupConfig(TorchConfig):
    """A `TorchConfig` for gloo on CPUs and nccl on GPUs, whose rendezvous listens at the node's own address alone."""

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
    os.environ["LOCAL_RANK"] = str(ray.train.get_context().get_local_rank())  # which device meshes look for
    if ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    store = _held[0] if rank == 0 else TCPStore(address, port, None, False, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
