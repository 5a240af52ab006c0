"""Buckets on loopback: S3 by moto, in a thread of the test's process, GCS by a stand-in of our own, and Azure by
Azurite, Microsoft's emulator.
"""

from __future__ import annotations

import base64
import hmac
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from pipeline.core import object_store

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing-of-this-may-show",
    "AWS_EC2_METADATA_DISABLED": "true",
    # The key that every Azurite has
    "AZURE_STORAGE_ACCOUNT_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr"
    "/KBHBeksoGMGw==",
}
AZURE_ACCOUNT = "devstoreaccount1"
KEEP_CONNECTIONS = (
    "--import=data:text/javascript,import { Server } from 'node:http';"
    "Object.defineProperty(Server.prototype, 'keepAliveTimeout', { get: () => 0, set: () => {} })"
)
"""An argument of Node, which else ends connections that are idle for five seconds, even if a request on one waits for a
busy Azurite. Azurite's own option for that has no effect.
"""
AZURITE = Path(__file__).parents[1] / ".azurite/node_modules/.bin/azurite-blob"
NOBODY = "?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:1"


@dataclass(frozen=True)
class _Bucket:
    """A bucket, and a way into it past the code that is tested."""

    bucket: str
    options: str
    """Of a URI, that lead to the server."""
    inside: Any
    """boto3's client, the folder of the stand-in, or a store of obstore."""
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


class Azure(_Bucket):
    scheme = "az"

    def keys(self, prefix: str = "") -> list[str]:
        found = (each["path"] for page in self.inside.list() for each in page)
        return sorted(key for key in found if key.startswith(prefix))

    def read(self, key: str) -> bytes:
        return bytes(self.inside.get(key).bytes())

    def write(self, key: str, data: bytes) -> None:
        self.inside.put(key, data)

    def delete(self, key: str) -> None:
        self.inside.delete(key)


Served = S3 | Gcs | Azure


@contextmanager
def s3(bucket: str) -> Iterator[S3]:
    """A server with one bucket that all may read. Credentials for it are in the environment: conftest sets them."""
    import boto3
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    # moto checks a condition and writes in two steps, between which another thread may write
    one_at_a_time, put_object = threading.Lock(), S3Response.put_object

    def atomic(self: Any) -> Any:
        with one_at_a_time:
            return put_object(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(S3Response, "put_object", atomic)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket=bucket, ACL="public-read")
    try:
        yield S3(bucket, f"?region=us-east-1&scheme=http&endpoint_override={host}:{port}", client)
    finally:
        server.stop()
        patch.undo()


@contextmanager
def gcs(bucket: str, folder: Path) -> Iterator[Gcs]:
    """A server whose buckets lie in a folder, and which asks for no credentials."""
    (folder / bucket).mkdir()
    command = [sys.executable, "-m", "tests.gcs_server", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as server:
        assert server.stdout
        try:
            address = server.stdout.readline().strip()
            options = f"?anonymous=true&scheme=http&endpoint_override={address}"
            yield Gcs(bucket, options, folder / bucket)
        finally:
            server.terminate()


@contextmanager
def azure(container: str, folder: Path) -> Iterator[Azure]:
    """A server with one container. The key for it is in the environment: conftest sets it."""
    from obstore.store import AzureStore

    from tests.job_process import free_ports

    if not AZURITE.exists():
        pytest.skip("Azurite is not installed: npm install --prefix .azurite azurite@3.35.0")
    (port,) = free_ports(1)
    command = ["node", KEEP_CONNECTIONS, str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--location", str(folder), "--disableTelemetry", "--silent", "--skipApiVersionCheck"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            while not _answers(port):
                assert server.poll() is None, "Azurite has ended"
                time.sleep(0.05)
            _create_container(f"http://127.0.0.1:{port}", container)
            inside = AzureStore(
                container,
                account_name=AZURE_ACCOUNT,
                account_key=CREDENTIALS["AZURE_STORAGE_ACCOUNT_KEY"],
                endpoint=f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}",
                client_options={"allow_http": True},
            )
            options = f"?account_name={AZURE_ACCOUNT}&scheme=http&endpoint_override=127.0.0.1:{port}"
            yield Azure(container, options, inside)
        finally:
            server.kill()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def _create_container(server: str, container: str) -> None:
    """What obstore has no call for."""
    path = f"/{AZURE_ACCOUNT}/{container}"
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = ["PUT", *11 * [""], *(f"{name}:{value}" for name, value in headers.items())]
    text = "\n".join([*lines, f"/{AZURE_ACCOUNT}{path}", "restype:container"])
    key = base64.b64decode(CREDENTIALS["AZURE_STORAGE_ACCOUNT_KEY"])
    signature = base64.b64encode(hmac.digest(key, text.encode(), "sha256")).decode()
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{signature}"
    urlopen(Request(f"{server}{path}?restype=container", method="PUT", headers=headers), timeout=60).close()


def serving(scheme: str, bucket: str, folder: Path) -> AbstractContextManager[Served]:
    """A server with one bucket, for a scheme of URIs."""
    return s3(bucket) if scheme == "s3" else (gcs if scheme == "gs" else azure)(bucket, folder)


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
def answering(handler: type[BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Options of a URI of S3 that lead to a server with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def give_up_at_once(patch: pytest.MonkeyPatch) -> None:
    """Let new connections try a request once. By themselves they try for six seconds."""
    patch.setattr(object_store, "MAX_RETRIES", 0)
