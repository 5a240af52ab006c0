"""Buckets on loopback: S3 by moto, in a thread of the test's process, and GCS by a stand-in of our own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing-of-this-may-show",
    "AWS_EC2_METADATA_DISABLED": "true",
}
NOBODY = "?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:1"


@dataclass(frozen=True)
class _Bucket:
    """A bucket, and a way into it past the code that is tested."""

    bucket: str
    options: str
    """Of a URI, that lead to the server."""
    inside: Any
    """boto3's client, or the folder of the stand-in."""
    scheme = ""

    def uri(self, prefix: str) -> str:
        return f"{self.scheme}://{self.bucket}/{prefix}{self.options}"


class S3(_Bucket):
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


class Gcs(_Bucket):
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


Served = S3 | Gcs


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


class Forbidding(BaseHTTPRequestHandler):
    """A service that refuses everybody."""

    def do_GET(self, status: int = 403) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Options of a URI of S3 that lead to a server with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def give_up_at_once(patch: pytest.MonkeyPatch) -> None:
    """Let new connections to S3 try a request once. By itself pyarrow tries for six seconds."""
    from pyarrow import fs

    class Once:
        @staticmethod
        def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
            options: dict[str, Any] = dict(parse_qsl(uri.partition("?")[2]))
            return fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1)), ""

    patch.setattr(fs, "FileSystem", Once)
