"""The single writer of a vector table, with commits that take effect exactly once.

    with table.writing() as writer:
        writer.append(table.write(rows))                    # one commit for many fragments
        writer.delete(row_ids)
        writer.mark_verified(documents.key)

Appends never conflict in Lance, so before a retry the writer looks for its commit in the newest version, in case only
the reply was lost. As a fence, a job starts writing with a `restore` of the newest version: it changes nothing, but
conflicts with every commit of an earlier writer, such as a paused one that lost its lock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import numpy as np

from pipeline.core.console import log
from pipeline.core.files import lance_location
from pipeline.core.path import check_guards
from pipeline.index.table import READ_FOR, VERIFIED, Fragment, StoreError, VectorTable, tags_of
from pipeline.index.words import SETTINGS

TAKEN_OVER = "another job has started to write to {}; run the same command again to continue"
COMMIT_ATTEMPTS = 5
DELETED_AT_ONCE = 100_000


class Writer:
    """Commits to a table from the process that holds its lock. Lance raises OSError and RuntimeError."""

    def __init__(self, table: VectorTable) -> None:
        self.table = table
        table.create()
        self.dataset = table.open()
        self.was_verified = table.is_verified(self.dataset)
        self._began = False

    def begin(self) -> None:
        """Make the commits of earlier writers fail."""
        if not self._began:
            check_guards(self.table.path)
            self.table.open().restore()
            self.dataset = self.table.open()
            self._began = True

    def append(self, fragments: Sequence[Fragment]) -> None:
        """Commit all fragments atomically and once, sorted by id so that the zone map can tell them apart."""
        import lance
        from lance.fragment import FragmentMetadata

        new = [FragmentMetadata.from_json(each.metadata) for each in sorted(fragments)]
        files = {file.path for each in new for file in each.files}
        uri, options = lance_location(self.table.path)
        tried = False

        def commit(dataset: Any) -> None:
            nonlocal tried
            if tried and files <= {file.path for each in dataset.get_fragments() for file in each.metadata.files}:
                return  # an earlier attempt committed them, but its reply was lost
            tried = True
            # Lance's own retries could commit twice if a reply is lost.
            operation = lance.LanceOperation.Append(new)
            lance.LanceDataset.commit(
                uri, operation, read_version=dataset.version, storage_options=options, max_retries=0
            )

        if new:
            self._commit(commit)

    def delete(self, row_ids: np.ndarray) -> None:
        """Delete rows by `_rowid`."""
        for start in range(0, len(row_ids), DELETED_AT_ONCE):
            batch = ", ".join(map(str, row_ids[start : start + DELETED_AT_ONCE].tolist()))
            self._commit(methodcaller("delete", f"_rowid IN ({batch})"))

    def index_words(self) -> None:
        """Build the full-text index; a verified table stays verified."""
        self._commit(methodcaller("create_scalar_index", "words", "INVERTED", **SETTINGS))
        if self.was_verified:
            for name in tags_of(self.dataset, VERIFIED):
                self.dataset.tags.update(name, self.dataset.version)

    def clean_up(self) -> None:
        """Remove untagged old versions, and files of killed jobs."""
        self.refresh()
        check_guards(self.table.path)
        self.dataset.cleanup_old_versions(READ_FOR, delete_unverified=True, error_if_tagged_old_versions=False)

    def drop_index(self, name: str) -> None:
        self._commit(methodcaller("drop_index", name))

    def mark_verified(self, documents: str) -> None:
        """Tag the newest version as holding exactly the documents with this key."""
        self.refresh()
        self.forget_verified()
        self.dataset.tags.create(VERIFIED + documents, self.dataset.version)

    def forget_verified(self) -> None:
        for name in tags_of(self.dataset, VERIFIED):
            self.untag(name)

    def refresh(self) -> None:
        """Open the newest version. Raises StoreError if another writer has started in the meantime."""
        import lance

        newest = self.table.open()
        behind = newest.version - self.dataset.version
        since = newest.get_transactions(behind) if behind > 0 else []
        if any(each and isinstance(each.operation, lance.LanceOperation.Restore) for each in since):
            raise StoreError(TAKEN_OVER.format(self.table.path))
        self.dataset = newest

    def tag(self, name: str, version: int) -> None:
        """Create or move a tag."""
        check_guards(self.table.path)
        try:
            self.dataset.tags.update(name, version)
        except ValueError:  # no such tag
            self.dataset.tags.create(name, version)

    def untag(self, name: str) -> None:
        check_guards(self.table.path)
        self.dataset.tags.delete(name)

    def _commit(self, commit: Callable[[Any], Any]) -> None:
        """Commit on top of the newest version, with retries.

        Raises LockLost or StoreError if another writer has started, or Lance's error of the last attempt.
        """
        from lance.commit import CommitConflictError

        self.begin()
        for attempt in range(1, COMMIT_ATTEMPTS + 1):
            check_guards(self.table.path)
            try:
                commit(self.dataset)
                break
            except (OSError, RuntimeError, CommitConflictError) as error:
                if "concurrent transaction Restore" in str(error):
                    raise StoreError(TAKEN_OVER.format(self.table.path)) from error
                if attempt == COMMIT_ATTEMPTS or "No space left on device" in str(error) or "os error 28" in str(error):
                    raise
                log.debug("%s: retrying a failed commit: %s", self.table.name, error)
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
                self.refresh()
        self.refresh()
