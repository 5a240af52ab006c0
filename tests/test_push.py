"""A table pushed to Pinecone's stand-in: the namespace is what the table is, whatever fails on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError, Pinecone, load
from pipeline.core.files import files_below
from pipeline.core.outcome import JobError
from pipeline.core.path import StoragePath, as_path, public_uri
from pipeline.data.partitions import content_id
from pipeline.index import pinecone_records, push, table
from pipeline.index.dead_letters import DeadLetters, Refused
from pipeline.index.pinecone_store import PineconeStore
from pipeline.index.pool import over_cluster
from pipeline.index.push import Push, push_over_cluster
from pipeline.index.table import StoreError
from pipeline.index.writer import Writer
from tests.bucket_servers import serving
from tests.conftest import progress
from tests.pinecone_server import Service, pinecone_server
from tests.test_pinecone import ALL_FAULTS, KEY
from tests.vector_table import ODD, Place, World, rows_of, vector_of

INDEX = "text-embedding-pipeline"


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    monkeypatch.setattr(table, "RANGE_ROWS", 8)


@pytest.fixture
def server() -> Iterator[Service]:
    with pinecone_server(KEY) as service:
        yield service


class Pushed(World):
    """A table, and the namespace that it is pushed to."""

    def __init__(self, server: Service, folder: StoragePath, namespace: str = "n", **settings: Any) -> None:
        super().__init__(folder / namespace)
        self.server, self.namespace = server, namespace
        self.letters = DeadLetters(folder / "letters" / namespace)
        self.open(**settings)

    def open(self, **settings: Any) -> None:
        chosen = {"host": self.server.url, "create": True, "requests_per_second": 5000.0, "max_attempts": 3}
        chosen |= {"settle_s": 0.0 if not self.server.lag_s else 30.0, "timeout_s": 5.0}
        self.store = PineconeStore(Pinecone(**{**chosen, **settings}), self.namespace, 5, backoff_s=0.005)
        self.store.create()

    def push(self, writer: Writer, spread: Callable[..., Any] = map, **options: Any) -> Counter[str]:
        return Push(writer, self.store, self.letters, spread, **options).run()

    @property
    def held(self) -> dict[str, Any]:
        return self.server.records[INDEX].get(self.namespace, {})

    def check(self, refused: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """The namespace holds each text once, with its vector and all of its places, and nothing else."""
        expected = {content_id([text]): text for text in self.documents}
        assert set(self.held) == set(expected) - refused
        for i, one in self.held.items():
            row, text = pinecone_records.to_row(i, one["metadata"]), expected[i]
            assert row["text"] == text
            assert [{**place, "metadata": json.loads(place["metadata"])} for place in row["places"]] == (
                self.documents[text]
            )
            assert row["places"][0] == {name: row[name] for name in ("source", "source_id", "metadata")}
            np.testing.assert_array_equal(np.float32(one["values"]), vector_of(text))

    def sent(self) -> list[str]:
        """The ids of all records that were upserted since the last call."""
        found = [i for ids in self.server.writes for i in ids]
        self.server.writes.clear()
        return found


@pytest.fixture
def world(server: Service, tmp_path: Path) -> Pushed:
    return Pushed(server, tmp_path)


def ids_of(texts: Iterable[str]) -> list[str]:
    return sorted(content_id([text]) for text in texts)


def killed_after(done: int) -> Callable[..., Any]:
    """Spreads work until so many items are done and noted."""

    def spread(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        yield from map(work, items[:done])
        if done < len(items):
            raise KilledError

    return spread


@contextmanager
def kills(world: Pushed, writer: Writer) -> Iterator[str]:
    """Ends a push before or after one of its next steps of a kind."""
    chance = world.chance
    target, name = chance.choice(
        [
            (world.store, "upsert"),
            (world.store, "delete"),
            (world.store, "count"),
            (writer, "tag"),
            (writer, "untag"),
        ]
    )
    step, left, after = getattr(target, name), chance.randrange(3), chance.random() < 0.5

    def counted(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 and not after:
            raise KilledError
        found = step(*args)
        if left < 0:
            raise KilledError
        return found

    with patch.object(target, name, counted):
        yield name


class TestDifference:
    def test_only_what_changed_is_sent_and_the_namespace_is_listed_once(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(300))
            assert world.push(writer) == Counter({"upserted": 300, "deleted": 0, "refused": 0})
            assert sorted(world.sent()) == ids_of(world.documents)
            world.check()
            assert server.count("vectors/list") == 1
            new, changed, gone = world.new(3), {text: [world.place()] for text in world.some(4)}, world.some(20)
            gone = [text for text in gone if text not in changed]
            world.add(writer, new)
            world.change(writer, changed)
            world.remove(writer, gone)
            assert world.push(writer) == Counter({"upserted": 7, "deleted": len(gone), "refused": 0})
            assert sorted(world.sent()) == ids_of([*new, *changed])
            world.check()
            assert server.count("vectors/list") == 1

    def test_a_push_of_nothing_reads_a_count_and_a_sample(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(50))
            world.push(writer)
        server.requests.clear()
        with world.table.writing() as writer:  # another version with the same rows
            assert not world.push(writer)
        asked = {what for _, what in server.requests}
        assert asked == {"describe_index_stats", "vectors/fetch"}
        assert len(server.requests) == 4

    def test_compaction_sends_nothing(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            for _ in range(4):
                world.add(writer, world.new(10))
            world.push(writer)
            world.sent()
            fragments = len(world.table.open().get_fragments())
            world.table.open().optimize.compact_files()
            assert len(world.table.open().get_fragments()) < fragments
            counts = world.push(writer)
        assert (counts["upserted"], counts["deleted"], world.sent()) == (0, 0, [])
        assert server.count("vectors/list") == 1

    def test_empty_tables_and_tables_that_become_empty(self, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.push(writer)
            world.add(writer, world.new(20))
            world.push(writer)
            world.check()
            world.remove(writer, list(world.documents))
            assert world.push(writer)["deleted"] == 20
            world.check()

    def test_a_table_that_grows_and_shrinks(self, world: Pushed) -> None:
        with world.table.writing() as writer:
            for count in (5, 10, 40, 200):
                world.add(writer, world.new(count))
                world.sent()
                world.push(writer)
                assert len(world.sent()) == count
                (name,) = world.table.open().tags.list()
                assert name.startswith("pushed-")
                world.check()
            world.remove(writer, list(world.documents)[:250])
            world.push(writer)
            world.check()

    def test_a_table_in_a_bucket(self, server: Service, tmp_path: Path) -> None:
        with serving("s3", "bucket", tmp_path) as bucket:
            world = Pushed(server, as_path(bucket.uri("run")))
            with world.table.writing() as writer:
                world.add(writer, world.new(20))
                server.poison = {content_id([min(world.documents)])}
                with pytest.raises(KilledError):
                    world.push(writer, killed_after(2))
                world.push(writer)
                world.check(server.poison)
                world.step(writer)
                server.poison = set()
                world.push(writer)
                world.check()
                assert world.letters.ids() == set()
                assert world.table.pinned_bytes() == 0
        assert server.count("vectors/list") == 1

    def test_random_changes_with_kills_anywhere(
        self, server: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(push, "ROWS_AT_ONCE", 2)
        world, killed = Pushed(server, tmp_path), Counter[str]()
        with world.table.writing() as writer:
            for _ in range(80):
                world.step(writer)
                if world.chance.random() < 0.6:
                    try:
                        with kills(world, writer) as name:
                            world.push(writer)
                    except KilledError:
                        killed[name] += 1
                        continue
                else:
                    world.push(writer)
                world.check()
            world.push(writer)
            world.check()
        assert set(killed) == {"upsert", "delete", "tag", "untag", "count"}
        assert killed.total() > 20
        assert len(world.documents) > 20
        assert server.count("vectors/list") == 1


class TestKilled:
    def test_between_ranges_it_goes_on_with_those_that_are_left(self, server: Service, tmp_path: Path) -> None:
        world, alone = Pushed(server, tmp_path), Pushed(server, tmp_path, "alone")
        documents = world.new(100)
        with world.table.writing() as writer, alone.table.writing() as other:
            world.add(writer, documents)
            alone.add(other, documents)
            alone.push(other)
            world.sent()
            with pytest.raises(KilledError):
                world.push(writer, killed_after(7))
            first = world.sent()
            assert 20 < len(first) < 80
            world.push(writer)
            assert sorted([*first, *world.sent()]) == ids_of(documents)
            world.check()
            assert world.held == alone.held
        assert server.count("vectors/list") == 2  # one each

    def test_what_it_sent_of_a_range_and_has_vanished_since_is_deleted(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(60))
            world.push(writer)
            more = world.new(60)
            world.add(writer, more)

            def spread(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
                for item in items:
                    work(item)  # all is sent, and nothing noted
                raise KilledError
                yield

            with pytest.raises(KilledError):
                world.push(writer, spread)
            assert set(ids_of(more)) <= set(world.held)
            world.remove(writer, list(more))
            world.push(writer)
            world.check()
        assert server.count("vectors/list") == 1

    def test_while_it_lists_it_lists_again(self, server: Service, tmp_path: Path) -> None:
        world, before = Pushed(server, tmp_path), Pushed(server, tmp_path)
        with before.table.writing() as writer:
            before.add(writer, before.new(250))
            before.push(writer)
        world.table = World(tmp_path / "other").table
        with world.table.writing() as writer:
            world.add(writer, world.new(30))

            def first_page() -> Iterator[list[str]]:
                yield next(PineconeStore.ids(world.store))
                raise KilledError

            with patch.object(world.store, "ids", first_page), pytest.raises(KilledError):
                world.push(writer)
            assert world.push(writer) == Counter(upserted=30, deleted=220)  # the same 30 texts are in both
            world.check()


class TestFaults:
    def test_a_fifth_of_all_requests_failing_and_reads_that_lag(self, tmp_path: Path) -> None:
        with pinecone_server(KEY, seed=5) as server:
            server.lag_s = 0.5
            world = Pushed(server, tmp_path, max_attempts=12, timeout_s=1.0, batch_rows=10)
            server.faults = {kind: 0.2 / len(ALL_FAULTS) for kind in ALL_FAULTS}
            with world.table.writing() as writer:
                world.add(writer, world.new(120))
                world.push(writer)
                world.check()
                listed = server.count("vectors/list")
                for _ in range(6):
                    world.step(writer)
                    world.push(writer)
                    world.check()
            assert server.count("vectors/list") == listed
            assert 0.1 < len(server.faulted) / len(server.requests) < 0.3
            assert not world.letters.ids()

    def test_reads_that_lag_longer_than_it_waits(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(10))
            server.lag_s = 1e6
            with pytest.raises(StoreError, match=r"holds 0 records, the table 10 rows, 0 s after the push .*again"):
                world.push(writer)
            server.lag_s = 0
            world.sent()
            world.push(writer)
            assert world.sent() == []
            world.check()
        assert server.count("vectors/list") == 1

    def test_metadata_that_reads_do_not_see_yet(self, server: Service, world: Pushed) -> None:
        """A push fails while reads show the old record, whose count is right; a push that waits for them does not."""
        with world.table.writing() as writer:
            world.add(writer, world.new(10))
            world.push(writer)
            server.lag_s = 1e6
            world.change(writer, {text: [world.place()] for text in world.documents})
            with pytest.raises(StoreError, match=r"has another version of record .*again"):
                world.push(writer)
            server.lag_s = 0
            world.push(writer)
            world.check()
            server.lag_s = 0.5
            world.open()  # with time to wait
            world.change(writer, {text: [world.place()] for text in world.documents})
            world.push(writer)
            assert server.visible(INDEX)["n"] == world.held
            world.check()

    def test_what_is_refused_is_set_aside_and_tried_again(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(40))
            bad = [*world.documents][:3]
            server.poison = set(ids_of(bad))
            assert world.push(writer) == Counter({"upserted": 37, "deleted": 0, "refused": 3})
            world.check(server.poison)
            letters = world.letters.read().to_pylist()
            assert sorted(one["id"] for one in letters) == ids_of(bad)
            assert all("not to our taste" in one["reason"] and one["attempts"] == 1 for one in letters)
            assert {one["text"] for one in letters} == set(bad)
            assert world.push(writer)["refused"] == 3  # again, and they are still there to be tried
            server.poison = {content_id([bad[0]])}
            world.remove(writer, [bad[1]])
            world.sent()
            assert world.push(writer) == Counter({"upserted": 1, "deleted": 1, "refused": 1})
            assert world.sent() == ids_of([bad[2]])
            world.check(server.poison)
            server.poison = set()
            world.push(writer)
            world.check()
            assert not world.letters.ids()
            assert not list(world.letters.folder.iterdir())
        assert server.count("vectors/list") == 1

    def test_what_fails_all_is_one_sentence_and_nothing_is_noted(self, server: Service, world: Pushed) -> None:
        narrow = PineconeStore(world.store.settings, "n", 4, backoff_s=0.005)
        with world.table.writing() as writer:
            world.add(writer, world.new(20))
            with pytest.raises(StoreError, match=r"has 5 dimensions, the model 4; "):
                narrow.create()
            with pytest.raises(StoreError, match=r"takes vectors of 4 dimensions; found vectors of 5$"):
                Push(writer, narrow, world.letters, map).run()
            server.faults = {"403": 1.0}
            with pytest.raises(StoreError, match=r"^Pinecone denied the request \(403\): so it goes$"):
                world.push(writer)
            server.faults, server.key = {}, "another"
            with pytest.raises(StoreError, match=r"^Pinecone refused the key \(401\); check PINECONE_API_KEY"):
                world.push(writer)
            server.key = KEY
            assert not world.held
            world.push(writer)
            world.check()


class TestRepair:
    """What somebody else did to the namespace is found before the next push."""

    @pytest.fixture
    def world(self, server: Service, tmp_path: Path) -> Pushed:
        world = Pushed(server, tmp_path)
        with world.table.writing() as writer:
            world.add(writer, world.new(60))
            world.push(writer)
        return world

    def test_records_that_were_removed_or_added_or_overwritten(self, server: Service, world: Pushed) -> None:
        one = dict(world.held[min(world.held)])
        harms: list[Callable[[], object]] = [
            lambda: world.store.delete([min(world.held)]),
            lambda: server.write(INDEX, "n", {"it's foreign": one}),
            lambda: server.write(INDEX, "n", {max(world.held): one}),
            lambda: server.remove(INDEX),
        ]
        for harm in harms:
            harm()
            world.open()
            with world.table.writing() as writer:
                world.push(writer)
            world.check()
        assert server.count("vectors/list") == 1 + len(harms)

    def test_two_tables_that_are_pushed_to_one_namespace_in_turn(
        self, server: Service, world: Pushed, tmp_path: Path
    ) -> None:
        other = Pushed(server, tmp_path / "other")
        for _ in range(2):
            for each in (other, world):
                with each.table.writing() as writer:
                    each.step(writer)
                    each.push(writer)
                each.check()

    def test_a_namespace_of_others_is_left_alone(self, server: Service, world: Pushed, tmp_path: Path) -> None:
        other = Pushed(server, tmp_path / "other")
        with other.table.writing() as writer:
            other.add(writer, {"another text": [place("s", "1")], min(world.documents): [place("s", "1")]})
            words = (
                rf"^text-embedding-pipeline/n holds 60 records, and 59 of them are not in {other.table.path}; choose "
                r"another pinecone\.namespace, or set embedding\.max_deleted_fraction=1"
            )
            for _ in range(2):
                with pytest.raises(StoreError, match=words):
                    other.push(writer, max_deleted=0.98)
            world.check()
            assert other.push(writer, max_deleted=0.99) == Counter(upserted=2, deleted=59)
            other.check()

    def test_other_settings_send_all_again_and_so_does_changing_them_back(self, server: Service, world: Pushed) -> None:
        for settings, sizes in (({"text_bytes": 4}, {4}), ({}, {len(text) for text in world.documents})):
            world.open(**settings)
            world.sent()
            with world.table.writing() as writer:
                world.push(writer)
            assert len(world.sent()) == 60
            assert {len(one["metadata"]["text"]) for one in world.held.values()} == sizes
            names = world.table.open().tags.list()
            assert len([name for name in names if name.startswith("push")]) == 1

    def test_two_namespaces_of_one_table(self, server: Service, world: Pushed, tmp_path: Path) -> None:
        second = Pushed(server, tmp_path, "n")
        second.namespace, second.documents = "n2", world.documents
        second.open()
        for each in (second, world, second):
            with each.table.writing() as writer:
                world.add(writer, world.new(2))
                each.sent()
                each.push(writer)
            each.check()
        assert len(second.sent()) == 4

    def test_a_version_whose_files_are_gone(self, server: Service, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(2))
            for tag in world.table.open().tags.list().values():
                for file in (world.table.path / "_versions").glob(f"{2**64 - 1 - tag['version']:020}.manifest"):
                    file.unlink()
            world.push(writer)
        world.check()
        assert server.count("vectors/list") == 2


def test_tags_keep_files_until_the_next_push(world: Pushed) -> None:
    with world.table.writing() as writer:
        world.add(writer, world.new(20))
        world.push(writer)
        assert world.table.pinned_bytes() == 0
        old = {path.name: path.stat().st_size for path in (world.table.path / "data").iterdir()}
        world.remove(writer, list(world.documents))
        assert world.table.pinned_bytes() == sum(old.values())
        world.push(writer)
        assert world.table.pinned_bytes() == 0


def test_float16_vectors_are_sent_as_numbers(world: Pushed, tmp_path: Path) -> None:
    world.table = World(tmp_path / "small", vector_type="float16").table
    with world.table.writing() as writer:
        world.add(writer, world.new(5))
        world.push(writer)
    for text in world.documents:
        sent = world.held[content_id([text])]["values"]
        assert np.float16(sent).tolist() == vector_of(text).astype(np.float16).tolist()


class TestPlaces:
    def test_a_filter_finds_a_text_by_any_of_its_places(self, world: Pushed) -> None:
        with world.table.writing() as writer:
            world.add(writer, {"both": [place("s", ODD[0], n=1, tag="x", even=True), place("t", ODD[1], n=2, tag="y")]})
            world.add(writer, {"one": [place("s", ODD[2], n=2, tag="x")]})
            world.push(writer)
        asked: dict[str, tuple[dict[str, Any], set[str]]] = {
            "source": ({"source": "t"}, {"both"}),
            "source_id": ({"source_id": [ODD[1], ODD[2]]}, {"both", "one"}),
            "texts that differ": ({"tag": "y"}, {"both"}),
            "numbers that differ": ({"n": 2}, {"both", "one"}),
            "bounds": ({"n": {"lt": 2}}, {"both"}),
            "what one place has": ({"even": True}, {"both"}),
            "two conditions, met by one place": ({"source": "s", "n": 1}, {"both"}),
            "two conditions, met by two places": ({"source": "t", "tag": "x"}, set()),
        }
        for name, (where, found) in asked.items():
            for k in (1, 2, 10):
                rows = world.store.query(vector_of("both"), k, where)
                assert {row["text"] for row in rows} <= found, name
                assert len(rows) == min(k, len(found)), name

    def test_conditions_that_the_filter_cannot_say_are_met_all_the_same(self, world: Pushed) -> None:
        with world.table.writing() as writer:
            for n in range(40):  # each passes the filter, and only the last meets the conditions
                world.add(writer, {f"text {n}": [place("s", f"{n}", n=n), place("t", f"{n}", n=n + 1)]})
            world.push(writer)
        (row,) = world.store.query(-vector_of("text 39"), 1, {"source": "t", "n": {"gte": 40}})
        assert row["source_id"] == "39"

    def test_random_queries_find_what_brute_force_finds(self, server: Service, tmp_path: Path) -> None:
        world, found = Pushed(server, tmp_path), 0
        with world.table.writing() as writer:
            for _ in range(20):
                world.step(writer)
                world.push(writer)
        choices: dict[str, list[Any]] = {
            "source": ["s", ["s", "t"]],
            "size": [1, 2.5, [1, 30], {"gte": 2.5}, {"gt": 1, "lt": 30}],
            "tag": ["a", "b", ["b", "x"]],
            "new": [True, False],
        }
        for _ in range(60):
            keys = world.chance.sample(sorted(choices), world.chance.randrange(4))
            where, k = {key: world.chance.choice(choices[key]) for key in keys}, world.chance.choice([1, 3, 20])
            query = vector_of(f"{world.chance.random()}")
            good = [text for text, places in world.documents.items() if any(meets(one, where) for one in places)]
            scores = {text: float(unit(vector_of(text)) @ unit(query)) for text in good}
            best = sorted(scores, key=lambda text: -scores[text])[:k]
            rows = world.store.query(query, k, where)
            assert [row["text"] for row in rows] == best
            assert [row["score"] for row in rows] == pytest.approx([scores[text] for text in best], abs=1e-6)
            found += len(best)
        assert max(map(len, world.documents.values())) > 2
        assert found > 100

    def test_nan_and_infinities_become_null(self, world: Pushed) -> None:
        numbers = {"a": float("nan"), "b": {"c": [float("inf"), 1]}, "d": 2.5}
        with world.table.writing() as writer:
            world.add(
                writer, {"one": [place("s", "1", **numbers)], "two": [place("s", "1", **numbers), place("s", "2")]}
            )
            world.push(writer)
        for one in world.store.fetch(list(world.held)).values():
            assert json.loads(one["metadata"]) == {"a": None, "b": {"c": [None, 1]}, "d": 2.5}
        assert "NaN" not in json.dumps(world.held)
        assert "Infinity" not in json.dumps(world.held)

    def test_of_very_many_places_the_first_are_kept(self, world: Pushed) -> None:
        places = [place("s", f"{'x' * 40}{n}", line=n, file=f"file {n}") for n in range(2_000)]
        with world.table.writing() as writer:
            world.add(writer, {"t" * 20_000: places})
            assert world.push(writer) == Counter({"upserted": 1, "deleted": 0, "refused": 0})
        ((_, row),) = world.store.fetch(list(world.held)).items()
        kept = [{**each, "metadata": json.loads(each["metadata"])} for each in row["places"]]
        assert 50 < len(kept) < 2_000
        assert kept == places[: len(kept)]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


def meets(one: Place, where: dict[str, Any]) -> bool:
    """Whether a place meets all conditions, spelt out."""
    for key, wanted in where.items():
        value = one[key] if key in one else one["metadata"].get(key)
        if isinstance(wanted, dict):
            signs = {"gt": float.__gt__, "gte": float.__ge__, "lt": float.__lt__, "lte": float.__le__}
            if not all(signs[sign](float(value), float(bound)) for sign, bound in wanted.items()):
                return False
            continue
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        values = value if texts else [] if isinstance(value, list) else [value]
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if not any(item == each and type(item) is type(each) for item in values for each in allowed):
            return False
    return True


def place(source: str, source_id: str, **metadata: Any) -> dict[str, Any]:
    return {"source": source, "source_id": source_id, "metadata": metadata}


class TestImport:
    """The first load of a namespace from Parquet files that the service reads by itself."""

    @pytest.fixture
    def world(self, server: Service, tmp_path: Path) -> Pushed:
        server.bucket = read_folder
        return Pushed(server, tmp_path, import_integration="our-bucket")

    def test_fills_a_new_namespace_and_pushes_what_comes_later(
        self, server: Service, world: Pushed, tmp_path: Path
    ) -> None:
        with serving("s3", "bucket", tmp_path) as bucket, world.table.writing() as writer:
            server.bucket = lambda uri: read_folder(uri + bucket.options)
            world.add(writer, world.new(150))
            home = as_path(bucket.uri("loads"))
            assert world.push(writer, imports=home) == Counter(upserted=150)
            world.check()
            (state,) = server.imports.values()
            assert state["body"]["integrationId"] == "our-bucket"
            assert state["body"]["errorMode"] == {"onError": "abort"}
            assert state["uri"].startswith("s3://bucket/loads/t-")
            assert world.sent() == []
            assert not files_below(home)
            world.add(writer, world.new(2))
            assert world.push(writer, imports=home) == Counter(upserted=2)
            world.check()
        assert len(server.imports) == 1

    def test_killed_it_writes_the_rest_and_waits_for_an_import_that_runs(
        self, server: Service, world: Pushed, tmp_path: Path
    ) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(100))
            with pytest.raises(KilledError):
                world.push(writer, killed_after(5), imports=tmp_path / "loads")
            before = {path: path.stat().st_mtime_ns for path in (tmp_path / "loads").rglob("*.parquet")}
            assert len(before) == 5
            with patch.object(world.store, "await_import", side_effect=KilledError), pytest.raises(KilledError):
                world.push(writer, imports=tmp_path / "loads")
            assert all(path.stat().st_mtime_ns == at for path, at in before.items())
            world.push(writer, imports=tmp_path / "loads")
            world.check()
        assert len(server.imports) == 1
        assert world.sent() == []

    def test_one_that_fails_is_a_sentence_and_the_next_push_upserts(
        self, server: Service, world: Pushed, tmp_path: Path
    ) -> None:
        with world.table.writing() as writer:
            world.add(writer, world.new(10))
            one = {"values": [1.0] * 5, "metadata": {}}

            def interrupted(uri: str) -> dict[str, list[dict[str, Any]]]:
                server.write(INDEX, "n", {ids_of(world.documents)[0]: one})
                return read_folder(uri)

            server.bucket = interrupted
            words = r"^Pinecone's import of file://\S+ failed: namespace n exists; run the same command again"
            with pytest.raises(StoreError, match=words):
                world.push(writer, imports=tmp_path)
            assert world.push(writer, imports=tmp_path) == Counter(upserted=10)
        world.check()
        assert len(server.imports) == 1

    def test_lost_replies_start_no_second_import(self, server: Service, world: Pushed, tmp_path: Path) -> None:
        world.open(max_attempts=30)
        with world.table.writing() as writer:
            world.add(writer, world.new(10))
            server.faults = {"cut-after": 0.5}
            world.push(writer, imports=tmp_path)
        assert len(server.imports) == 1
        world.check()

    def test_what_cannot_be_a_record_is_set_aside(self, world: Pushed, tmp_path: Path) -> None:
        big = place("s", "1", large="x" * 50_000)
        with world.table.writing() as writer:
            world.add(writer, {**world.new(10), "big": [big]})
            assert world.push(writer, imports=tmp_path) == Counter(upserted=10, refused=1)
        assert world.letters.ids() == {content_id(["big"])}
        world.check({content_id(["big"])})

    def test_a_namespace_that_is_there_is_upserted_to(self, server: Service, world: Pushed, tmp_path: Path) -> None:
        server.write(INDEX, "n", {"foreign": {"values": [1.0] * 5, "metadata": {}}})
        with world.table.writing() as writer:
            world.add(writer, world.new(10))
            assert world.push(writer, imports=tmp_path) == Counter(upserted=10, deleted=1)
        world.check()
        assert not server.imports


def test_folders_as_the_service_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "ours")
    names = {
        "s3://bucket/a/b?region=eu-west-1": "s3://bucket/a/b",
        "gs://bucket/a": "gs://bucket/a",
        "az://container/a": "https://ours.blob.core.windows.net/container/a",
        "az://container/a?account_name=theirs": "https://theirs.blob.core.windows.net/container/a",
    }
    assert {uri: public_uri(as_path(uri)) for uri in names} == names
    (tmp_path / "c.yaml").write_text("pinecone: {import_uri: a/folder}")
    with pytest.raises(ConfigError, match=r"pinecone\.import_uri"):
        load(tmp_path / "c.yaml", environ={})


def read_folder(uri: str) -> dict[str, list[dict[str, Any]]]:
    """The records in a folder of Parquet files, by namespace, as the service reads them."""
    home, found = as_path(uri), dict[str, list[dict[str, Any]]]()
    for name in files_below(home):
        namespace, _, file = name.partition("/")
        assert file.endswith(".parquet")
        with (home / name).open("rb") as opened:
            table = pq.read_table(pa.BufferReader(opened.read()))
        assert table.schema.names == ["id", "values", "metadata"]
        assert table.schema.field("values").type.value_type == pa.float32()
        rows = table.to_pylist()
        found.setdefault(namespace, []).extend({**row, "metadata": json.loads(row["metadata"])} for row in rows)
    return found


def test_over_a_cluster(server: Service, world: Pushed, tmp_path: Path, ray_cluster: str) -> None:
    (tmp_path / "api.env").write_text(f"PINECONE_API_KEY={KEY}")  # the workers' environment is older
    settings = {"host": server.url, "create": True, "namespace": "n", "requests_per_second": 40, "max_concurrency": 2}
    (tmp_path / "c.yaml").write_text(json.dumps({"pinecone": {**settings, "batch_rows": 5}}))
    config, letters = load(tmp_path / "c.yaml", [f"storage.root={tmp_path}"], environ={}), tmp_path / "letters"
    with world.table.writing() as writer:
        world.add(writer, world.new(100))
        server.work_s = 0.05
        server.poison = {content_id([min(world.documents)])}
        assert push_over_cluster(writer, config, letters, progress()) == Counter(upserted=99, refused=1)
        assert DeadLetters(letters).ids() == server.poison
        assert server.most_under_way == 2
        assert server.busiest(1.0) <= 40 + 1 + 2
        world.remove(writer, [min(world.documents)])
        world.step(writer)
        push_over_cluster(writer, config, letters, progress())
        world.check()
        server.remove(INDEX)
        (tmp_path / "c.yaml").write_text(json.dumps({"pinecone": {**settings, "create": False}}))
        config = load(tmp_path / "c.yaml", [f"storage.root={tmp_path}"], environ={})
        with pytest.raises(StoreError, match=r"^Pinecone has no index \S+; set pinecone.create=true"):
            push_over_cluster(writer, config, letters, progress())


def test_an_error_in_a_task_is_its_sentence(ray_cluster: str) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise StoreError("the third of them fails")
        return item

    assert sorted(over_cluster(work, [3, 4, 5])) == [3, 4, 5]
    assert list(over_cluster(work, [])) == []
    with pytest.raises(JobError, match=r"^the third of them fails$"):
        list(over_cluster(work, [1, 2, 3]))


@pytest.mark.parametrize(("rows", "count"), [(0, 1), (8, 1), (9, 2), (100, 13)])
def test_ranges_are_all_ids_once(tmp_path: Path, rows: int, count: int) -> None:
    world = World(tmp_path)
    with world.table.writing() as writer:
        world.add(writer, world.new(rows))
    found = world.table.ranges(world.table.version())
    assert len(found) == count
    assert (found[0][0], found[-1][1]) == ("", None)
    assert all(last == first for (_, last), (first, _) in pairwise(found))
    ends = [int(last or "100000000", 16) for _, last in found]
    assert ends == [-(2**32 * (n + 1) // -count) for n in range(count)]


def test_dead_letters_are_set_aside_read_and_dropped(tmp_path: Path) -> None:
    world, letters = World(tmp_path), DeadLetters(tmp_path / "dead")
    rows = rows_of(world.table, {text: [place("s", text)] for text in "abc"})
    a, b, _ = rows["id"].to_pylist()
    assert letters.ids() == set()
    letters.drop({a})
    assert letters.append(rows, []) == set()
    assert letters.append(rows, [Refused(a, "too slow", 6), Refused(b, "503", 6)]) == {a, b}
    assert letters.append(rows, [Refused(b, "still 503", 7)]) == {b}
    again = {one["id"]: one for one in letters.read().to_pylist()}
    assert {i: (one["reason"], one["attempts"]) for i, one in again.items()} == {
        a: ("too slow", 6),
        b: ("still 503", 7),
    }
    names = ("id", "source", "source_id", "text", "metadata")
    assert {name: again[a][name] for name in names} == rows.select(names).slice(0, 1).to_pylist()[0]
    letters.drop({"another"})
    letters.drop({a})
    assert letters.ids() == {b}
    letters.drop({b})
    assert letters.ids() == set()
    assert list((tmp_path / "dead").iterdir()) == []
