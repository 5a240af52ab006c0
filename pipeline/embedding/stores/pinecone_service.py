"""One process's connection to Pinecone: each request within the budget, sent again where that may help.

    service = PineconeService(config.pinecone, key_files=["api.env"])
    service.send("query", lambda: service.index.query(vector=[…], top_k=10, namespace="a"))

The SDK repeats requests by itself, behind the budget's back; that is switched off here. Errors are of three kinds:
those that may pass (`PassingError`), those of one request (`RejectedError`), and those of all (`StoreError`). No
text of them holds the key.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pinecone import Pinecone as Client
from pinecone import RetryConfig
from pinecone._internal.constants import DATA_PLANE_API_VERSION
from pinecone._internal.http_client import HTTPClient
from pinecone.errors.exceptions import ApiError, NotFoundError, PineconeConnectionError, PineconeError
from pinecone.errors.exceptions import PineconeTimeoutError as TimedOut
from pinecone.index import Index

from pipeline.config import Pinecone
from pipeline.embedding.stores.budget import Allowance, Budget
from pipeline.embedding.stores.secret import VARIABLE, api_key
from pipeline.embedding.stores.store import StoreError

T = TypeVar("T")
ONCE = RetryConfig(max_retries=0)
PASSING = (408, 429, 500, 502, 503, 504)


class PassingError(Exception):
    """A request that failed as others may not; `wait_s` where the service said how long to wait."""

    def __init__(self, reason: str, wait_s: float | None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RejectedError(Exception):
    """A request that the service will not take, however often."""


class PineconeService:
    """Sends requests. Pickled, it leaves its connections and, unless one was given, its budget behind."""

    def __init__(
        self, settings: Pinecone, key_files: Sequence[str], budget: Budget | None = None, backoff_s: float = 0.5
    ) -> None:
        self.settings, self.key_files, self.backoff_s = settings, list(key_files), backoff_s
        self._given = budget
        self._own: Budget | None = None
        self._client: Client | None = None
        self._index: Index | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": None, "_client": None, "_index": None}

    @property
    def budget(self) -> Budget:
        """The job's, else one of this process alone."""
        if self._given is not None:
            return self._given
        if self._own is None:
            lease_s = 2 * self.settings.timeout_s + 1
            self._own = Budget(Allowance(self.settings.requests_per_second, self.settings.max_concurrency, lease_s))
        return self._own

    @property
    def client(self) -> Client:
        """The control plane."""
        if self._client is None:
            try:
                self._client = Client(
                    api_key=api_key(self.key_files),
                    host=self.settings.host,
                    timeout=self.settings.timeout_s,
                    retry_config=ONCE,
                )
            except PineconeError as error:
                raise StoreError(f"Pinecone's client refuses its settings: {self._clean(error)}") from None
        return self._client

    @property
    def index(self) -> Index:
        """The data plane, whose host the control plane says where the config does not."""
        if self._index is None:
            host = self.settings.index_host or self.describe().host
            if not host:
                raise StoreError(f"Pinecone's index {self.settings.index} has no host yet; wait until it is ready")
            try:
                index = self.client.index(host=host)
            except PineconeError as error:
                raise StoreError(f"pinecone.index_host: {self._clean(error)}") from None
            index._http.close()
            index._http = HTTPClient(replace(index._config, retry_config=ONCE), DATA_PLANE_API_VERSION)
            self._index = index
        return self._index

    def describe(self) -> Any:
        """The index's description. Raises StoreError where there is none."""
        found = self.find()
        if found is None:
            raise StoreError(
                f"Pinecone has no index {self.settings.index}; pinecone.create=true makes it, or name another by "
                "pinecone.index"
            )
        return found

    def find(self) -> Any:
        """The index's description, or None."""
        client = self.client
        return self.send("describe_index", lambda: client.indexes.describe(self.settings.index), absent=None)

    def send(self, what: str, request: Callable[[], T], absent: Any = ...) -> T:
        """A request's answer, however often it has to be sent; `absent`, where given, for what is not there (404).

        Raises StoreError where there is none in the end.
        """
        for attempt in range(1, self.settings.max_attempts + 1):
            try:
                return self.once(request, absent)
            except PassingError as error:
                last = error
                if attempt < self.settings.max_attempts:
                    self.wait(attempt, error)
            except RejectedError as error:
                raise StoreError(f"Pinecone refused {what}: {error}") from None
        raise StoreError(f"Pinecone did not answer {what} in {attempt} tries: {last}")

    def once(self, request: Callable[[], T], absent: Any = ...) -> T:
        """A request, sent once within the budget. Raises PassingError, RejectedError or StoreError."""
        try:
            with self.budget:
                return request()
        except NotFoundError as error:
            if absent is not ...:
                return absent
            raise StoreError(self._gone(error)) from None
        except (TimedOut, PineconeConnectionError) as error:
            raise PassingError(self._clean(error), None) from None
        except ApiError as error:
            raise self._sorted(error) from None
        except PineconeError as error:
            raise RejectedError(self._clean(error)) from None

    def _sorted(self, error: ApiError) -> Exception:
        status = error.status_code
        if status in PASSING:
            return PassingError(
                f"{status} {self._clean(error.message)}", _seconds((error.headers or {}).get("retry-after"))
            )
        if status == 401:
            return StoreError(f"Pinecone refused the key (401); is {VARIABLE}, or the one in api.env, right?")
        if status in (402, 403):
            return StoreError(f"Pinecone forbids it ({status}): {self._clean(error.message)}")
        return RejectedError(f"{status} {self._clean(error.message)}")

    def _gone(self, error: NotFoundError) -> str:
        where = self.settings.index_host or "its host"
        return (
            f"Pinecone's index {self.settings.index} is not at {where} (404: {self._clean(error.message)}); if it was "
            "deleted, pinecone.create=true makes it again"
        )

    def wait(self, attempt: int, error: PassingError) -> None:
        """Wait before the next attempt: as long as the service asked all to, else longer each time, within a jitter."""
        if error.wait_s is not None:
            asked = min(error.wait_s, self.settings.max_wait_s)
            self.budget.hold(asked)
            time.sleep(asked)
        else:
            time.sleep(random.uniform(0.5, 1) * min(self.backoff_s * 2 ** (attempt - 1), self.settings.max_wait_s))

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
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
