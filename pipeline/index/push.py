"""The vector table pushed to a namespace of Pinecone: what changed since the last push.

    with table.writing() as writer:
        counts = push_over_cluster(writer, config, letters, progress)  # {"upserted": 812, "deleted": 3, "refused": 0}

Tags of the table say what the namespace holds, so it is listed only once, before the first push:

    pushed-<place>-<settings>           the version that the namespace holds
    pushing-<place>-<settings>-<id>     the version that is being pushed, and up to which id that is done

Two versions are compared by id and digest, a range of ids a task, so compacted files cost no request. The rows of a
range are upserted, then what is gone is deleted, both idempotent. A push that was killed is finished first, from its
last range on and of the same version, before anything newer is sent.

Before a push, the count and a sample of the records are compared with the last pushed version. Where they differ,
because somebody else wrote to the namespace, it is listed and filled again. What Pinecone refuses is set aside and
tried again by the next push. Costs a request for 100 to 1,000 rows that changed, and four for a push of nothing.
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
from pipeline.core.files import files_below, remove_folder, replacing, sizes
from pipeline.core.path import StoragePath, public_uri
from pipeline.core.session import Progress
from pipeline.index.dead_letters import DeadLetters
from pipeline.index.pinecone_records import batched
from pipeline.index.pool import over_cluster
from pipeline.index.published import open_pinecone
from pipeline.index.table import IdRange, StoreError, VectorTable, tags_of
from pipeline.index.writer import Writer

if TYPE_CHECKING:
    from pipeline.index.pinecone_store import PineconeStore  # which imports the SDK

ROWS_AT_ONCE = 8_192  # read and sent together
LISTED_IDS = 50_000  # compared with the table together
SAMPLE = 100  # records that are read back: one request
Spread: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""What a function returns for each item, in any order, as soon as it is there: `over_cluster`, or `map`."""
IMPORT = pa.schema([("id", pa.string()), ("values", pa.list_(pa.float32())), ("metadata", pa.string())])


def push_over_cluster(writer: Writer, config: Config, letters: StoragePath, progress: Progress) -> Counter[str]:
    """Make the namespace of a table hold what the table holds. Returns the counts of `Push.run`.

    Rows that were refused lie under `letters` afterwards. Raises StoreError.
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
    """A push of a table, by the one process that holds it, to a store whose index is there."""

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
        """`imports` is where a namespace that does not exist is imported from; `report` is told of rows as they go.

        `max_deleted` is the share of a listed namespace that may be deleted because the table does not have it.
        """
        self.writer, self.table, self.store, self.letters = writer, writer.table, store, letters
        self.spread, self.imports, self.report, self.max_deleted = spread, imports, report, max_deleted
        self.place = f"-{_key(store.uri, store.settings.index, store.namespace)}-"
        settings = f"{self.place}{_key(store.settings.metadata, store.settings.text_bytes)}"
        self.pushed_tag, self.pushing_tag = f"pushed{settings}", f"pushing{settings}-"

    def run(self) -> Counter[str]:
        """Make the namespace hold what the table holds now. Returns counts of `upserted`, `deleted` and `refused`.

        Raises StoreError where the namespace as a whole fails, or does not show in time what was written.
        """
        self._forget(lambda name: not name.startswith((self.pushed_tag, self.pushing_tag)))  # with other settings
        counts, newest = Counter[str](), self.table.version()
        pushed, (half_done, _) = self._pushed(), self._pushing()
        if wrong := self._gone(pushed, half_done) or (self._wrong(pushed) if pushed and not half_done else ""):
            log.warning("%s; lists the namespace and sends all rows again", wrong)
            self._forget()
        elif half_done and half_done < newest:
            counts += self._bring_to(half_done)
        counts += self._bring_to(newest)
        if wrong := self._wrong(newest):
            raise StoreError(
                f"{wrong}, {self.store.settings.settle_s:g} s after the push (pinecone.settle_s); run the same command "
                "again in some minutes, which repairs the namespace if it is still so"
            )
        return counts

    # What the tags say.

    def _pushed(self) -> int | None:
        return tags_of(self.writer.dataset, self.pushed_tag).get(self.pushed_tag)

    def _pushing(self) -> tuple[int | None, str]:
        """The version that is being pushed, and the first id that is not done."""
        found = tags_of(self.writer.dataset, self.pushing_tag)
        return max(
            ((version, name.removeprefix(self.pushing_tag)) for name, version in found.items()), default=(None, "")
        )

    def _note(self, version: int, done: str) -> None:
        """Note that ids before `done` are those of a version."""
        self.writer.tag(f"{self.pushing_tag}{done}", version)
        self._forget(lambda name: name.startswith(self.pushing_tag) and name != f"{self.pushing_tag}{done}")

    def _forget(self, which: Callable[[str], bool] = lambda name: True) -> None:
        """Remove tags of this namespace: "pushed" before "pushing", which says that it is partial."""
        for name in sorted(tags_of(self.writer.dataset, "push")):
            if self.place in name and which(name):
                self.writer.untag(name)

    def _gone(self, *versions: int | None) -> str:
        for version in filter(None, versions):
            try:
                self.table.open(version)
            except (ValueError, OSError):
                return f"version {version} of the table is gone"
        return ""

    # A version of the table to the namespace.

    def _bring_to(self, version: int) -> Counter[str]:
        counts, refused, base = Counter[str](), set[str](), self._pushed()
        if self._pushing()[0] is None:
            if base is None:
                counts["deleted"] += self._delete_foreign(version)
            self._note(version, "")
        done = self._pushing()[1]
        again = sorted(i for i in self.letters.ids() if i >= done)
        parts = [(first, last) for first, last in self.table.ranges(version) if last is None or last > done]
        if base is not None and self.table.files(base) == self.table.files(version):
            parts = [
                (first, last) for first, last in parts if any(i >= first and (not last or i < last) for i in again)
            ]
        work = _Work(self.table, version, base, again, self.store, self.letters, self.report)
        if base is None and not done and self._imported(parts, work, counts):
            parts, again = [], []
        left, ended = list(parts), set[str]()
        for first, found, bad in self.spread(work, parts):
            counts.update(found)
            refused.update(bad)
            ended.add(first)
            while left and left[0][0] in ended:
                last = left.pop(0)[1]
                if last is not None:
                    self._note(version, last)
        self.writer.tag(self.pushed_tag, version)
        self._forget(lambda name: name != self.pushed_tag)
        self.letters.drop(set(again) - refused)
        return counts

    def _delete_foreign(self, version: int) -> int:
        """List the namespace, and delete what is not in the table."""
        log.info("lists the ids of %s, once", self.store.name)
        listed, foreign = 0, list[str]()
        for ids in batched(chain.from_iterable(self.store.ids()), LISTED_IDS):
            listed += len(ids)
            # The service sorts ids (Pinecone's guide to listing them), so that few other rows lie between.
            there = self.table.read(["id"], (min(ids), max(ids) + " "), version)["id"].to_pylist()
            foreign += set(ids).difference(there)
        if len(foreign) > self.max_deleted * listed:
            raise StoreError(
                f"{self.store.name} holds {listed:,} records, of which {len(foreign):,} are not in {self.table.path}; "
                "name another pinecone.namespace, or let them be deleted with embedding.max_deleted_fraction=1"
            )
        self.store.delete(foreign)
        return len(foreign)

    def _imported(self, parts: Sequence[IdRange], work: _Work, counts: Counter[str]) -> bool:
        """Fill a namespace by an import, if there is a bucket for it and the namespace does not exist yet."""
        if self.imports is None:
            return False
        if "/" in self.store.namespace:
            raise StoreError(f"pinecone.namespace: found {self.store.namespace}; an import takes none with /")
        folder = self.imports / f"{self.table.name}-{work.version}-{_key(str(self.table.path), self.pushed_tag)}"
        uri = public_uri(folder)
        # An import that has ended counts while its files are there: they are removed once it is noted as pushed.
        started = self.store.found_import(uri) if files_below(folder) else None
        if started is None:
            if not self.store.is_new():
                return False
            home = folder / self.store.namespace
            written = sizes([_import_file(home, part) for part in parts])
            left = [part for part, size in zip(parts, written, strict=True) if size is None]
            for found in self.spread(partial(work.to_file, home), left):
                counts.update(found)
            started = self.store.start_import(uri)
        log.info("Pinecone imports %s, which takes ten minutes at least", uri)
        self.store.await_import(started)
        self.writer.tag(self.pushed_tag, work.version)
        remove_folder(folder)
        return True

    # What the service shows.

    def _wrong(self, version: int) -> str:
        """How the namespace differs from a version of the table, once reads had time to catch up; "" if it does not."""
        dataset, refused = self.table.open(version), self.letters.ids()
        rows = int(dataset.count_rows())
        sample = dataset.sample(min(SAMPLE, rows), columns=["id", "digest"]).to_pylist() if rows else []
        wanted = {row["id"]: row["digest"] for row in sample if row["id"] not in refused}
        end, wait_s = time.monotonic() + self.store.settings.settle_s, self.store.backoff_s
        while (wrong := self._differs(rows, len(refused), wanted)) and time.monotonic() < end:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 5.0)
        return wrong

    def _differs(self, rows: int, refused: int, wanted: dict[str, str]) -> str:
        found = self.store.count()
        if not rows - refused <= found <= rows:
            return f"{self.store.name} holds {found:,} records, the table {rows:,} rows"
        there = self.store.fetch(list(wanted))
        for i, digest in wanted.items():
            if i not in there or there[i]["digest"] != digest:
                return f"{self.store.name} {'has no' if i not in there else 'has another'} record {i}"
        return ""


@dataclass(frozen=True)
class _Work:
    """What is done for a range of ids, in any process."""

    table: VectorTable
    version: int
    base: int | None
    """The version that the namespace holds there; None where it holds nothing that the table has not."""
    again: Sequence[str]
    """Ids that were refused before and are sent again."""
    store: PineconeStore
    letters: DeadLetters
    report: Callable[[int], object]

    def __call__(self, part: IdRange) -> tuple[str, dict[str, int], list[str]]:
        """Returns the first id of the range, counts, and the ids that were refused."""
        now = self.table.read(["id", "digest", "_rowid"], part, self.version)
        before = self.table.read(["id", "digest"], part, self.base) if self.base else now.slice(0, 0)
        same = pc.is_in(_with_digest(now), value_set=_with_digest(before))
        again = pc.is_in(now["id"], value_set=pa.array(self.again, pa.string()))
        due = now.filter(pc.or_(pc.invert(same), again))
        gone = before["id"].filter(pc.invert(pc.is_in(before["id"], value_set=now["id"].combine_chunks()))).to_pylist()
        refused: set[str] = set()
        for rows in self._rows(due):
            refused |= self.letters.append(rows, self.store.upsert(rows))
            self.report(len(rows))
        self.store.delete(gone)
        counts = {"upserted": len(due) - len(refused), "deleted": len(gone), "refused": len(refused)}
        return part[0], counts, sorted(refused)

    def to_file(self, home: StoragePath, part: IdRange) -> dict[str, int]:
        """Write a range as a file of Pinecone's import format. Returns counts."""
        refused = written = 0
        due = self.table.read(["id", "_rowid"], part, self.version)
        file = _import_file(home, part)
        with replacing(file) as temporary, pq.ParquetWriter(temporary, IMPORT, compression="zstd") as writer:
            for rows in self._rows(due):
                records, misfits = self.store.records(rows)
                refused += len(self.letters.append(rows, misfits))
                columns = [{**one, "metadata": json.dumps(one["metadata"], ensure_ascii=False)} for one in records]
                writer.write_table(pa.Table.from_pylist(columns, IMPORT))
                written += len(records)
                self.report(len(rows))
        return {"upserted": written, "refused": refused}

    def _rows(self, due: pa.Table) -> Iterator[pa.Table]:
        """Whole rows, in the order of their ids, so many at a time."""
        columns = [name for name in self.table.schema.names if name != "bits"]
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
