"""Pushes the vector table's changes since the last push to a Pinecone namespace.

    with table.writing() as writer:
        counts = push_over_cluster(writer, config, letters, progress)  # {"upserted": 812, "deleted": 3, "refused": 0}

Tags of the table record what the namespace holds, so it is listed only once, before the first push:

    pushed-<place>-<settings>           the version that the namespace holds
    pushing-<place>-<settings>-<id>     the version being pushed; ids before <id> are done

Tasks compare two versions by id and digest, one range of ids each, so compacted files cost no requests. For each range,
changed rows are upserted, then missing ones deleted; both are idempotent. A killed push is finished first, with the
same version and from its last range, before a newer version is pushed.

Before a push, the record count and a sample of records are compared with the last pushed version. If they differ,
because another program wrote to the namespace, all rows are pushed again. Rows that Pinecone refuses are set aside and
retried by the next push. Costs one request per 100 to 1,000 changed rows, and four if nothing changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.core.console import log
from pipeline.core.files import file_sizes, files_below, remove_folder, replacing
from pipeline.core.path import StoragePath, public_uri
from pipeline.core.session import Progress
from pipeline.index.dead_letters import DeadLetters
from pipeline.index.pinecone_records import batched
from pipeline.index.pool import over_cluster
from pipeline.index.published import open_pinecone
from pipeline.index.table import DERIVED, IdRange, StoreError, VectorTable, tags_of
from pipeline.index.writer import Writer

if TYPE_CHECKING:
    from pipeline.index.pinecone_store import PineconeStore  # which imports the SDK

ROWS_AT_ONCE = 8_192  # per read and upsert
LISTED_IDS = 50_000  # per comparison with the table
SAMPLE = 100  # records to read back, in one request
Spread: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Yields a function's result for each item, in any order: `over_cluster`, or `map`."""
IMPORT = pa.schema([("id", pa.string()), ("values", pa.list_(pa.float32())), ("metadata", pa.string())])


def push_over_cluster(writer: Writer, config: Config, letters: StoragePath, progress: Progress) -> Counter[str]:
    """Update the table's namespace to match the table. Returns the counts of `Push.run`.

    Refused rows are stored in the folder `letters`. Raises StoreError.
    """
    from pipeline.index.pinecone_client import SharedBudget

    settings, handle = config.pinecone, progress.handle
    imports = config.under_root(settings.import_uri) if settings.import_uri else None
    budget = SharedBudget(settings.requests_per_second, settings.max_concurrency, 2 * settings.timeout_s + 1)
    store = open_pinecone(config, writer.table, budget)
    store.create()

    def report(rows: int) -> None:
        handle.add.remote("pushed", rows)

    with progress.stage("push to Pinecone", None, "rows", counter="pushed"):
        most = config.embedding.max_deleted_fraction
        return Push(writer, store, DeadLetters(letters), over_cluster, imports, report, most).run()


class Push:
    """A push of a table to an existing index, by the table's writer."""

    def __init__(
        self,
        writer: Writer,
        store: PineconeStore,
        letters: DeadLetters,
        spread: Spread,
        imports: StoragePath | None = None,
        report: Callable[[int], object] = lambda rows: None,
        max_deleted: float = 1.0,
    ) -> None:
        """`imports` is the folder for importing a new namespace; `report` receives the number of rows pushed.

        `max_deleted` is the largest share of the namespace's records that may be deleted as not in the table.
        """
        self.writer, self.table, self.store, self.letters = writer, writer.table, store, letters
        self.spread, self.imports, self.report, self.max_deleted = spread, imports, report, max_deleted
        self.place = f"-{_key(store.uri, store.settings.index, store.namespace)}-"
        settings = f"{self.place}{_key(store.settings.metadata, store.settings.text_bytes)}"
        self.pushed_tag, self.pushing_tag = f"pushed{settings}", f"pushing{settings}-"

    def run(self) -> Counter[str]:
        """Update the namespace to the newest version. Returns counts of `upserted`, `deleted` and `refused`.

        Raises StoreError if requests fail permanently, or if reads do not show the written rows in time.
        """
        self._remove_tags(lambda name: not name.startswith((self.pushed_tag, self.pushing_tag)))  # of other settings
        counts, newest = Counter[str](), self.table.version()
        pushed, (unfinished, _) = self._pushed(), self._pushing()
        if fault := self._missing(pushed, unfinished) or (self._mismatch(pushed) if pushed and not unfinished else ""):
            log.warning("%s; listing the namespace and pushing all rows again", fault)
            self._remove_tags()
        elif unfinished and unfinished < newest:
            counts += self._push_version(unfinished)
        counts += self._push_version(newest)
        if fault := self._mismatch(newest):
            raise StoreError(
                f"{fault}, {self.store.settings.settle_s:g} s after the push (pinecone.settle_s); run the same command "
                "again in a few minutes to repair the namespace"
            )
        return counts

    # State in the table's tags.

    def _pushed(self) -> int | None:
        return tags_of(self.writer.dataset, self.pushed_tag).get(self.pushed_tag)

    def _pushing(self) -> tuple[int | None, str]:
        """The version being pushed, and the first id that is not done."""
        tags = tags_of(self.writer.dataset, self.pushing_tag)
        return max(
            ((version, name.removeprefix(self.pushing_tag)) for name, version in tags.items()), default=(None, "")
        )

    def _save_progress(self, version: int, done: str) -> None:
        """Record that ids before `done` are pushed."""
        self.writer.tag(f"{self.pushing_tag}{done}", version)
        self._remove_tags(lambda name: name.startswith(self.pushing_tag) and name != f"{self.pushing_tag}{done}")

    def _remove_tags(self, which: Callable[[str], bool] = lambda name: True) -> None:
        """Remove tags of this namespace, "pushed" before "pushing", so that a kill leaves the push unfinished."""
        for name in sorted(tags_of(self.writer.dataset, "push")):
            if self.place in name and which(name):
                self.writer.untag(name)

    def _missing(self, *versions: int | None) -> str:
        """A message if one of the versions no longer exists, else ""."""
        for version in filter(None, versions):
            try:
                self.table.open(version)
            except (ValueError, OSError):
                return f"version {version} of the table is gone"
        return ""

    # Writing to the namespace.

    def _push_version(self, version: int) -> Counter[str]:
        counts, refused, base = Counter[str](), set[str](), self._pushed()
        if self._pushing()[0] is None:
            if base is None:
                counts["deleted"] += self._delete_foreign(version)
            self._save_progress(version, "")
        done = self._pushing()[1]
        retried = sorted(i for i in self.letters.ids() if i >= done)
        parts = [(first, last) for first, last in self.table.ranges(version) if last is None or last > done]
        if base is not None and self.table.files(base) == self.table.files(version):
            parts = [
                (first, last) for first, last in parts if any(i >= first and (not last or i < last) for i in retried)
            ]
        work = _RangePush(self.table, version, base, retried, self.store, self.letters, self.report)
        if base is None and not done and self._imported(parts, work, counts):
            parts, retried = [], []
        remaining, ended = list(parts), set[str]()
        for first, range_counts, bad in self.spread(work, parts):
            counts.update(range_counts)
            refused.update(bad)
            ended.add(first)
            while remaining and remaining[0][0] in ended:
                last = remaining.pop(0)[1]
                if last is not None:
                    self._save_progress(version, last)
        self.writer.tag(self.pushed_tag, version)
        self._remove_tags(lambda name: name != self.pushed_tag)
        self.letters.drop(set(retried) - refused)
        return counts

    def _delete_foreign(self, version: int) -> int:
        """List the namespace, and delete records that are not in the table. Returns their number."""
        log.info("listing the ids of %s, once", self.store.name)
        listed, foreign = 0, list[str]()
        for ids in batched(chain.from_iterable(self.store.ids()), LISTED_IDS):
            listed += len(ids)
            # Pinecone lists ids in order (its guide), so few other rows are in this range.
            known = self.table.read(["id"], (min(ids), max(ids) + " "), version)["id"].to_pylist()
            foreign += set(ids).difference(known)
        if len(foreign) > self.max_deleted * listed:
            raise StoreError(
                f"{self.store.name} holds {listed:,} records, and {len(foreign):,} of them are not in "
                f"{self.table.path}; choose another pinecone.namespace, or set embedding.max_deleted_fraction=1 to "
                "delete them"
            )
        self.store.delete(foreign)
        return len(foreign)

    def _imported(self, parts: Sequence[IdRange], work: _RangePush, counts: Counter[str]) -> bool:
        """Fill a new namespace by an import, if the config names a bucket for it. Returns whether it did."""
        if self.imports is None:
            return False
        if "/" in self.store.namespace:
            raise StoreError(f"pinecone.namespace: found {self.store.namespace}; an import allows no / in it")
        folder = self.imports / f"{self.table.name}-{work.version}-{_key(str(self.table.path), self.pushed_tag)}"
        uri = public_uri(folder)
        # The files are removed once the version is tagged as pushed, so without files any earlier import is done.
        started = self.store.find_import(uri) if files_below(folder) else None
        if started is None:
            if not self.store.is_new():
                return False
            home = folder / self.store.namespace
            written = file_sizes([_import_file(home, part) for part in parts])
            missing = [part for part, size in zip(parts, written, strict=True) if size is None]
            for range_counts in self.spread(partial(work.to_file, home), missing):
                counts.update(range_counts)
            started = self.store.start_import(uri)
        log.info("Pinecone is importing %s, which takes at least ten minutes", uri)
        self.store.await_import(started)
        self.writer.tag(self.pushed_tag, work.version)
        remove_folder(folder)
        return True

    # Reading from the namespace.

    def _mismatch(self, version: int) -> str:
        """How the namespace differs from a version of the table, after waiting for reads to catch up; "" if equal."""
        dataset, refused = self.table.open(version), self.letters.ids()
        rows = int(dataset.count_rows())
        sample = dataset.sample(min(SAMPLE, rows), columns=["id", "digest"]).to_pylist() if rows else []
        digests = {row["id"]: row["digest"] for row in sample if row["id"] not in refused}
        end, wait_s = time.monotonic() + self.store.settings.settle_s, self.store.backoff_s
        while (fault := self._mismatch_now(rows, len(refused), digests)) and time.monotonic() < end:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 5.0)
        return fault

    def _mismatch_now(self, rows: int, refused: int, digests: dict[str, str]) -> str:
        count = self.store.count()
        if not rows - refused <= count <= rows:
            return f"{self.store.name} holds {count:,} records, the table {rows:,} rows"
        records = self.store.fetch(list(digests))
        for i, digest in digests.items():
            if i not in records or records[i]["digest"] != digest:
                return f"{self.store.name} {'lacks' if i not in records else 'has another version of'} record {i}"
        return ""


@dataclass(frozen=True)
class _RangePush:
    """Pushes one range of ids, in any process."""

    table: VectorTable
    version: int
    base: int | None
    """The version that the namespace holds; None if it holds no row that the table lacks."""
    retried: Sequence[str]
    """Ids that were refused before."""
    store: PineconeStore
    letters: DeadLetters
    report: Callable[[int], object]

    def __call__(self, part: IdRange) -> tuple[str, dict[str, int], list[str]]:
        """Push a range. Returns its first id, counts, and the refused ids."""
        now = self.table.read(["id", "digest", "_rowid"], part, self.version)
        before = self.table.read(["id", "digest"], part, self.base) if self.base else now.slice(0, 0)
        same = pc.is_in(_with_digest(now), value_set=_with_digest(before))
        retried = pc.is_in(now["id"], value_set=pa.array(self.retried, pa.string()))
        due = now.filter(pc.or_(pc.invert(same), retried))
        gone = before["id"].filter(pc.invert(pc.is_in(before["id"], value_set=now["id"].combine_chunks()))).to_pylist()
        refused: set[str] = set()
        for rows in self._rows(due):
            refused |= self.letters.append(rows, self.store.upsert(rows))
            self.report(len(rows))
        self.store.delete(gone)
        counts = {"upserted": len(due) - len(refused), "deleted": len(gone), "refused": len(refused)}
        return part[0], counts, sorted(refused)

    def to_file(self, home: StoragePath, part: IdRange) -> dict[str, int]:
        """Write a range to a file in Pinecone's import format. Returns counts."""
        refused = written = 0
        due = self.table.read(["id", "_rowid"], part, self.version)
        file = _import_file(home, part)
        with replacing(file) as temporary, pq.ParquetWriter(temporary, IMPORT, compression="zstd") as writer:
            for rows in self._rows(due):
                records, invalid = self.store.records(rows)
                refused += len(self.letters.append(rows, invalid))
                lines = [{**each, "metadata": json.dumps(each["metadata"], ensure_ascii=False)} for each in records]
                writer.write_table(pa.Table.from_pylist(lines, IMPORT))
                written += len(records)
                self.report(len(rows))
        return {"upserted": written, "refused": refused}

    def _rows(self, due: pa.Table) -> Iterator[pa.Table]:
        """Yield all columns of the rows, sorted by id, ROWS_AT_ONCE at a time."""
        columns = [name for name in self.table.schema.names if name not in DERIVED]
        row_ids = due.sort_by("id")["_rowid"].to_numpy()
        for start in range(0, len(row_ids), ROWS_AT_ONCE):
            yield (
                self.table.take(row_ids[start : start + ROWS_AT_ONCE], columns, self.version)
                .sort_by("id")
                .combine_chunks()
            )


def _import_file(home: StoragePath, part: IdRange) -> StoragePath:
    return home / f"rows-{part[0] or '0'}.parquet"


def _with_digest(rows: pa.Table) -> pa.Array:
    return pc.binary_join_element_wise(rows["id"], rows["digest"], " ", null_handling="replace").combine_chunks()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
