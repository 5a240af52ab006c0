"""How many requests all processes of a job may send, and how many at once.

    budget = Budget(Allowance(requests_per_second=50, max_concurrency=16))
    with budget:
        send()
    budget.hold(5)                      # the service has asked for five seconds of quiet

An `Allowance` keeps the account and never waits. A `Budget` waits for one, here or in another process: whatever has
`ask`, `give_back` and `hold` will do, such as a Ray actor made of `Allowance` behind three calls.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

POLL_S = 0.01  # the least time between two questions for a place among those under way


class Account(Protocol):
    def ask(self) -> float:
        """0 where a request may be sent now, which is then under way; else the seconds after which to ask again."""

    def give_back(self) -> None:
        """A request has ended, well or not."""

    def hold(self, seconds: float) -> None:
        """No request for so long."""


class Allowance:
    """Requests are let go one by one, 1 / requests_per_second apart, and no more than max_concurrency are under way.

    One that was not given back within `lease_s`, because its process is gone, counts no longer.
    """

    def __init__(
        self,
        requests_per_second: float,
        max_concurrency: int,
        lease_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gap_s, self.max_concurrency, self.lease_s = 1 / requests_per_second, max_concurrency, lease_s
        self._clock, self._lock = clock, threading.Lock()
        self._next, self._ends = 0.0, deque[float]()

    def ask(self) -> float:
        with self._lock:
            now = self._clock()
            while self._ends and self._ends[0] <= now:
                self._ends.popleft()
            if now < self._next:
                return self._next - now
            if len(self._ends) >= self.max_concurrency:
                return min(max(self.gap_s, POLL_S), self._ends[0] - now)
            self._next = now + self.gap_s
            self._ends.append(now + self.lease_s)
            return 0.0

    def give_back(self) -> None:
        with self._lock:
            if self._ends:
                self._ends.popleft()

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


class Budget:
    """Waits its turn at an account."""

    def __init__(self, account: Account, sleep: Callable[[float], Any] = time.sleep) -> None:
        self.account, self.sleep = account, sleep

    def acquire(self) -> None:
        while (wait := self.account.ask()) > 0:
            self.sleep(wait)

    def release(self) -> None:
        self.account.give_back()

    def hold(self, seconds: float) -> None:
        self.account.hold(seconds)

    def __enter__(self) -> Budget:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
