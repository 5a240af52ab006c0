"""One process's connection to Pinecone: each request within a job's budget, sent again where that may help.

    client = PineconeClient(config.pinecone, config.secret_files, Budget(requests_per_second=50, max_concurrency=16))
    client.send("query", lambda index: index.query(vector=[…], top_k=10, namespace="a"))

The SDK repeats requests by itself, which the budget would not see, so that is switched off. Errors are of three kinds:
those that may pass (`PassingError`), those of one request (`RejectedError`), and those of all (`StoreError`). No
text of them holds the key, which is read where it is used and kept nowhere else.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import Any, TypeVar

from dotenv import dotenv_values
from pinecone import Pinecone as Client
from pinecone import RetryConfig
from pinecone._internal.constants import DATA_PLANE_API_VERSION
from pinecone._internal.http_client import HTTPClient
from pinecone.errors.exceptions import ApiError, NotFoundError, PineconeConnectionError, PineconeError
from pinecone.errors.exceptions import PineconeTimeoutError as TimedOut
from pinecone.index import Index

from pipeline.config.embedding import Pinecone
from pipeline.core.cluster import on_driver_node
from pipeline.index.table import StoreError

T = TypeVar("T")
KEY = "PINECONE_API_KEY"
ONCE = RetryConfig(max_retries=0)
PASSING = (408, 429, 500, 502, 503, 504)
POLL_S = 0.01  # the least time between two questions for a place among the requests under way


class PassingError(Exception):
    """A request failed that may not fail again; `wait_s` where the service said how long to wait."""

    def __init__(self, reason: str, wait_s: float | None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RejectedError(Exception):
    """A request that the service will not take, however often."""


def api_key(files: Sequence[str]) -> str:
    """The environment's, else that of the first of these dotenv files that has one. Raises StoreError without one."""
    key = os.environ.get(KEY, "").strip()
    for file in files:
        key = key or (dotenv_values(file).get(KEY) or "").strip()
    if not key:
        raise StoreError(f"found no Pinecone key; set {KEY} on each node, or write {KEY}=… into {files[0]}")
    return key


class Budget:
    """Lets requests go 1 / requests_per_second apart, and no more than max_concurrency at once.

    A request that has not ended within `lease_s`, because its process is gone, no longer counts.
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

    @contextmanager
    def turn(self, sleep: Callable[[float], Any] = time.sleep) -> Iterator[None]:
        """Waits until a request may be sent."""
        while (wait := self.ask()) > 0:
            sleep(wait)
        try:
            yield
        finally:
            self.give_back()

    def ask(self) -> float:
        """0 where a request may be sent now, which then counts as under way; else the seconds until to ask again."""
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
        """A request has ended, well or not."""
        with self._lock:
            if self._ends:
                self._ends.popleft()

    def hold(self, seconds: float) -> None:
        """Send no request for so long, because the service asks for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


class SharedBudget(Budget):
    """A budget in an actor, for all processes of a job."""

    def __init__(self, *limits: float) -> None:
        import ray

        self.actor = on_driver_node(ray.remote(num_cpus=0)(Budget)).remote(*limits)

    def ask(self) -> float:
        import ray

        return float(ray.get(self.actor.ask.remote()))

    def give_back(self) -> None:
        self.actor.give_back.remote()

    def hold(self, seconds: float) -> None:
        self.actor.hold.remote(seconds)


class PineconeClient:
    """Sends requests. A pickled one connects anew, with a budget of its own unless it was given one."""

    def __init__(
        self, settings: Pinecone, key_files: Sequence[str], budget: Budget | None = None, backoff_s: float = 0.5
    ) -> None:
        self.settings, self.key_files, self.shared, self.backoff_s = settings, list(key_files), budget, backoff_s
        lease_s = 2 * settings.timeout_s + 1
        self.budget = budget or Budget(settings.requests_per_second, settings.max_concurrency, lease_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return PineconeClient, (self.settings, self.key_files, self.shared, self.backoff_s)

    @cached_property
    def sdk(self) -> Client:
        """The control plane."""
        settings = self.settings
        try:
            key = api_key(self.key_files)
            return Client(api_key=key, host=settings.host, timeout=settings.timeout_s, retry_config=ONCE)
        except PineconeError as error:
            raise StoreError(f"Pinecone's client refuses its settings: {self._clean(error)}") from None

    @cached_property
    def index(self) -> Index:
        """The data plane, whose host the control plane says where the config does not."""
        host = self.settings.index_host or self.describe().host
        if not host:
            raise StoreError(f"Pinecone's index {self.settings.index} has no host yet; wait until it is ready")
        try:
            index = self.sdk.index(host=host)
        except PineconeError as error:
            raise StoreError(f"pinecone.index_host: {self._clean(error)}") from None
        index._http.close()
        index._http = HTTPClient(replace(index._config, retry_config=ONCE), DATA_PLANE_API_VERSION)
        return index

    def find(self) -> Any:
        """The index's description, or None."""
        return self._answer("describe_index", lambda: self.sdk.indexes.describe(self.settings.index), None)

    def describe(self) -> Any:
        """The index's description. Raises StoreError where there is none."""
        found = self.find()
        if found is None:
            raise StoreError(
                f"Pinecone has no index {self.settings.index}; pinecone.create=true makes it, or name another by "
                "pinecone.index"
            )
        return found

    def create(self, **options: Any) -> None:
        self._answer("create_index", lambda: self.sdk.indexes.create(**options))

    def send(self, what: str, request: Callable[[Index], T], absent: Any = ...) -> T:
        """The data plane's answer, however often the request has to be sent; `absent`, where given, stands for a 404.

        Raises StoreError where there is none in the end.
        """
        return self._answer(what, partial(request, self.index), absent)

    def _answer(self, what: str, request: Callable[[], T], absent: Any = ...) -> T:
        try:
            return self.attempt(request, absent)
        except PassingError as error:
            raise StoreError(f"Pinecone did not answer {what} in {self.settings.max_attempts} tries: {error}") from None
        except RejectedError as error:
            raise StoreError(f"Pinecone refused {what}: {error}") from None

    def attempt(self, request: Callable[[], T], absent: Any = ...) -> T:
        """Send a request up to `pinecone.max_attempts` times. Raises PassingError, RejectedError or StoreError."""
        for attempt in range(1, self.settings.max_attempts):
            try:
                return self._once(request, absent)
            except PassingError as error:
                self._wait(attempt, error)
        return self._once(request, absent)

    def _once(self, request: Callable[[], T], absent: Any) -> T:
        try:
            with self.budget.turn():
                return request()
        except NotFoundError as error:
            if absent is not ...:
                return absent
            raise StoreError(
                f"Pinecone's index {self.settings.index} is not at {self.settings.index_host or 'its host'} (404: "
                f"{self._clean(error.message)}); if it was deleted, pinecone.create=true makes it again"
            ) from None
        except (TimedOut, PineconeConnectionError) as error:
            raise PassingError(self._clean(error), None) from None
        except ApiError as error:
            raise self._sorted(error) from None
        except PineconeError as error:
            raise RejectedError(self._clean(error)) from None

    def _sorted(self, error: ApiError) -> Exception:
        status, words = error.status_code, self._clean(error.message)
        if status in PASSING:
            return PassingError(f"{status} {words}", _seconds((error.headers or {}).get("retry-after")))
        if status == 401:
            return StoreError(f"Pinecone refused the key (401); is {KEY}, or the one in api.env, right?")
        if status in (402, 403):
            return StoreError(f"Pinecone forbids it ({status}): {words}")
        return RejectedError(f"{status} {words}")

    def _wait(self, attempt: int, error: PassingError) -> None:
        """Wait before the next attempt: as long as the service asked all to, else longer each time, within a jitter."""
        if error.wait_s is not None:
            wait_s = min(error.wait_s, self.settings.max_wait_s)
            self.budget.hold(wait_s)
        else:
            wait_s = random.uniform(0.5, 1) * min(self.backoff_s * 2 ** (attempt - 1), self.settings.max_wait_s)
        time.sleep(wait_s)

    def _clean(self, error: object) -> str:
        """An error's words on one line, without the key."""
        words = " ".join(str(error).split())[:300]
        try:
            return words.replace(api_key(self.key_files), "***")
        except StoreError:
            return words


def _seconds(value: str | None) -> float | None:
    """What Retry-After asks for: seconds, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(float(value), 0.0)
    with suppress(ValueError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
