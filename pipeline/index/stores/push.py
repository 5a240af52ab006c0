"""The vector table pushed to a namespace of Pinecone: what changed since the last push, in ranges of ids.

    with table.writing() as writer:
        counts = Push(writer, store, letters, spread).run()     # {"upserted": 812, "deleted": 3, "refused": 0}

What the namespace holds is known from tags of the table, so it is listed only once, before the first push:

    pushing-<place>-<settings>          the version that is being pushed
    pushed-<place>-<settings>-21        the version of which the namespace holds the rows with ids from 9 up to a

A range is compared by id and digest with the version that its tag names, so compacted files cost no request. Its rows
are upserted, then what is gone is deleted, then its tag moves: a push that was killed goes on with the ranges that are
left, of the same version, before anything newer is sent. Upserts and deletes are idempotent.

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
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.index.stores.dead_letters import DeadLetters
from pipeline.index.stores.pinecone_records import grouped
from pipeline.index.stores.pinecone_store import PineconeStore
from pipeline.index.stores.store import StoreError
from pipeline.index.table import VectorTable, Writer
from pipeline.runtime.console import log
from pipeline.storage.files import files_below, remove_folder, replacing, sizes
from pipeline.storage.path import StoragePath, public_uri

RANGE_ROWS = 100_000  # at most, and a quarter of it at least: what a push that was killed sends again
MOST_DIGITS = 4  # of a range's name: 256 ranges
WAVE_ROWS = 8_192  # read and sent together
LISTED_IDS = 50_000  # compared with the table together
SAMPLE = 100  # records that are read back: one request
IMPORT = pa.schema([("id", pa.string()), ("values", pa.list_(pa.float32())), ("metadata", pa.string())])


class Spread(Protocol):
    """How work is spread: over the processes of a cluster, or one after the other by `map`."""

    def __call__(self, work: Callable[[Any], Any], items: Sequence[Any], /) -> Iterable[Any]:
        """What `work` returns for each item, as JSON has it, in any order, as soon as it is there."""


@dataclass(frozen=True)
class Range:
    """The rows with ids from `first` up to `last`, which is not among them."""

    name: str
    first: str
    last: str | None
    base: int | None = None
    """The version of which the namespace holds these rows; None where it holds none, or unknown ones."""
    refused: tuple[str, ...] = ()
    """Ids that were refused before and are sent again."""


def ranges(rows: int, digits: int = 0, most_digits: int = MOST_DIGITS) -> list[Range]:
    """All ids in 1, 4, 16 … ranges, of RANGE_ROWS rows or less if that many allow it, named by digits to base 4."""
    while rows > RANGE_ROWS * 4**digits and digits < most_digits:
        digits += 1
    names = ["".join(name) for name in product("0123", repeat=digits)]
    bounds = [f"{int(name.ljust(8, '0'), 4):04x}".rstrip("0") for name in names]  # ids begin with hexadecimal digits
    return [Range(*each) for each in zip(names, bounds, [*bounds[1:], None], strict=True)]


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
        place = _key(store.uri, store.settings.index, store.namespace)
        self.place = f"-{place}-"
        self.key = f"-{place}-{_key(store.settings.metadata, store.settings.text_bytes)}"

    def run(self) -> Counter[str]:
        """Make the namespace hold what the table holds now. Returns counts of `upserted`, `deleted` and `refused`.

        Raises StoreError where the namespace as a whole fails, or does not show in time what was written.
        """
        self._forget(lambda name: self.key not in name)
        counts: Counter[str] = Counter()
        half_done, newest = self._target(), self.table.version()
        if half_done is not None and not self._readable(half_done):
            self._forget()
        elif half_done is not None and half_done < newest:
            counts += self._bring_to(half_done)
        elif half_done is None and (pushed := self._pushed()):
            last = max(pushed.values())
            wrong = self._wrong(last) if self._readable(*pushed.values()) else f"version {last} of the table is gone"
            if wrong:
                log.warning("%s; lists the namespace and sends all rows again", wrong)
                self._forget()
        counts += self._bring_to(newest)
        if wrong := self._wrong(newest):
            raise StoreError(
                f"{wrong}, {self.store.settings.settle_s:g} s after the push (pinecone.settle_s); run the same command "
                "again in some minutes, which repairs the namespace if it is still so"
            )
        return counts

    # What the tags say.

    def _tags(self) -> dict[str, int]:
        """The tags of this namespace, whatever the settings it was pushed with."""
        return {name: tag["version"] for name, tag in self.writer.dataset.tags.list().items() if self.place in name}

    def _target(self) -> int | None:
        return self._tags().get(f"pushing{self.key}")

    def _pushed(self) -> dict[str, int]:
        """Version by name of a range."""
        start = f"pushed{self.key}-"
        return {name.removeprefix(start): version for name, version in self._tags().items() if name.startswith(start)}

    def _forget(self, which: Callable[[str], bool] = lambda name: True) -> None:
        for name in sorted(filter(which, self._tags())):  # "pushed" before "pushing", which says that they are partial
            self.writer.untag(name)

    def _readable(self, *versions: int) -> bool:
        try:
            return all(self.table.open(version) is not None for version in set(versions))
        except (ValueError, OSError):
            return False

    # A version of the table to the namespace.

    def _bring_to(self, version: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        if self._target() is None:
            if not self._pushed():
                counts["deleted"] += self._delete_foreign(version)
            self.writer.tag(f"pushing{self.key}", version)
        rows, digits = int(self.table.open(version).count_rows()), max(map(len, self._pushed()), default=0)
        parts = ranges(rows, digits)
        todo = self._todo(parts, version)
        work = _Work(self.table, version, self.store, self.letters, self.report)
        if todo and all(each.base is None for each in todo) and self._imported(todo, work, counts):
            todo = []
        done = {each.name: each for each in todo}
        for name, found, refused in self.spread(work, todo):
            counts.update(found)
            self._done(done[name], refused, version)
        names = {f"pushed{self.key}-{part.name}" for part in parts}
        self._forget(lambda name: name not in names)  # those of larger ranges, and what is pushed
        return counts

    def _todo(self, parts: Sequence[Range], version: int) -> list[Range]:
        """The ranges that may differ from what the namespace holds."""
        pushed, again = self._pushed(), sorted(self.letters.ids())
        same = {base for base in {*pushed.values()} if files_of(self.table, base) == files_of(self.table, version)}
        todo = []
        for part in parts:
            known = [part.name[:end] for end in range(len(part.name), -1, -1) if part.name[:end] in pushed]
            base = pushed[known[0]] if known else None
            refused = tuple(i for i in again if i >= part.first and (part.last is None or i < part.last))
            if base not in same or refused or known[0] != part.name:
                todo.append(replace(part, base=base, refused=refused))
        return todo

    def _done(self, part: Range, refused: Sequence[str], version: int) -> None:
        self.letters.drop({*part.refused}.difference(refused))
        self.writer.tag(f"pushed{self.key}-{part.name}", version)

    def _delete_foreign(self, version: int) -> int:
        """List the namespace, and delete what is not in the table."""
        log.info("lists the ids of %s, once", self.store.name)
        listed, foreign = 0, list[str]()
        for ids in grouped(chain.from_iterable(self.store.ids()), lambda i: 0, LISTED_IDS, 0):
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

    # The first load, by an import.

    def _imported(self, todo: Sequence[Range], work: _Work, counts: Counter[str]) -> bool:
        """Fill a namespace by an import, if there is a bucket for it and the namespace does not exist yet."""
        if self.imports is None:
            return False
        if "/" in self.store.namespace:
            raise StoreError(f"pinecone.namespace: found {self.store.namespace}; an import takes none with /")
        folder = self.imports / f"{self.table.name}-{work.version}-{_key(str(self.table.path), self.key)}"
        uri = public_uri(folder)
        # An import that has ended counts while its files are there: they are removed once the tags have moved.
        started = self.store.found_import(uri) if files_below(folder) else None
        if started is None and not self.store.is_new():
            return False
        if started is None:
            home = folder / self.store.namespace
            files = [_ImportFile(part, home / f"rows-{part.name}.parquet") for part in todo]
            there = sizes([each.file for each in files])
            left = [each for each, size in zip(files, there, strict=True) if size is None]
            for _, found, _ in self.spread(work.to_file, left):
                counts.update(found)
            started = self.store.start_import(uri)
        log.info("Pinecone imports %s, which takes ten minutes at least", uri)
        self.store.await_import(started)
        for part in todo:
            self._done(part, sorted(self.letters.ids()), work.version)
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
class _ImportFile:
    part: Range
    file: StoragePath


@dataclass(frozen=True)
class _Work:
    """What is done for a range, in any process. Returns its name, counts, and the ids that were refused."""

    table: VectorTable
    version: int
    store: PineconeStore
    letters: DeadLetters
    report: Callable[[int], object]

    def __call__(self, part: Range) -> tuple[str, dict[str, int], list[str]]:
        between = (part.first, part.last)
        now = self.table.read(["id", "digest", "_rowid"], between, self.version)
        before = now.select(["id", "digest"]).slice(0, 0)
        if part.base is not None:
            before = self.table.read(["id", "digest"], between, part.base)
        same = pc.is_in(_with_digest(now), value_set=_with_digest(before))
        again = pc.is_in(now["id"], value_set=pa.array(part.refused, pa.string()))
        due = now.filter(pc.or_(pc.invert(same), again))
        gone = before["id"].filter(pc.invert(pc.is_in(before["id"], value_set=now["id"].combine_chunks()))).to_pylist()
        refused: set[str] = set()
        for rows in self._rows(due):
            refused |= self.letters.append(rows, self.store.upsert(rows))
            self.report(len(rows))
        self.store.delete(gone)
        counts = {"upserted": len(due) - len(refused), "deleted": len(gone), "refused": len(refused)}
        return part.name, counts, sorted(refused)

    def to_file(self, each: _ImportFile) -> tuple[str, dict[str, int], list[str]]:
        """Write a range as a file of Pinecone's import format."""
        part, refused, written = each.part, set[str](), 0
        due = self.table.read(["id", "_rowid"], (part.first, part.last), self.version)
        with replacing(each.file) as temporary, pq.ParquetWriter(temporary, IMPORT, compression="zstd") as file:
            for rows in self._rows(due):
                records, misfits = self.store.records(rows)
                refused |= self.letters.append(rows, misfits)
                columns = [{**one, "metadata": json.dumps(one["metadata"], ensure_ascii=False)} for one in records]
                file.write_table(pa.Table.from_pylist(columns, IMPORT))
                written += len(records)
                self.report(len(rows))
        return part.name, {"upserted": written, "deleted": 0, "refused": len(refused)}, sorted(refused)

    def _rows(self, due: pa.Table) -> Iterator[pa.Table]:
        """Whole rows, in the order of their ids, so many at a time."""
        columns = [name for name in self.table.schema.names if name != "bits"]
        row_ids = due.sort_by("id")["_rowid"].to_pylist()
        for start in range(0, len(row_ids), WAVE_ROWS):
            some = ", ".join(map(str, row_ids[start : start + WAVE_ROWS]))
            batches = list(self.table.scan(columns, f"_rowid IN ({some})", self.version))
            yield pa.Table.from_batches(batches).sort_by("id").combine_chunks()


def files_of(table: VectorTable, version: int) -> set[str]:
    """The fragments of a version: two versions with the same ones hold the same rows."""
    fragments = table.open(version).get_fragments()
    return {json.dumps(fragment.metadata.to_json(), sort_keys=True) for fragment in fragments}


def pinned_bytes(table: VectorTable) -> int:
    """The size of files that only tagged versions use: what a push keeps until its next one."""
    versions = {tag["version"] for tag in table.open().tags.list().values()}
    newest, pinned = _file_bytes(table, None), dict[str, int]()
    for version in versions:
        pinned |= _file_bytes(table, version)
    return sum(size for path, size in pinned.items() if path not in newest)


def _file_bytes(table: VectorTable, version: int | None) -> dict[str, int]:
    fragments = table.open(version).get_fragments()
    return {file.path: file.file_size_bytes or 0 for each in fragments for file in each.metadata.files}


def _with_digest(rows: pa.Table) -> pa.Array:
    return pc.binary_join_element_wise(rows["id"], rows["digest"], " ", null_handling="replace").combine_chunks()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
