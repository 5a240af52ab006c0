"""All stores behave alike: one suite for LanceDB, Parquet and Pinecone, against a dict and brute force."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.config.pinecone import Pinecone
from pipeline.embedding.columns import as_column
from pipeline.embedding.stores.dead_letters import DeadLetters
from pipeline.embedding.stores.lancedb_store import LanceStore
from pipeline.embedding.stores.parquet_store import ParquetStore
from pipeline.embedding.stores.pinecone_store import PineconeStore
from pipeline.embedding.stores.store import SCHEMA, Refused, Store, StoreError
from pipeline.embedding.stores.where import parse
from pipeline.storage.path import as_path
from tests.bucket_servers import serving
from tests.pinecone_server import pinecone_server

WIDTH = 6
Make = Callable[..., Store]
Row = dict[str, Any]


@pytest.fixture(params=["lancedb", "parquet", "pinecone"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Opens the same store again and again."""
    place = str(tmp_path / "store")
    if request.param == "lancedb":
        yield lambda width=WIDTH: LanceStore(Path(place), "t", width)
    elif request.param == "parquet":
        yield lambda width=WIDTH: ParquetStore(place, "t", width)
    else:
        monkeypatch.setenv("PINECONE_API_KEY", "pc-test")
        with pinecone_server() as server:
            settings = Pinecone(host=server.url, create=True, requests_per_second=5000, batch_rows=40)
            yield lambda width=WIDTH: PineconeStore(settings, "t", width, backoff_s=0.01)


@pytest.fixture
def store(make: Make) -> Store:
    found = make()
    found.create()
    return found


@pytest.fixture
def parquet(tmp_path: Path) -> ParquetStore:
    found = ParquetStore(str(tmp_path), "t", WIDTH)
    found.create()
    return found


def row(i: str, chance: random.Random) -> Row:
    metadata = {
        "size": chance.choice([1, 2.5, 30]),
        "tag": chance.choice([["a", "b"], ["b", "ü"], "a", None, [1, "a"], []]),
        "new": chance.random() < 0.5,
        "deep": {"a": [1, {"b": None}]},
        "text": "its own",
        "large": 2**60 + 1,
    }
    return {
        "id": i,
        "vector": [round(chance.gauss(0, 1), 3) for _ in range(WIDTH)],
        "source": chance.choice(["books", "it's"]),
        "source_id": f"books:{i}",
        "text": chance.choice(["", "short", "ein längerer Text\nauf zwei Zeilen"]),
        "metadata": json.dumps({key: metadata[key] for key in chance.sample(sorted(metadata), 5)}),
    }


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA(WIDTH))


def rows_of(*ids: str) -> pa.Table:
    chance = random.Random(0)
    return table([row(i, chance) for i in ids])


def ids_of(store: Store) -> list[str]:
    return sorted(i for page in store.ids() for i in page)


def comparable(one: Row) -> Row:
    vector = np.asarray(one["vector"], np.float32).tolist() if "vector" in one else None
    return {**one, "vector": vector, "metadata": json.loads(one["metadata"])}


def stored(store: Store) -> dict[str, Row]:
    rows = [one for batch in store.scan(SCHEMA(WIDTH).names) for one in batch.to_pylist()]
    assert len(rows) == len({one["id"] for one in rows})
    return {one["id"]: comparable(one) for one in rows}


Keep = Callable[[Row, dict[str, Any]], bool]
"""Of a row and its metadata."""


def brute(rows: dict[str, Row], vector: np.ndarray, keep: Keep) -> list[tuple[str, float]]:
    """Ids and cosines in float64, the nearest first."""
    found = []
    for one in rows.values():
        own = np.asarray(one["vector"], np.float64)
        if keep(one, json.loads(one["metadata"])):
            found.append((one["id"], float(own @ vector / np.linalg.norm(own) / np.linalg.norm(vector))))
    return sorted(found, key=lambda pair: -pair[1])


CONDITIONS: list[tuple[dict[str, Any], Keep]] = [
    ({}, lambda r, m: True),
    ({"source": "it's"}, lambda r, m: r["source"] == "it's"),
    ({"source": ["books", "none"]}, lambda r, m: r["source"] == "books"),
    ({"new": True}, lambda r, m: m.get("new") is True),
    ({"size": 1}, lambda r, m: m.get("size") == 1),
    ({"size": {"gt": 1, "lte": 30}}, lambda r, m: 1 < m.get("size", 0) <= 30),
    ({"tag": "a"}, lambda r, m: m.get("tag") in ("a", ["a", "b"])),
    ({"tag": ["ü", "x"]}, lambda r, m: m.get("tag") == ["b", "ü"]),
    (
        {"source": "books", "size": {"gte": 2}, "new": False},
        lambda r, m: r["source"] == "books" and m.get("size", 0) >= 2 and m.get("new") is False,
    ),
    ({"nothing": "such"}, lambda r, m: False),
]


class TestBehaviour:
    def test_random_work_against_a_dict(self, make: Make) -> None:
        chance, model, store = random.Random(7), dict[str, Row](), make()
        assert not store.exists()
        store.create()
        assert store.exists()
        assert store.count() == 0
        ids = [f"id{n:03d}'" for n in range(150)]
        for step in range(14):
            some = chance.sample(ids, chance.randrange(1, 90))
            kind = chance.choice(["upsert", "upsert", "update", "delete"]) if step else "upsert"
            if kind == "delete":
                store.delete(some[:30])
                for i in some[:30]:
                    model.pop(i, None)
            else:
                rows = [row(i, chance) for i in some]
                if kind == "update":
                    assert store.update(table(rows).drop_columns(["vector"])) == []
                    model |= {r["id"]: {**r, "vector": model[r["id"]]["vector"]} for r in rows if r["id"] in model}
                else:
                    assert store.upsert(table(rows)) == []
                    model |= {r["id"]: r for r in rows}
            if step == 8:
                store.finish()
            if step % 3 == 0:
                store = pickle.loads(pickle.dumps(store))
            assert store.count() == len(model), (step, kind)
        store.finish()
        store.finish()
        assert stored(make()) == {i: comparable(one) for i, one in model.items()}
        assert ids_of(store) == sorted(model)
        asked = [*ids[:30], "not there", *ids[:2]]
        found = store.fetch(asked)
        assert found.schema.names == SCHEMA(WIDTH).names
        there = {i: comparable(model[i]) for i in asked if i in model}
        assert {one["id"]: comparable(one) for one in found.to_pylist()} == there
        assert len(found) == len(there)
        for where, keep in CONDITIONS:
            vector = np.array([chance.gauss(0, 1) for _ in range(WIDTH)])
            best = brute(model, vector, keep)
            for k in (1, 5, 400):
                got = store.query(vector, k, where)
                assert len(got) == min(k, len(best)), where
                np.testing.assert_allclose([one["score"] for one in got], [score for _, score in best[:k]], atol=1e-5)
                # Of equal scores either may come first; each id has its own score all the same.
                for one in got:
                    assert one.pop("score") == pytest.approx(dict(best)[one["id"]], abs=1e-5)
                    assert {**comparable(one), "vector": 0} == {**comparable(model[one["id"]]), "vector": 0}

    def test_nothing_in_it(self, store: Store) -> None:
        assert store.query(np.ones(WIDTH), 3) == []
        assert store.query(np.ones(WIDTH), 3, {"a": 1}) == []
        assert store.upsert(table([])) == []
        assert store.update(table([]).drop_columns(["vector"])) == []
        store.delete([])
        store.delete(["a"])
        assert len(store.fetch([])) == len(store.fetch(["a"])) == 0
        store.finish()
        assert list(store.ids()) == []
        assert {"rows": 0, "width": WIDTH}.items() <= store.describe().items()

    def test_rows_that_cannot_be_compared_are_refused_and_the_others_written(self, store: Store) -> None:
        rows = rows_of("good", "nan", "infinite", "zero", "none", "", "good2").to_pylist()
        rows[1]["vector"] = [float("nan")] * WIDTH
        rows[2]["vector"][3] = float("inf")
        rows[3]["vector"] = [0.0] * WIDTH
        rows[4]["vector"] = None
        refused = {one.id: one for one in store.upsert(table(rows))}
        words = {"nan": "NaN", "infinite": "infinity", "zero": "zero", "none": "no vector", "": "empty"}
        assert refused.keys() == words.keys()
        assert all(words[i] in one.reason and one.attempts == 0 for i, one in refused.items())
        assert ids_of(store) == ["good", "good2"]

    def test_of_an_id_that_comes_twice_the_last_row_counts(self, store: Store) -> None:
        store.upsert(rows_of("a", "a").set_column(4, "text", pa.array(["first", "last"])))
        assert [one["text"] for one in store.fetch(["a"]).to_pylist()] == ["last"]
        assert store.count() == 1

    def test_several_write_at_once(self, store: Store) -> None:
        store.finish()

        def write(worker: int) -> None:
            own = pickle.loads(pickle.dumps(store))
            for turn in range(4):  # half of what a worker writes, its neighbour writes too
                own.upsert(rows_of(*(f"{turn}-{n}" for n in range(worker * 10, worker * 10 + 20))))
                if worker == 1:
                    own.finish()
            own.delete([f"0-{worker * 10}"])

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(write, range(3)))
        # An id that one deletes may be written again by another, but never twice.
        expected = {f"{turn}-{n}" for turn in range(4) for n in range(40)}
        ids = ids_of(store)
        assert len(ids) == len(set(ids)) == store.count()
        assert expected - set(ids) <= {"0-0", "0-10", "0-20"}
        assert set(ids) <= expected

    def test_another_width_and_queries_that_are_none(self, make: Make, store: Store) -> None:
        store.upsert(rows_of("a"))
        with pytest.raises(StoreError, match=rf"vectors of {WIDTH} numbers; the model gives 9"):
            make(9).create()
        with pytest.raises(StoreError, match=r"takes vectors of 6 numbers; found vectors of 9"):
            store.upsert(rows_of("b").set_column(1, "vector", as_column(np.ones((1, 9)))))
        with pytest.raises(StoreError, match="found a query of 9"):
            store.query(np.ones(9), 1)
        for bad in (np.zeros(WIDTH), np.full(WIDTH, np.nan)):
            with pytest.raises(StoreError, match="the query's vector is zero or no number"):
                store.query(bad, 1)
        for where in ({"": 1}, {"$or": 1}, {"a": None}, {"a": []}, {"a": {"gt": "x"}}, {"a": {"beyond": 1}}, {"a": {}}):
            with pytest.raises(ConfigError, match="where: found"):
                store.query(np.ones(WIDTH), 1, where)
        assert store.count() == 1


@pytest.mark.parametrize("kind", [LanceStore, ParquetStore])
def test_what_is_not_there(kind: Any, tmp_path: Path) -> None:
    store = kind(tmp_path / "nowhere", "t", WIDTH)
    for ask in (store.count, lambda: store.fetch(["a"]), lambda: store.query(np.ones(WIDTH), 1)):
        with pytest.raises(StoreError, match=r"found no (table|folder) .*python jobs/embed.py makes it"):
            ask()
    assert not (tmp_path / "nowhere").exists()


class TestLance:
    def filled(self, place: Path, count: int = 1200, **options: Any) -> tuple[LanceStore, np.ndarray]:
        store, chance = LanceStore(place, "t", 32, **options), np.random.default_rng(0)
        vectors = chance.normal(size=(60, 32))[chance.integers(0, 60, count)] + 0.5 * chance.normal(size=(count, 32))
        store.create()
        ids = [str(n) for n in range(count)]
        columns = {"id": ids, "source_id": ids, "text": [f"text {n}" for n in ids], "metadata": ["{}"] * count}
        store.upsert(pa.table({**columns, "source": ["even", "odd"] * (count // 2), "vector": as_column(vectors)}))
        return store, vectors

    @pytest.mark.parametrize("index", ["ivf_sq", "ivf_pq", "ivf_hnsw_sq"])
    def test_a_large_table_is_indexed_and_its_recall_measured(self, index: str, tmp_path: Path) -> None:
        store, vectors = self.filled(tmp_path, index=index, index_rows=1200)
        assert "none" in store.describe()["index"]
        store.finish()
        facts = store.describe()
        assert facts["index"].lower().replace("_", "") == index.replace("_", "")
        assert 0.9 <= facts["recall@10"] <= 1
        # Brute force outside the store says what its own measurement should find.
        unit, shares = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), []
        for n in range(0, 1200, 40):
            true = set(np.argsort(-(unit @ unit[n]))[:10])
            shares.append(len({int(one["id"]) for one in store.query(vectors[n], 10)} & true) / 10)
        assert abs(np.mean(shares) - facts["recall@10"]) < 0.1
        assert [one["source"] for one in store.query(vectors[0], 40, {"source": "odd"})] == ["odd"] * 40
        new = store.fetch(["7"]).set_column(0, "id", pa.array(["new"]))
        store.upsert(new)  # found although the index does not know it yet
        assert {one["id"] for one in store.query(vectors[7], 2)} == {"7", "new"}

    def test_a_recall_below_one_is_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, _ = self.filled(tmp_path, count=600, index_rows=300)
        store.finish()
        found = store.query
        monkeypatch.setattr(store, "query", lambda vector, k: found(vector, k)[: k // 2])
        assert store.index_recall() == pytest.approx(0.4, abs=0.01)  # of eleven five, one of which is itself

    def test_hybrid_is_the_fusion_of_both_rankings(self, tmp_path: Path) -> None:
        store, _ = self.filled(tmp_path, count=40)
        vectors = np.eye(32)
        texts = {"near": "nothing of the kind", "words": "a zebra crossing", "both": "the zebra", "far": "else"}
        vector = np.array([1.0, *[0.1] * 31])
        rows = [
            {"id": i, "vector": vectors[0] if i in ("near", "both") else -vectors[0], "source": "s", "source_id": i}
            | {"text": text, "metadata": json.dumps({"n": n})}
            for n, (i, text) in enumerate(texts.items())
        ]
        store.delete([str(n) for n in range(40)])
        store.upsert(pa.Table.from_pylist(rows, SCHEMA(32)))
        by_vector = [one["id"] for one in store.query(vector, 10)]
        assert set(by_vector[:2]) == {"near", "both"}
        found = store.hybrid('"zebra" AND (', vector, 10)
        words = ["both", "words"]  # the shorter text first, by BM25
        fused = {i: sum(1 / (61 + ranking.index(i)) for ranking in (by_vector, words) if i in ranking) for i in texts}
        assert {one["id"]: pytest.approx(one["score"]) for one in found} == fused
        assert found[0]["id"] == "both"
        assert [one["id"] for one in store.hybrid("zebra", vector, 10, {"n": 1})] == ["words"]
        assert [one["id"] for one in store.hybrid("zebra", vector, 1, {"source": "s"})] == ["both"]
        assert len(store.hybrid("???", vector, 10)) == 4  # no words at all
        store.upsert(pa.Table.from_pylist([{**rows[0], "id": "late", "text": "zebra late"}], SCHEMA(32)))
        assert "late" in {one["id"] for one in store.hybrid("late", vector, 2)}

    def test_many_rows_that_meet_a_condition(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.embedding.stores.lancedb_store.SELECTIVE_ROWS", 50)
        store, vectors = self.filled(tmp_path, count=200)
        rows = store.fetch([str(n) for n in range(200)])
        metadata = [json.dumps({"n": int(i)}) for i in rows["id"].to_pylist()]
        store.update(rows.set_column(5, "metadata", pa.array(metadata)).drop_columns(["vector"]))
        for least in (10, 190):
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            scores, where = unit[least:] @ unit[3], {"n": {"gte": least}}
            got = [int(one["id"]) for one in store.query(vectors[3], 5, where)]
            assert got == (np.argsort(-scores)[:5] + least).tolist()
            assert all(int(one["id"]) >= least for one in store.hybrid("text", vectors[3], 5, where))

    def test_an_indexed_table_holds_an_id_once_however_many_write_it(self, tmp_path: Path) -> None:
        store, _ = self.filled(tmp_path, count=300, index_rows=300)
        store.finish()
        new = store.fetch([str(n) for n in range(50)])
        new = new.set_column(0, "id", pa.array([f"new{n}" for n in range(50)]))
        writers = [pickle.loads(pickle.dumps(store)) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda writer: writer.upsert(new), writers))
        assert store.count() == 350

    @pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
    def test_in_a_bucket(self, scheme: str, tmp_path: Path) -> None:
        with serving(scheme, "bucket", tmp_path) as served:
            home = as_path(served.uri("folder"))
            store = LanceStore(home, "t", WIDTH)
            assert not store.exists()
            with pytest.raises(StoreError, match=f"found no table t in {scheme}://bucket/folder"):
                store.count()
            store.create()
            rows = rows_of(*map(str, range(30)))
            store.upsert(rows.slice(0, 20))
            store.upsert(rows.slice(10))
            store.delete(["3"])
            store.finish()
            assert LanceStore(home, "t", WIDTH).count() == 29
            assert store.query(np.array(rows["vector"][7].as_py()), 1)[0]["id"] == "7"

    def test_tables_of_earlier_versions_go_on_and_those_of_other_programs_are_refused(self, tmp_path: Path) -> None:
        import lancedb

        lancedb.connect(str(tmp_path)).create_table("t", schema=SCHEMA(WIDTH))  # without a primary key
        store = LanceStore(tmp_path, "t", WIDTH)
        store.create()
        for _ in range(2):
            assert store.upsert(rows_of(*map(str, range(20)))) == []
        assert store.count() == 20
        lancedb.connect(str(tmp_path)).create_table("other", [{"id": "a", "vector": [1.0] * WIDTH}])
        with pytest.raises(StoreError, match="has no column source"):
            LanceStore(tmp_path, "other", WIDTH).create()


class TestParquet:
    def test_what_a_reader_finds_is_plain_parquet(self, parquet: ParquetStore, tmp_path: Path) -> None:
        parquet.upsert(rows_of(*"0123456789"))
        parquet.delete(["3"])
        parquet.finish()
        parquet.finish()
        (base,) = (tmp_path / "t").iterdir()
        assert base.suffix == ".base"
        assert sorted(pq.read_table(base)["id"].to_pylist()) == [*"012456789"]

    def test_a_number_that_a_base_took_is_not_written_again(self, parquet: ParquetStore, tmp_path: Path) -> None:
        """A writer that looked before others wrote and `finish` tidied up, and writes only then."""
        late = ParquetStore(str(tmp_path), "t", WIDTH)
        listed, looks = late._all, [late._all()]
        parquet.upsert(rows_of("a"))
        parquet.finish()
        parquet.finish()
        late._all = lambda: looks.pop() if looks else listed()  # type: ignore[method-assign]
        late.upsert(rows_of("b"))
        assert ids_of(parquet) == ["a", "b"]

    def test_what_comes_while_the_folder_is_listed_is_not_lost(self, parquet: ParquetStore, tmp_path: Path) -> None:
        """Of two files that come while a folder is read, a listing may have the second alone."""
        looking, listed = ParquetStore(str(tmp_path), "t", WIDTH), parquet._all

        def beside(missed: bool) -> Any:
            def listing() -> list[Any]:
                found = listed()
                looking._all = listed  # type: ignore[method-assign]
                before = parquet.count()
                parquet.upsert(rows_of(f"{before} first"))
                parquet.upsert(rows_of(f"{before} second"))
                return [*found, max(listed())] if missed else found

            return listing

        for turn, missed in enumerate((False, True, False, True)):
            looking._all = beside(missed)  # type: ignore[method-assign]
            looking.finish()
            assert looking.count() == parquet.count() == 2 * turn + 2
        looking._all = beside(True)  # type: ignore[method-assign]
        assert looking.count() == 10

    def test_a_file_that_was_lost_is_named(self, parquet: ParquetStore, tmp_path: Path) -> None:
        for name in "abc":
            parquet.upsert(rows_of(name))
        (tmp_path / "t" / "000000000002.parquet").unlink()
        for ask in (parquet.count, parquet.finish, lambda: parquet.upsert(rows_of("d"))):
            with pytest.raises(StoreError, match=r"found no .*000000000002\.parquet, but files that came after it"):
                ask()

    def test_a_write_that_fails_leaves_nothing(self, parquet: ParquetStore, tmp_path: Path) -> None:
        parquet.upsert(rows_of("a"))
        full = OSError(28, "No space left on device")
        with patch("os.link", side_effect=full), pytest.raises(OSError, match="No space"):
            parquet.upsert(rows_of("b"))
        assert ids_of(parquet) == ["a"]
        assert len(list((tmp_path / "t").iterdir())) == 1

    def test_a_reader_goes_on_while_it_is_tidied_up(self, parquet: ParquetStore) -> None:
        for part in range(3):
            parquet.upsert(rows_of(*(f"{part}-{n}" for n in range(5))))
        reader = parquet.ids()
        first = next(reader)
        parquet.finish()
        assert len(first) + sum(map(len, reader)) == 15


def test_dead_letters_are_set_aside_read_and_dropped(tmp_path: Path) -> None:
    letters, rows = DeadLetters(tmp_path / "dead", WIDTH), rows_of("a", "b", "")
    assert letters.count() == 0
    letters.drop({"a"})
    assert letters.append(rows, []) == set()
    assert letters.append(rows, [Refused("a", "too slow", 6), Refused("", "503", 6)]) == {"a", ""}
    later = [Refused("", "still 503", 7), Refused("x", "?", 0)]
    assert letters.append(rows.drop_columns(["vector"]), later) == {""}
    again = {one["id"]: one for one in letters.read().to_pylist()}
    read = {i: (one["reason"], one["attempts"]) for i, one in again.items()}
    assert read == {"a": ("too slow", 6), "": ("still 503", 7)}
    assert again[""]["vector"] is None
    kept = {name: again["a"][name] for name in SCHEMA(WIDTH).names}
    assert comparable(kept) == comparable(rows.slice(0, 1).to_pylist()[0])
    letters.drop({"a"})
    assert letters.read()["id"].to_pylist() == [""]
    letters.drop({""})
    assert letters.count() == 0
    assert list((tmp_path / "dead").iterdir()) == []


def test_conditions_as_they_are_written() -> None:
    written = ["source=debian", "a = [x, 2]", "n>=10", "n<20.5", 't="1"', "b=true", "u=a=b"]
    meant = {"source": "debian", "a": ["x", 2], "n": {"gte": 10, "lt": 20.5}, "t": "1", "b": True, "u": "a=b"}
    assert parse(written) == meant
    assert parse([]) == {}
    for wrong in ("source", "=x", "a=", "n>=x", "a=[", "a={b: 1}", "a=null", "$a=1"):
        with pytest.raises(ConfigError, match="where"):
            parse([wrong])
