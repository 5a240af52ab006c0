"""storage.root in a bucket: whether the bucket is there and lets us in, asked before there is work to lose."""

from __future__ import annotations

import uuid

from pipeline.config import Config, ConfigError
from pipeline.storage.bucket import BucketError, BucketPath


def check_reachable(config: Config) -> None:
    """Raise ConfigError where storage.root is in a bucket that is not there or cannot be reached."""
    root = config.root
    if isinstance(root, BucketPath):
        bucket = BucketPath(root.scheme, root.bucket, root.query)
        try:
            found = bucket.exists()
        except BucketError as error:
            raise ConfigError(f"storage.root: {error}") from None
        if not found:
            raise ConfigError(
                f"storage.root: found no bucket {root.bucket} at {root.scheme}://; allowed is one that is there"
            )


def check_writable(config: Config) -> None:
    """Raise ConfigError where storage.root is in a bucket that takes nothing from us."""
    root = config.root
    if isinstance(root, BucketPath):
        probe = root / f".probe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except BucketError as error:
            raise ConfigError(f"storage.root: {error}, which may write and delete there") from None
