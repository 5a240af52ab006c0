"""A process's connection to Pinecone, with rate limiting and retries.

    client = PineconeClient(config.pinecone, config.secret_files, Budget(requests_per_second=50, max_concurrency=16))
    client.send("query", lambda index: index.query(vector=[…], top_k=10, namespace="a"))

The SDK's own retries would bypass the rate limit, so they are switched off. Errors are transient (`TransientError`),
of one request (`RejectedError`), or of all requests (`StoreError`). No message contains the API key, which is read on
use and not stored.
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
RETRYABLE = (408, 429, 500, 502, 503, 504)
POLL_S = 0.01  # minimum time between two attempts to acquire a slot


class TransientError(Exception):
    """A request failed but may succeed if retried; `wait_s` is the service's Retry-After."""

    def __init__(self, reason: str, wait_s: float | None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RejectedError(Exception):
    """The service refuses a request permanently."""


def api_key(files: Sequence[str]) -> str:
    """The key from the environment, else from the first dotenv file that has one. Raises StoreError if none has."""
    key = os.environ.get(KEY, "").strip()
    for file in files:
        key = key or (dotenv_values(file).get(KEY) or "").strip()
    if not key:
        raise StoreError(f"found no Pinecone key; set {KEY} on each node, or add {KEY}=… to {files[0]}")
    return key


class Budget:
    """Limits the rate of requests, and the number of concurrent ones.

    A request that has not ended within `lease_s` no longer counts: its process is assumed dead.
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
    def slot(self, sleep: Callable[[float], Any] = time.sleep) -> Iterator[None]:
        """Hold a slot for one request; waits until there is one."""
        while (wait := self.try_acquire()) > 0:
            sleep(wait)
        try:
            yield
        finally:
            self.release()

    def try_acquire(self) -> float:
        """Acquire a slot and return 0, or return the seconds to wait before the next try."""
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

    def release(self) -> None:
        """Free a slot after a request, successful or not."""
        with self._lock:
            if self._ends:
                self._ends.popleft()

    def pause(self, seconds: float) -> None:
        """Block all requests for `seconds`, because the service asked for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


class SharedBudget(Budget):
    """A `Budget` in an actor, shared by all processes of a job."""

    def __init__(self, *limits: float) -> None:
        import ray

        self.actor = on_driver_node(ray.remote(num_cpus=0)(Budget)).remote(*limits)

    def try_acquire(self) -> float:
        import ray

        return float(ray.get(self.actor.try_acquire.remote()))

    def release(self) -> None:
        self.actor.release.remote()

    def pause(self, seconds: float) -> None:
        self.actor.pause.remote(seconds)


class PineconeClient:
    """Sends requests. Unpickled, it reconnects; without a given `budget`, each process creates its own."""

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
            raise StoreError(f"the Pinecone client cannot be created: {self._clean(error)}") from None

    @cached_property
    def index(self) -> Index:
        """The data plane; its host comes from the config, else from the control plane."""
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
        """The index's description. Raises StoreError if it does not exist."""
        description = self.find()
        if description is None:
            raise StoreError(
                f"Pinecone has no index {self.settings.index}; set pinecone.create=true to create it, or choose "
                "another with pinecone.index"
            )
        return description

    def create(self, **options: Any) -> None:
        self._answer("create_index", lambda: self.sdk.indexes.create(**options))

    def send(self, what: str, request: Callable[[Index], T], absent: Any = ...) -> T:
        """Send a request to the data plane, with retries. Returns `absent`, if given, for a 404.

        Raises StoreError if all attempts fail.
        """
        return self._answer(what, partial(request, self.index), absent)

    def _answer(self, what: str, request: Callable[[], T], absent: Any = ...) -> T:
        try:
            return self.attempt(request, absent)
        except TransientError as error:
            raise StoreError(f"Pinecone: {what} failed after {self.settings.max_attempts} attempts: {error}") from None
        except RejectedError as error:
            raise StoreError(f"Pinecone refused {what}: {error}") from None

    def attempt(self, request: Callable[[], T], absent: Any = ...) -> T:
        """Send a request up to `pinecone.max_attempts` times. Raises TransientError, RejectedError or StoreError."""
        for attempt in range(1, self.settings.max_attempts):
            try:
                return self._once(request, absent)
            except TransientError as error:
                self._wait(attempt, error)
        return self._once(request, absent)

    def _once(self, request: Callable[[], T], absent: Any) -> T:
        try:
            with self.budget.slot():
                return request()
        except NotFoundError as error:
            if absent is not ...:
                return absent
            raise StoreError(
                f"found no Pinecone index {self.settings.index} at {self.settings.index_host or 'its host'} (404: "
                f"{self._clean(error.message)}); if it was deleted, set pinecone.create=true to create it again"
            ) from None
        except (TimedOut, PineconeConnectionError) as error:
            raise TransientError(self._clean(error), None) from None
        except ApiError as error:
            raise self._classified(error) from None
        except PineconeError as error:
            raise RejectedError(self._clean(error)) from None

    def _classified(self, error: ApiError) -> Exception:
        status, words = error.status_code, self._clean(error.message)
        if status in RETRYABLE:
            return TransientError(f"{status} {words}", _seconds((error.headers or {}).get("retry-after")))
        if status == 401:
            return StoreError(f"Pinecone refused the key (401); check {KEY} in the environment or in api.env")
        if status in (402, 403):
            return StoreError(f"Pinecone denied the request ({status}): {words}")
        return RejectedError(f"{status} {words}")

    def _wait(self, attempt: int, error: TransientError) -> None:
        """Wait before the next attempt: as long as the service asks, else exponential backoff with jitter."""
        if error.wait_s is not None:
            wait_s = min(error.wait_s, self.settings.max_wait_s)
            self.budget.pause(wait_s)
        else:
            wait_s = random.uniform(0.5, 1) * min(self.backoff_s * 2 ** (attempt - 1), self.settings.max_wait_s)
        time.sleep(wait_s)

    def _clean(self, error: object) -> str:
        """An error message on one line, without the API key."""
        words = " ".join(str(error).split())[:300]
        try:
            return words.replace(api_key(self.key_files), "***")
        except StoreError:
            return words


def _seconds(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(float(value), 0.0)
    with suppress(ValueError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
