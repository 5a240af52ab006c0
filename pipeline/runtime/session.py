"""A Ray session: the cluster that RAY_ADDRESS names, else one of this machine's own for as long as the job runs.

Ray's chatter, its workers' output included, goes to training.log. Tasks and workers tell the driver how far they are
through a `Board`, a small actor that the driver polls.

    with ray_session() as board:
        with board.stage("prepare: read", 12, "tasks", counter="read"):
            ray.get([read.remote(board.handle) for _ in range(12)])      # each calls board.add.remote("read", 1)
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.runtime.cluster import on_own_node
from pipeline.runtime.console import LogFile, Stage, log
from pipeline.runtime.job import JobError, signals

POLL_S = 0.5
POLL_TIMEOUT_S = 60  # a starved machine answers late
REACH_S, CONNECT_S = 10.0, 5.0
BLOCK_BYTES = 1 << 24  # of Ray Data's: about the rows of a write. A task holds several, and Ray's own are of 128 MB
RETRY_ADVICE = "\nFailed to "  # what Ray Data adds to the words of an error follows

# Read by Ray when it is imported. Tokens are asked for knowingly: RAY_AUTH_MODE, where it is set, is kept.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the config are looked up from where the job runs
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints to stdout
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the job's
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # for the workers of a trial that is ended to write their checkpoint
    "TOKENIZERS_PARALLELISM": "true",
}
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on 127.0.0.1 alone
    "RAY_enable_metrics_collection": "0",  # Ray's exporter of metrics has crashed a driver (2.60)
}
"""For a session that is started here, as well."""


SAID_EACH_SECOND = "Failed to query Ray Train Controller actor state"
"""By an actor of Ray Train's that asks the dashboard, which a local session goes without (Ray 2.60)."""


class _BoardActor:
    """Counters and messages from anywhere in the cluster, kept until the driver asks."""

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
        """The counters, and the messages after the first `seen`; those are forgotten."""
        self.messages = self.messages[seen - self.forgotten :]
        self.forgotten = seen
        return dict(self.counts), self.messages


class Board:
    """The driver's side: draws a stage's bar from what tasks and workers report."""

    def __init__(self) -> None:
        import ray

        self.handle = on_own_node(ray.remote(num_cpus=0, max_concurrency=1)(_BoardActor)).remote()
        self.seen = 0

    def ask_to_stop(self) -> None:
        """Let whoever asks the board know that the job is to end soon."""
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
        describe: Callable[[dict[str, int]], str] | None = None,
    ) -> Iterator[Stage]:
        """A stage whose bar follows `counter` from `start` on; all counters begin anew.

        Messages are passed to `receive`; their `log` is logged. Beside the bar's rate stands a message's `shown`, or
        what `describe` makes of the counters.
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
                        log.info("%s", message["log"])
                shown = [message["shown"] for message in messages if "shown" in message]
                if describe:
                    shown.append(describe(counts))
                stage.advance(counts.get(counter, 0) - stage.done, shown[-1] if shown else "")

            def try_to_poll() -> None:
                try:
                    poll()
                except ray.exceptions.GetTimeoutError:
                    log.debug("%s: the board did not answer in %s s", name, POLL_TIMEOUT_S)

            def follow() -> None:
                while not done.wait(POLL_S):
                    try:
                        try_to_poll()
                    except ray.exceptions.RayError:  # the session is going down: its end is reported elsewhere
                        return

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield stage
            finally:
                done.set()
                thread.join(timeout=5)  # not into a session that is going down
            try_to_poll()


def set_environment() -> None:
    """Settings for Ray and torch that are not set yet. Must come before the first import of either."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # torch makes this folder whether it compiles or not, by default among the temporary ones
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    if not os.environ.get("RAY_ADDRESS"):
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def keep_token_private() -> None:
    """Make the token of this user's sessions where there is none, as Ray would, but for nobody else to read."""
    given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if given or os.environ.get("RAY_AUTH_MODE") != "token":
        return
    path = Path.home() / ".ray" / "auth_token"  # where Ray looks
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        path.chmod(0o600)


@contextmanager
def ray_session() -> Iterator[Board]:
    """Connect to Ray, or start it here, with its output in training.log; leave nothing running at the end."""
    set_environment()
    import ray

    address = os.environ.get("RAY_ADDRESS")
    file = next((handler for handler in log.handlers if isinstance(handler, LogFile)), None)
    if ray.is_initialized():  # the tests share one session
        with _ray_logs_to(file), _errors_as_raised():
            _set_up_ray_data()
            yield Board()
        return
    log.info("ray: %s", f"connects to {address}" if address else "starts on this machine")
    if not address:
        keep_token_private()
    local = {} if address else {"address": "local", "include_dashboard": False, "num_cpus": max(2, os.cpu_count() or 2)}
    with _ray_logs_to(file), _native_stderr_to(file), _errors_as_raised():
        try:
            _init(address, **local, logging_level=logging.INFO)
            signals.install()  # Ray has put its own SIGTERM handler there
            _set_up_ray_data()
            yield Board()
        finally:
            ray.shutdown()


def _init(cluster: str | None, **options: Any) -> None:
    """`ray.init`; raises JobError where a `cluster` is named that is not there, or does not take this token."""
    import ray

    if cluster:
        _reach(cluster)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        if not cluster:
            raise
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(
            f"RAY_ADDRESS: there is no way into the cluster at {cluster} ({words}); the token it asks for is read from "
            "RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error


def _reach(address: str) -> None:
    """Raise JobError where nobody listens at host:port for REACH_S: Ray itself would try for more than a minute."""
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            place = urlsplit(f"//{address.removeprefix('ray://')}")
            if place.hostname and place.port:
                socket.create_connection((place.hostname, place.port), timeout=CONNECT_S).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() >= deadline:
                raise JobError(
                    f"RAY_ADDRESS: nobody answers at {address} ({error}); give the address that `ray start` printed, "
                    "or none, and Ray is started on this machine"
                ) from error
        time.sleep(POLL_S)


@contextmanager
def _native_stderr_to(file: LogFile | None) -> Iterator[None]:
    """Ray's C++ core writes to file descriptor 2, past all logging: point it at the log, Python's stderr elsewhere."""
    if file is None:
        yield
        return
    console, console_fd = sys.stderr, os.dup(2)
    with open(file.baseFilename, "ab") as log_file, os.fdopen(console_fd, "w", buffering=1) as python_stderr:
        os.dup2(log_file.fileno(), 2)
        sys.stderr = python_stderr
        try:
            yield
        finally:
            sys.stderr = console
            os.dup2(console_fd, 2)


@contextmanager
def _ray_logs_to(file: LogFile | None) -> Iterator[None]:
    """Ray's driver log and its workers' output into the log file. Both are hooks that Ray offers no setting for."""
    import ray._private.worker as worker

    loggers = [logging.getLogger(name) for name in ("ray", "pipeline.ray")]
    handlers: list[logging.Handler] = [file] if file else [logging.NullHandler()]
    for logger in loggers:
        logger.handlers[:], logger.propagate = handlers, False
    if not hasattr(worker, "_pipeline_original_print"):
        worker._pipeline_original_print = worker.print_worker_logs  # type: ignore[attr-defined]

        def to_log(data: Any, print_file: Any, *args: Any, **kwargs: Any) -> None:
            worker._pipeline_original_print(data, _LogWriter(), *args, **kwargs)  # type: ignore[attr-defined]

        worker.print_worker_logs = to_log
    try:
        yield
    finally:  # the file is closed soon
        for logger in loggers:
            logger.handlers[:] = [logging.NullHandler()]


class _LogWriter:
    """A file-like object that writes lines to the log file."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip() and SAID_EACH_SECOND not in line:
                logging.getLogger("pipeline.ray").info("%s", line)
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def _errors_as_raised() -> Iterator[None]:
    """What a task raised, in the words that it had there: Ray's own error has the traceback for a message."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        words = (arg.partition(RETRY_ADVICE)[0] if isinstance(arg, str) else arg for arg in error.cause.args)
        error.cause.args = tuple(words)
        raise error.cause from error


def _set_up_ray_data() -> None:
    """Importing Ray Data gives its logger a console handler and its datasets progress bars."""
    import ray.data

    logger = logging.getLogger("ray.data")
    logger.handlers[:] = [h for h in logger.handlers if type(h).__name__ != "PlainRayHandler"]
    logger.propagate = True  # to the rest of Ray's log
    logger.setLevel(logging.INFO)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = BLOCK_BYTES
