"""LanceDB's connection to a folder on disk or in a bucket."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

from pipeline.storage.files import lance_location
from pipeline.storage.path import StoragePath

# NOTE: Ray starts its processes by fork and exec, which LanceDB's own threads outlive; it warns of forks that go on.
warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
# What a scan may read ahead; with Lance's own 2 GB, a whole table is in memory before its first batch was looked at.
os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(1 << 27))


def connect(home: StoragePath) -> Any:
    """A connection that sees at once what others write."""
    import lancedb  # two seconds, which an encoder has no use for

    uri, options = lance_location(home)
    return lancedb.connect(uri, read_consistency_interval=timedelta(0), storage_options=options)


def has_table(home: StoragePath, name: str) -> bool:
    """Whether there is such a table. To look into a folder that is not there would make it."""
    return home.is_dir() and name in connect(home).list_tables(limit=1_000_000).tables


class Frozen:
    """A table as it is now, whatever is written to it later: what its indices cover is all there is to look through.

    Sent to other processes by pickle, it connects in each on first use.
    """

    def __init__(self, home: StoragePath, name: str) -> None:
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
