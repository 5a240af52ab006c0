"""An S3 on loopback: moto's server in a thread of the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing-of-this-may-show",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Served:
    bucket: str
    options: str
    """Of a URI, that lead to the server."""
    client: Any
    """boto3's."""

    def uri(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}{self.options}"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        found = [each["Key"] for page in pages for each in page.get("Contents", [])]
        return [key for key in found if not key.endswith("/")]  # what stands for a folder itself

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)


@contextmanager
def s3(bucket: str = "corpus") -> Iterator[Served]:
    """A server with one bucket that all may read, and credentials for it in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket=bucket, ACL="public-read")
        try:
            yield Served(bucket, f"?region=us-east-1&scheme=http&endpoint_override={host}:{port}", client)
        finally:
            server.stop()
