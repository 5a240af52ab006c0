"""A Ray session: connects to the cluster at RAY_ADDRESS, or starts Ray on this machine for the job.

The output of Ray and its workers goes to training.log. Tasks and workers report to the actor of a `Progress`, which the
driver polls.

    with ray_session() as progress:
        with progress.stage("prepare: read", 12, "tasks", counter="read"):
            ray.get([read.remote(progress.handle) for _ in range(12)])      # each calls progress.add.remote("read", 1)
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.cluster import on_driver_node
from pipeline.core.console import Stage, log, log_timeline, other_output_to_log
from pipeline.core.outcome import JobError
from pipeline.core.signals import signals

POLL_S = 0.5
POLL_TIMEOUT_S = 60  # an overloaded machine may respond late
REACH_S, CONNECT_S = 10.0, 5.0
SOCKET_PATH_BYTES = 107  # Linux: sun_path of a Unix socket, without its last NUL
BLOCK_BYTES = 1 << 24  # of Ray Data, about one write. A task holds several blocks, and Ray's default is 128 MB
RETRY_ADVICE = "\nFailed to "  # start of the text that Ray Data appends to error messages

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_COLOR_PREFIX": "0",
    # Ray Train (2.60) logs this every second, because a local session has no dashboard
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train Controller actor state",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the config's paths are relative to the job's working directory
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # it prints to stdout
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # run_job handles signals
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # time for the workers of a stopped trial to write a checkpoint
    "TOKENIZERS_PARALLELISM": "true",
}
"""Ray reads most of these on import. Variables that are already set are kept."""
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on 127.0.0.1 only
    "RAY_agent_register_timeout_ms": "300000",  # not 30 s, after which Ray gives up on a busy machine
    "RAY_enable_metrics_collection": "0",  # Ray's metrics exporter (2.60) has crashed a driver
}
"""Also set if the session is started here."""


class _ProgressActor:
    """Collects counters and messages from the cluster until the driver reads them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.messages: list[dict[str, Any]] = []
        self.forgotten = 0
        self.stop_wanted = False

    def add(self, counter: str, amount: int) -> None:
        self.counts[counter] += amount

    def add_all(self, amounts: dict[str, int]) -> None:
        self.counts.update(amounts)

    def clear(self) -> None:
        self.counts.clear()

    def put(self, counter: str, amount: int) -> None:
        self.counts[counter] = amount

    def post(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def ask_to_stop(self) -> None:
        self.stop_wanted = True

    def is_stop_wanted(self) -> bool:
        return self.stop_wanted

    def read(self, seen: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """The counters, and all messages after the first `seen`; drops those before."""
        self.messages = self.messages[seen - self.forgotten :]
        self.forgotten = seen
        return dict(self.counts), self.messages


class Progress:
    """The driver's side: shows the progress that tasks and workers report to the actor `handle`."""

    def __init__(self) -> None:
        import ray

        self.handle = on_driver_node(ray.remote(num_cpus=0, max_concurrency=1)(_ProgressActor)).remote()
        self.seen = 0

    def ask_to_stop(self) -> None:
        """Ask the workers to stop; they poll `is_stop_wanted`."""
        self.handle.ask_to_stop.remote()

    @contextmanager
    def stage(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        counter: str,
        start: int = 0,
        receive: Callable[[dict[str, Any]], None] | None = None,
        describe: Callable[[dict[str, int]], str | None] = lambda counts: None,
    ) -> Iterator[Stage]:
        """A stage whose bar follows `counter` from `start` on. Resets all other counters.

        Messages are passed to `receive`. A message's `log` is logged at its `level` (default: INFO), and its `shown`,
        or `describe(counters)`, is printed after the rate.
        """
        import ray

        done = threading.Event()
        ray.get([self.handle.clear.remote(), self.handle.put.remote(counter, start)])
        with Stage(name, total, unit, start) as stage:

            def poll() -> None:
                counts, messages = ray.get(self.handle.read.remote(self.seen), timeout=POLL_TIMEOUT_S)
                self.seen += len(messages)
                for message in messages:
                    if receive:
                        receive(message)
                    if "log" in message:
                        log.log(message.get("level", logging.INFO), "%s", message["log"])
                shown = [message["shown"] for message in messages if "shown" in message]
                if (described := describe(counts)) is not None:
                    shown.append(described)
                stage.advance(counts.get(counter, 0) - stage.done, shown[-1] if shown else None)

            def try_to_poll() -> None:
                try:
                    poll()
                except ray.exceptions.GetTimeoutError:
                    log.debug("%s: the progress actor did not respond in %s s", name, POLL_TIMEOUT_S)

            def follow() -> None:
                while not done.wait(POLL_S):
                    try:
                        try_to_poll()
                    except ray.exceptions.RayError:  # the session is ending; run_job reports why
                        return

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield stage
            finally:
                done.set()
                thread.join(timeout=5)  # not longer: the session may be ending
            try_to_poll()


def set_environment() -> None:
    """Set environment variables for Ray and torch, unless they are set. Call it before importing either."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # torch creates this folder even if it compiles nothing; the default is under /tmp
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    if not os.environ.get("RAY_ADDRESS"):
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def keep_token_private() -> None:
    """Create Ray's auth token if there is none, as Ray would, but readable only by this user."""
    is_given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if is_given or os.environ.get("RAY_AUTH_MODE") != "token":
        return
    path = Path.home() / ".ray" / "auth_token"  # where Ray looks
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        path.chmod(0o600)


@contextmanager
def ray_session() -> Iterator[Progress]:
    """Connect to Ray or start it here, with its output in training.log; shut it down at the end.

    A session that is already running in this process is reused and left running.
    """
    set_environment()
    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(_own_session(os.environ.get("RAY_ADDRESS")))
        stack.enter_context(_errors_as_raised())
        configure_ray_data()
        yield Progress()


@contextmanager
def _own_session(address: str | None) -> Iterator[None]:
    import ray

    log.info("ray: %s", f"connecting to {address}" if address else "starting on this machine")
    local: dict[str, Any] = {}
    if not address:
        keep_token_private()
        local = {"address": "local", "include_dashboard": False, "num_cpus": max(2, os.cpu_count() or 2)}
    with other_output_to_log():
        try:
            _init(address, **local)
            signals.install()  # ray.init has replaced the SIGTERM handler
            log_timeline("Ray is connected")
            yield
        finally:
            ray.shutdown()


def _init(cluster: str | None, **options: Any) -> None:
    """Call `ray.init`. Raises JobError if the `cluster` cannot be reached or rejects the token.

    Also raises JobError if the path of the temporary folder is too long for Ray's sockets.
    """
    import ray

    if cluster:
        _reach(cluster)
    try:
        started = ray.init(**options)
        if not cluster:  # Ray's logs and sockets there are readable by all users
            os.chmod(started.address_info["session_dir"], 0o700)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        if not cluster:
            raise
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(
            f"RAY_ADDRESS: cannot connect to the cluster at {cluster} ({words}); the token is read from "
            "RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        length = len(os.fsencode(os.environ.get(name, "")))
        raise JobError(
            f"{name}: found a path of {length} bytes, too long for the sockets that Ray creates below it, whose paths "
            f"have at most {SOCKET_PATH_BYTES} bytes; set RAY_TMPDIR=/tmp, or {name} to another short path"
        ) from error
    except Exception as error:  # Ray (2.60) raises Exception itself if its processes are not up in time
        if "timed out during startup" not in str(error):
            raise
        raise JobError(
            "Ray did not start in time, which happens on a machine that is busy or short of memory; run the same "
            "command again"
        ) from error


def _reach(address: str) -> None:
    """Raise JobError if nothing listens at host:port within REACH_S; Ray would try for more than a minute."""
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            url = urlsplit(f"//{address.removeprefix('ray://')}")
            if url.hostname and url.port:
                socket.create_connection((url.hostname, url.port), timeout=CONNECT_S).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() >= deadline:
                raise JobError(
                    f"RAY_ADDRESS: nothing answers at {address} ({error}); set the address that `ray start` printed, "
                    "or unset it to start Ray on this machine"
                ) from error
        time.sleep(POLL_S)


@contextmanager
def _errors_as_raised() -> Iterator[None]:
    """Raise a task's own exception instead of RayTaskError, whose message is a traceback."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        words = (arg.partition(RETRY_ADVICE)[0] if isinstance(arg, str) else arg for arg in error.cause.args)
        error.cause.args = tuple(words)
        raise error.cause from error


def configure_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = BLOCK_BYTES
