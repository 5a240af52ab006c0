"""LanceDB's connection to a folder on disk or in a bucket."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl

from pipeline.config import ConfigError
from pipeline.storage.bucket import AnyPath, BucketPath

# NOTE: Ray starts its processes by fork and exec, which LanceDB's own threads outlive; it warns of forks that go on.
warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
# What a scan may read ahead; with Lance's own 2 GB, a whole table is in memory before its first batch was looked at.
os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(1 << 27))
SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}  # LanceDB's names for ours


def connect(home: AnyPath) -> Any:
    """A connection that sees at once what others write."""
    import lancedb  # two seconds, which an encoder has no use for

    uri, options = str(home), None
    if isinstance(home, BucketPath):
        uri, options = f"{SCHEMES[home.scheme]}://{home.key}", storage_options(home)
    return lancedb.connect(uri, read_consistency_interval=timedelta(0), storage_options=options)


def has_table(home: AnyPath, name: str) -> bool:
    """Whether there is such a table. To look into a folder that is not there would make it."""
    return home.is_dir() and name in connect(home).list_tables(limit=1_000_000).tables


class Frozen:
    """A table as it is now, whatever is written to it later: what its indices cover is all there is to look through.

    Sent to other processes by pickle, it connects in each on first use.
    """

    def __init__(self, home: AnyPath, name: str) -> None:
        self.home, self.name = home, name
        self._table: Any = connect(home).open_table(name)
        self.version = int(self._table.version)
        self._table.checkout(self.version)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def table(self) -> Any:
        if self._table is None:
            self._table = connect(self.home).open_table(self.name)
            self._table.checkout(self.version)
        return self._table


def storage_options(home: BucketPath) -> dict[str, str]:
    """LanceDB's words for the options of pyarrow's URIs. Raises ConfigError for one that it has no word for."""
    options, found = dict(parse_qsl(home.query)), {}
    scheme, endpoint = options.pop("scheme", "https"), options.pop("endpoint_override", None)
    options.pop("retry_limit_seconds", None)
    if options.pop("anonymous", "false") == "true":
        found["skip_signature"] = "true"
    if home.scheme == "s3":
        if region := options.pop("region", None):
            found["aws_region"] = region
        if endpoint:
            found |= {"aws_endpoint": f"{scheme}://{endpoint}", "allow_http": str(scheme == "http").lower()}
            endpoint = None
    left = [*options, *(["endpoint_override"] if endpoint else [])]
    if left:
        raise ConfigError(
            f"storage.root: found the option {left[0]}, which LanceDB has no like of; allowed with it is "
            "embedding.uri=/folder/on/disk"
        )
    return found
