"""The vector table itself: its commits, its ranges, its searches, against a dict and brute force."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.core.outcome import JobError
from pipeline.core.path import as_path
from pipeline.data.partitions import content_id
from pipeline.index import indexing, search
from pipeline.index.indexing import describe, finish, recall, unreadable_indexes
from pipeline.index.search import TableSearch
from pipeline.index.table import PLACE, ZONE_ROWS, Fragment, StoreError, VectorTable
from pipeline.index.vectors import as_column, as_matrix
from tests.bucket_servers import serving

WIDTH = 16
Row = dict[str, Any]


@pytest.fixture
def table(tmp_path: Path) -> VectorTable:
    return VectorTable(tmp_path / "lancedb", "t", WIDTH)


def place(chance: random.Random, i: str) -> Row:
    metadata = {
        "size": chance.choice([1, 2.5, 30]),
        "tag": chance.choice([["a", "b"], ["b", "ü"], "a", None, [1, "a"], []]),
        "new": chance.random() < 0.5,
        "deep": {"a": [1, {"b": None}]},
        "large": 2**60 + 1,
    }
    kept = {key: metadata[key] for key in chance.sample(sorted(metadata), 4)}
    source = chance.choice(["books", "it's"])
    return {"source": source, "source_id": f"{source}:{i}'\n/", "metadata": json.dumps(kept)}


def row(i: str, chance: random.Random) -> Row:
    places = [place(chance, i) for _ in range(chance.choice([1, 1, 1, 3]))]
    text = chance.choice(["", "short", "ein längerer Text\nauf zwei Zeilen"])
    vector = [round(chance.gauss(0, 1), 3) for _ in range(WIDTH)]
    return {"id": i, **places[0], "places": places, "text": f"{text} {i}", "digest": "0" * 32, "vector": vector}


def rows_of(rows: list[Row]) -> pa.Table:
    vectors = np.array([one["vector"] for one in rows], np.float32).reshape(len(rows), -1 if rows else WIDTH)
    names = ("id", "source", "source_id", "text", "metadata", "digest")
    columns = {name: pa.array([one[name] for one in rows], pa.string()) for name in names}
    places = pa.array([one["places"] for one in rows], pa.list_(PLACE))
    return pa.table({**columns, "places": places, "vector": as_column(vectors)})


def write(table: VectorTable, rows: list[Row]) -> list[Fragment]:
    return table.write(table.stored(rows_of(rows)).sort_by("id"))


def fill(table: VectorTable, rows: list[Row]) -> None:
    with table.writing() as writer:
        writer.append(write(table, rows))


def held(table: VectorTable) -> dict[str, Row]:
    rows = table.read([name for name in table.schema.names if name not in ("digest", "words")]).to_pylist()
    assert len(rows) == len({one["id"] for one in rows})
    return {one["id"]: one for one in rows}


def expected(row: Row) -> Row:
    return {**{k: v for k, v in row.items() if k != "digest"}, "vector": np.float32(row["vector"]).tolist()}


Keep = Callable[[Row, dict[str, Any]], bool]
"""Of a place and its metadata."""
CONDITIONS: list[tuple[dict[str, Any], Keep]] = [
    ({}, lambda p, m: True),
    ({"source": "it's"}, lambda p, m: p["source"] == "it's"),
    ({"source": ["books", "none"]}, lambda p, m: p["source"] == "books"),
    ({"source_id": "books:000'\n/"}, lambda p, m: p["source_id"] == "books:000'\n/"),
    ({"new": True}, lambda p, m: m.get("new") is True),
    ({"size": 1}, lambda p, m: m.get("size") == 1),
    ({"size": {"gt": 1, "lte": 30}}, lambda p, m: 1 < m.get("size", 0) <= 30),
    ({"tag": "a"}, lambda p, m: m.get("tag") in ("a", ["a", "b"])),
    ({"tag": ["ü", "x"]}, lambda p, m: m.get("tag") == ["b", "ü"]),
    (
        {"source": "books", "size": {"gte": 2}, "new": False},
        lambda p, m: p["source"] == "books" and m.get("size", 0) >= 2 and m.get("new") is False,
    ),
    ({"nothing": "such"}, lambda p, m: False),
]


def brute(rows: dict[str, Row], vector: np.ndarray, keep: Keep) -> dict[str, float]:
    """Ids and cosines in float64 of rows with a place to keep, the nearest first."""
    found = {}
    for one in rows.values():
        own = np.asarray(one["vector"], np.float64)
        if any(keep(each, json.loads(each["metadata"])) for each in one["places"]):
            found[one["id"]] = float(own @ vector / np.linalg.norm(own) / np.linalg.norm(vector))
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def check_queries(table: VectorTable, model: dict[str, Row], chance: random.Random) -> None:
    for where, keep in CONDITIONS:
        vector = np.array([chance.gauss(0, 1) for _ in range(WIDTH)])
        best = brute(model, vector, keep)
        for k in (1, 5, 400):
            got = TableSearch(table).query(vector, k, where)
            assert len(got) == min(k, len(best)), where
            np.testing.assert_allclose([one["score"] for one in got], list(best.values())[:k], atol=1e-5)
            for one in got:
                assert one["score"] == pytest.approx(best[one["id"]], abs=1e-5)
                assert one["text"] == model[one["id"]]["text"]


def test_random_work_against_a_dict(table: VectorTable, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, model = random.Random(7), dict[str, Row]()
    assert not table.exists()
    ids = [f"{n:03d}" for n in range(150)]
    for step in range(16):
        with table.writing() as writer:
            some = chance.sample(ids, chance.randrange(1, 90))
            new = [row(i, chance) for i in some if i not in model]
            writer.append(write(table, new))
            model |= {one["id"]: one for one in new}
            there = [i for i in some if i in model]
            if step % 3 == 1:
                other = {i: {**row(i, chance), "vector": model[i]["vector"], "text": model[i]["text"]} for i in there}
                old = table.read(["id", "_rowid"]).filter(pa.compute.field("id").isin(there))["_rowid"].to_numpy()
                writer.append(write(table, list(other.values())))
                writer.delete(old)
                model |= other
            if step % 3 == 2:
                gone = table.fetch(there[:20])["id"].to_pylist()
                row_ids = table.read(["id", "_rowid"]).filter(pa.compute.field("id").isin(gone))["_rowid"].to_numpy()
                writer.delete(row_ids)
                model = {i: one for i, one in model.items() if i not in gone}
            if step % 5 == 4:
                with patch.object(indexing, "MANY_SMALL", 2):
                    finish(table, None, 256)
        table = pickle.loads(pickle.dumps(table))
        assert table.count() == len(model), step
    assert held(table) == {i: expected(one) for i, one in model.items()}
    check_queries(table, model, chance)
    monkeypatch.setattr(search, "SELECTIVE_ROWS", 3)  # more rows than a condition can name
    check_queries(table, model, chance)
    asked = [*ids[:30], "not there", "it's"]
    assert {one["id"] for one in table.fetch(asked).to_pylist()} == set(asked) & set(model)


def test_nothing_in_it(table: VectorTable) -> None:
    with pytest.raises(StoreError, match=r"found no table .*t\.lance; run tep embed first"):
        table.open()
    fill(table, [])
    assert TableSearch(table).query(np.ones(WIDTH), 3) == []
    assert TableSearch(table).query(np.ones(WIDTH), 3, {"a": 1}) == []
    assert table.write(table.schema.empty_table()) == []
    assert len(table.fetch([])) == len(table.fetch(["a"])) == 0
    finish(table, "ivf_sq", 256)
    assert {"rows": 0, "width": WIDTH}.items() <= describe(table).items()


def test_a_commit_whose_reply_is_lost_is_not_repeated(table: VectorTable) -> None:
    commit, calls = lance.LanceDataset.commit, []

    def lossy(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) in (1, 2, 4):
            if len(calls) != 1:  # the first is lost on its way there
                commit(*args, **options)
            raise OSError("connection reset")
        return commit(*args, **options)

    chance = random.Random(0)
    with table.writing() as writer, patch.object(lance.LanceDataset, "commit", lossy):
        for wave in range(4):
            writer.append(write(table, [row(f"{wave}-{n}", chance) for n in range(10)]))
    assert len(calls) == 5
    assert len(held(table)) == 40


PAUSED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import os, signal
from tests import test_table
from pipeline.index.table import VectorTable
table = VectorTable(Path(sys.argv[2]), "t", test_table.WIDTH)
with table.writing() as writer:
    fragments = test_table.write(table, [test_table.row(f"old-{n}", test_table.random.Random(n)) for n in range(10)])
    writer.begin()
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    writer.append(fragments)
"""


def test_a_writer_that_was_paused_while_another_wrote_cannot_commit(table: VectorTable) -> None:
    """Its lock is taken from it here, as that of a bucket is when its holder does not renew it."""
    command = [sys.executable, "-c", PAUSED, str(Path(__file__).parents[1]), str(table.home)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        while "T" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
            time.sleep(0.01)
        with pytest.raises(JobError, match="another job is at work in"), table.writing():
            pass
        (table.path / ".lock").unlink()
        fill(table, [row(f"new-{n}", random.Random(n)) for n in range(5)])
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "StoreError: another job has started to write to " in errors
    assert sorted(held(table)) == [f"new-{n}" for n in range(5)]


def test_ranges_read_little_more_than_a_scan(table: VectorTable) -> None:
    """64 ranges of ids together, of a table that was written in two waves, each over all ids."""
    ids = np.array(sorted(content_id([str(n)]) for n in range(200_000)))
    chance = np.random.default_rng(0)
    waves = np.split(chance.permutation(len(ids)), 2)
    with table.writing() as writer:
        for wave in waves:
            own = ids[np.sort(wave)]
            rows = pa.table({name: pa.array([""] * len(own)) for name in ("source", "source_id", "text", "metadata")})
            rows = rows.append_column("id", pa.array(own.tolist())).append_column(
                "digest", pa.array(["0" * 32] * len(own))
            )
            rows = rows.append_column("places", pa.array([[]] * len(own), pa.list_(PLACE)))
            rows = rows.append_column("vector", as_column(chance.normal(size=(len(own), WIDTH))))
            writer.append(table.write(table.stored(rows)))
    finish(table, None, 256)
    before = lance.bytes_read_counter()
    table.open().to_table(columns=["id"])
    whole, version = lance.bytes_read_counter() - before, table.version()
    edges = [f"{each << 26:08x}" for each in range(64)]
    found, before = [], lance.bytes_read_counter()
    for first, last in zip(edges, [*edges[1:], None], strict=True):
        found += table.read(["id"], (first, last), version)["id"].to_pylist()
    assert sorted(found) == ids.tolist()
    assert 0.9 * whole < lance.bytes_read_counter() - before < 1.5 * whole + 64 * 2 * 2 * ZONE_ROWS * 21
    # The last term: two zones too many in each of two waves, of 21 bytes an id. At millions of rows it is nothing.


@pytest.mark.parametrize("vector_type", ["float32", "float16", "int8", "binary"])
def test_vectors_of_each_type_indexed_and_read_by_lancedb(vector_type: str, tmp_path: Path) -> None:
    table = VectorTable(tmp_path, "t", 64, vector_type)
    chance = np.random.default_rng(0)
    centres = chance.normal(size=(20, 64))
    vectors = centres[chance.integers(20, size=3000)] + 0.5 * chance.normal(size=(3000, 64))
    rows = [
        {**row(f"{n:04d}", random.Random(n)), "vector": vector} for n, vector in enumerate(vectors.astype(np.float32))
    ]
    fill(table, rows)
    exact = recall_of(table, vectors)
    found = finish(table, "ivf_sq", 1000)
    assert found["index"].upper().replace("_", "") == ("IVFFLAT" if vector_type == "binary" else "IVFSQ")
    assert found["recall@10"] > 0.9
    assert recall_of(table, vectors) > (0.85 if vector_type == "binary" else 0.95)
    assert exact > {"float32": 0.9999, "binary": 0.85}.get(vector_type, 0.98)
    theirs = lancedb.connect(tmp_path).open_table("t")
    column, query = ("bits", np.packbits(vectors[7] > 0)) if vector_type == "binary" else ("vector", vectors[7])
    search = theirs.search(query, vector_column_name=column)
    search = search if vector_type == "binary" else search.distance_type("cosine")
    assert search.limit(1).to_list()[0]["id"] == "0007"
    assert {index.name for index in theirs.list_indices()} >= {"id_idx", f"{column}_idx"}
    assert theirs.search().where("id >= '1000' AND id < '1010'").limit(100).to_arrow().num_rows == 10
    more = [{**one, "id": f"x{one['id']}"} for one in rows[:300]]
    fill(table, more)  # rows that no index knows yet
    assert {one["id"] for one in TableSearch(table).query(vectors[7], 2)} == {"0007", "x0007"}
    finish(table, "ivf_sq", 1000)
    assert table.count() == 3300


def recall_of(table: VectorTable, vectors: np.ndarray) -> float:
    """Of ten nearest by float32."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = []
    for n in range(0, 3000, 100):
        true = {f"{i:04d}" for i in np.argsort(-(unit @ unit[n]))[:10]}
        shares.append(len(true & {one["id"] for one in TableSearch(table).query(vectors[n], 10)}) / 10)
    return float(np.mean(shares))


def test_a_recall_below_one_is_seen(table: VectorTable, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(table, [row(f"{n:03d}", random.Random(n)) for n in range(300)])
    assert recall(table) == 1.0
    query = TableSearch.query
    monkeypatch.setattr(TableSearch, "query", lambda self, vector, k: query(self, vector, k)[: k // 2 + 1])
    assert 0.4 < recall(table) < 0.6


SENTENCES = {
    "zh": ("我们今天去图书馆借书。", "图书馆"),
    "ja": ("彼女は毎朝公園を散歩します。", "公園"),
    "th": ("เขาชอบกินข้าวผัดกับเพื่อน", "ข้าวผัด"),
    "hi": ("वह बाज़ार से सब्ज़ियाँ लाता है", "सब्ज़ियाँ"),
    "ar": ("ذهب الولد إلى المدرسة صباحا", "المدرسة"),
    "en": ("The Library opens at nine.", "library"),
}


def test_hybrid_finds_words_in_all_scripts_and_fuses_both_rankings(table: VectorTable) -> None:
    chance = random.Random(0)
    rows = [{**row(i, chance), "text": text} for i, (text, _) in SENTENCES.items()]
    fill(table, rows)
    for i, (_, word) in SENTENCES.items():
        far = -np.array(next(one["vector"] for one in rows if one["id"] == i))
        found = TableSearch(table).hybrid(word, far, 3)
        assert found[0]["id"] == i, i  # first by words, and last by meaning
        ranks = [one["id"] for one in TableSearch(table).query(far, 10)]
        assert found[0]["score"] == pytest.approx(1 / 61 + 1 / (61 + ranks.index(i)))
    only = TableSearch(table).hybrid("library", np.ones(WIDTH), 5, {"source": "it's"})
    assert {one["id"] for one in only} <= {r["id"] for r in rows if "it's" in {p["source"] for p in r["places"]}}


def test_an_index_of_another_program_is_left_alone(table: VectorTable) -> None:
    fill(table, [row(f"{n:03d}", random.Random(n)) for n in range(300)])
    table.open().create_scalar_index("source", "BITMAP")
    assert unreadable_indexes(table) == []
    finish(table, None, 256)
    assert {index.field_names[0] for index in table.open().describe_indices()} == {"source", "id"}


def test_tables_of_other_programs_and_other_widths_are_refused(table: VectorTable, tmp_path: Path) -> None:
    fill(table, [row("a", random.Random(0))])
    with pytest.raises(
        StoreError, match=r"holds vectors of type .*\[16\], the model gives .*\[9\]; choose another folder"
    ):
        VectorTable(table.home, "t", 9).create()
    with pytest.raises(StoreError, match="found a query of 9"):
        TableSearch(table).query(np.ones(9), 1)
    for bad in (np.zeros(WIDTH), np.full(WIDTH, np.nan)):
        with pytest.raises(StoreError, match="the query's vector is zero or not finite"):
            TableSearch(table).query(bad, 1)
    for where in ({"": 1}, {"$or": 1}, {"a": None}, {"a": []}, {"a": {"gt": "x"}}, {"a": {"beyond": 1}}, {"a": {}}):
        with pytest.raises(ConfigError, match="where: found"):
            TableSearch(table).query(np.ones(WIDTH), 1, where)
    lancedb.connect(tmp_path).create_table("other", pa.table({"id": ["a"], "vector": [[1.0]]}))
    with pytest.raises(
        StoreError, match=r"has no column source: another program or an older version made it; choose another"
    ):
        VectorTable(tmp_path, "other", 1).create()


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_in_a_bucket(scheme: str, tmp_path: Path) -> None:
    chance = random.Random(1)
    with serving(scheme, "tables", tmp_path) as server:
        table = VectorTable(as_path(server.uri("deep/er")), "t", WIDTH)
        model = {f"{n:03d}": row(f"{n:03d}", chance) for n in range(300)}
        for start in (0, 150):
            fill(table, list(model.values())[start : start + 150])
        with table.writing() as writer:
            writer.delete(table.read(["_rowid"], ("", "010"))["_rowid"].to_numpy())
            found = finish(table, "ivf_sq", 256)
            writer.mark_verified("key")
        assert table.is_verified(table.open(), "key")
        model = {i: one for i, one in model.items() if i >= "010"}
        assert held(table) == {i: expected(one) for i, one in model.items()}
        assert found["recall@10"] > 0.9
        assert TableSearch(table).query(np.array(model["123"]["vector"]), 1)[0]["id"] == "123"


def test_a_table_without_its_index_files_is_still_searched(table: VectorTable) -> None:
    rows = [row(f"{n:03d}", random.Random(n)) for n in range(600)]
    fill(table, rows)
    finish(table, "ivf_sq", 256)
    for file in (Path(str(table.path)) / "_indices").rglob("*"):
        if file.is_file():
            file.unlink()
    assert TableSearch(table).query(np.array(rows[5]["vector"]), 1)[0]["id"] == "005"
    assert sorted(unreadable_indexes(table)) == ["id_idx", "vector_idx"]
    with table.writing() as writer:
        for name in unreadable_indexes(table):
            writer.drop_index(name)
        assert finish(table, "ivf_sq", 256)["recall@10"] > 0.9
    assert unreadable_indexes(table) == []
    assert TableSearch(table).query(np.array(rows[5]["vector"]), 1)[0]["id"] == "005"
    assert as_matrix(table.read(["vector"])["vector"]).shape == (600, WIDTH)
