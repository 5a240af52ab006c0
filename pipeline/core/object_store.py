"""Connections to buckets of S3, GCS and Azure: options of a URI, translated for each client library.

    bucket = ObjectStore("s3", "corpus", "region=eu-west-1")
    bucket.connect()                     # an obstore store, which reads and writes objects by key
    bucket.lance_options                 # storage options for LanceDB

URI options: `region`, `scheme` (http or https), `endpoint_override` (host:port), `anonymous` (true for public data) and
`account_name` (Azure). Credentials come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, or the machine's identity.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az"}
OPTIONS = ("region", "scheme", "endpoint_override", "anonymous", "account_name")
MAX_RETRIES = 6  # waits start at 0.1 s and double: about 6 s in total
RETRY_S = 30.0
_SECRET = re.compile(r"key|secret|token|password|signature|\bsig\b", re.IGNORECASE)
_USER = re.compile(r"(\w:/{1,2})[^\s'\"]{0,2000}@")  # bounded, so that the time is linear
_SECRET_OPTION = re.compile(
    r"([?&][^=&?\s]{0,200}(?:key|secret|token|password|sig)[^=&\s]{0,200}=)[^&\s'\"]+", re.IGNORECASE
)
_URI = re.compile(r"\b(https?|s3|gs|az)://\S+")


class BucketError(RuntimeError):
    """A bucket cannot be reached or refuses. Not an OSError, which would mean a missing or broken file."""


@dataclass(frozen=True, order=True)
class ObjectStore:
    """A bucket (Azure: a container) and how to reach it. `query` holds the URI's options."""

    scheme: str
    bucket: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}"

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of obstore's stores."""
        config, http = self._config
        retry = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)}
        return {"config": config, "client_options": {"allow_http": http}, "retry_config": retry}

    def connect(self, *, patient: bool = True) -> Any:
        """An obstore store, cached per process. With `patient=False` it gives up after a few seconds."""
        return _connect(self, patient)

    @property
    def lance_options(self) -> dict[str, str]:
        """LanceDB's storage options."""
        config, http = self._config
        prefix = {"s3": "aws_", "gs": "google_", "az": "azure_storage_"}[self.scheme]
        return {prefix + name: value for name, value in config.items()} | ({"allow_http": "true"} if http else {})

    @property
    def account(self) -> str:
        """Azure's storage account, "" for other services."""
        named = self._options.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
        return named if self.scheme == "az" else ""

    @property
    def _options(self) -> dict[str, str]:
        return dict(parse_qsl(self.query))

    @property
    def _region(self) -> str | None:
        """S3's region: from the URI, the environment, or the service."""
        options = self._options
        region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region or "endpoint_override" in options or os.environ.get("AWS_ENDPOINT_URL"):
            return region
        from pyarrow import fs

        try:
            return str(fs.resolve_s3_region(self.bucket))
        except OSError as error:
            raise BucketError(access_error(str(self), error)) from None

    @property
    def _config(self) -> tuple[dict[str, str], bool]:
        """obstore's configuration, and whether the connection is plain HTTP."""
        options = self._options
        http = options.get("scheme") == "http"
        config = {}
        if options.get("anonymous") == "true":
            config["skip_signature"] = "true"
            if self.scheme == "gs":
                config["bearer_token"] = ""  # otherwise writes would request one from the machine
        if self.scheme == "s3" and (region := self._region):
            config["region"] = region
        if account := options.get("account_name"):
            config["account_name"] = account
        if endpoint := options.get("endpoint_override"):
            url = f"{'http' if http else 'https'}://{endpoint}"
            if self.scheme == "az":
                url += f"/{self.account}"
            config["base_url" if self.scheme == "gs" else "endpoint"] = url
        return config, http


@lru_cache(maxsize=32)
def _connect(bucket: ObjectStore, patient: bool) -> Any:
    from obstore import store

    kind: Any = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[bucket.scheme]
    settings = bucket.settings
    if not patient:
        settings["client_options"] |= {"timeout": "5s"}
        settings["retry_config"] |= {"max_retries": min(1, MAX_RETRIES)}
    return kind(bucket.bucket, **settings)


@contextmanager
def bucket_errors(bucket: ObjectStore, key: str) -> Iterator[None]:
    """Turn errors of a request into BucketError; a missing object raises FileNotFoundError."""
    from obstore.exceptions import BaseError

    where = f"{bucket}/{key}".rstrip("/")
    try:
        yield
    except FileNotFoundError as error:
        if re.search(r"<Code>(NoSuchBucket|ContainerNotFound)", str(error)):
            raise BucketError(access_error(where, error)) from None
        raise FileNotFoundError(2, "No such object", where) from None
    except (BaseError, ValueError) as error:
        raise BucketError(access_error(where, error)) from None


def cause(error: BaseException) -> str:
    """An error in a few words, without URLs, which may hold keys, and paths, which differ between machines."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, BucketError):
        return text.partition("(")[2].partition("); allowed")[0]
    if "169.254.169.254" in text or "metadata.google.internal" in text:  # the last source of credentials
        return "no credentials in the environment"
    status = re.search(r"status code: (\d+ [A-Za-z ]+)", text)
    if status:  # of the service's response
        code = re.search(r"<Code>(\w+)</Code>", text)
        return status[1].strip() + (f", {code[1]}" if code else "")
    if "InvalidCertificate" in text:
        return "invalid certificate"
    network = re.search(r'(?:message|error): "([^"]+)"', text) or re.search(r"HTTP error: ([^\n]*)", text)
    words = _URI.sub("", network[1] if network else text.partition("\n\nDebug source")[0]).split()
    return " ".join(words)[:200] or type(error).__name__


def access_error(where: str, error: BaseException) -> str:
    """The message for a bucket that fails. `where` is a URI without options."""
    return (
        f"found no way into {where} ({cause(error)}); allowed is a bucket that this machine reaches, with its region "
        "and its credentials in the environment"
    )


def holds_credentials(uri: str) -> bool:
    """Whether a URI has a user name or an option that looks like a secret."""
    _, mark, rest = uri.partition("://")
    location, _, query = rest.partition("?")
    names = [name for name, _ in parse_qsl(query, keep_blank_values=True)]
    return bool(mark) and ("@" in location or any(map(_SECRET.search, names)))


def redacted(text: str) -> str:
    """A text without the credentials of the URIs in it: `s3://KEY:SECRET@bucket/a` becomes `s3://…@bucket/a`."""
    return _SECRET_OPTION.sub(r"\1…", _USER.sub(r"\1…@", text)) if ":/" in text else text
