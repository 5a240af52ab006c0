"""Buckets on loopback: S3 by moto, in a thread of the test's process, and GCS by a stand-in of our own."""

from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing-of-this-may-show",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Served(ABC):
    """A bucket, and a way into it past the code that is tested."""

    bucket: str
    options: str
    """Of a URI, that lead to the server."""
    inside: Any
    """boto3's client, or the folder of the stand-in."""
    scheme = ""

    def uri(self, prefix: str) -> str:
        return f"{self.scheme}://{self.bucket}/{prefix}{self.options}"

    @abstractmethod
    def keys(self, prefix: str = "") -> list[str]: ...

    @abstractmethod
    def read(self, key: str) -> bytes: ...

    @abstractmethod
    def write(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def delete(self, key: str) -> None: ...


class S3(Served):
    scheme = "s3"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.inside.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        found = [each["Key"] for page in pages for each in page.get("Contents", [])]
        return [key for key in found if not key.endswith("/")]  # what stands for a folder itself

    def read(self, key: str) -> bytes:
        return bytes(self.inside.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        self.inside.put_object(Bucket=self.bucket, Key=key, Body=data, ACL="public-read")

    def delete(self, key: str) -> None:
        self.inside.delete_object(Bucket=self.bucket, Key=key)


class Gcs(Served):
    scheme = "gs"

    def keys(self, prefix: str = "") -> list[str]:
        found = (path.relative_to(self.inside).as_posix() for path in self.inside.rglob("*") if path.is_file())
        return sorted(key for key in found if key.startswith(prefix))

    def read(self, key: str) -> bytes:
        return bytes((self.inside / key).read_bytes())

    def write(self, key: str, data: bytes) -> None:
        (self.inside / key).parent.mkdir(parents=True, exist_ok=True)
        (self.inside / key).write_bytes(data)

    def delete(self, key: str) -> None:
        (self.inside / key).unlink()


@contextmanager
def s3(bucket: str) -> Iterator[S3]:
    """A server with one bucket that all may read. Credentials for it are in the environment: conftest sets them."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket=bucket, ACL="public-read")
    try:
        yield S3(bucket, f"?region=us-east-1&scheme=http&endpoint_override={host}:{port}", client)
    finally:
        server.stop()


@contextmanager
def gcs(bucket: str, folder: Path) -> Iterator[Gcs]:
    """A server whose buckets lie in a folder, and which asks for no credentials."""
    (folder / bucket).mkdir()
    command = [sys.executable, "-m", "tests.gcs_server", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as server:
        assert server.stdout
        try:
            address = server.stdout.readline().strip()
            options = f"?anonymous=true&scheme=http&endpoint_override={address}&retry_limit_seconds=3"
            yield Gcs(bucket, options, folder / bucket)
        finally:
            server.terminate()
