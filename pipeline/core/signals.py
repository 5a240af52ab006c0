"""Handle SIGINT and SIGTERM: stop cleanly, without a second signal interrupting the clean-up.

with signals.deferred(ask, grace_s=60, why="for the last checkpoint"):      # the first signal calls `ask`
    train()
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.core.console import log


class _Signals:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, the only exception Ray passes on; `number` is the signal's."""

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)

    def install(self) -> None:
        self._handle_both(self._raise)

    def ignore(self) -> None:
        self._handle_both(signal.SIG_IGN)

    @contextmanager
    def deferred(self, ask: Callable[[], None], grace_s: float, why: str) -> Iterator[None]:
        """Within the block, the first signal calls `ask`; KeyboardInterrupt follows at the end of the block or after
        `grace_s` seconds. A second signal raises it at once. `why` is logged: what the job waits for.
        """
        asked, done = threading.Event(), threading.Event()

        def handle(number: int, frame: FrameType | None) -> None:
            if asked.is_set():
                self._raise(number, frame)
            self.number = number
            asked.set()

        def wait() -> None:
            asked.wait()
            if done.is_set():
                return
            log.info("stopping: waiting up to %g s %s; send a second signal to stop at once", grace_s, why)
            ask()
            if not done.wait(grace_s):
                os.kill(os.getpid(), self.number)

        self._handle_both(handle)
        threading.Thread(target=wait, name="signals", daemon=True).start()
        try:
            yield
            if asked.is_set():
                self.ignore()
                raise KeyboardInterrupt
        finally:
            done.set()
            if not asked.is_set():
                self.install()
            asked.set()

    def _handle_both(self, handler: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.ignore()  # a second signal must not interrupt the clean-up
        sys.unraisablehook = _log_unraisable  # destructors of half-built objects may fail now
        raise KeyboardInterrupt


def _log_unraisable(ignored: sys.UnraisableHookArgs) -> None:
    log.debug("stopping: ignored %s in %s", repr(ignored.exc_value), ignored.object)


signals = _Signals()
