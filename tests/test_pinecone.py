"""Pinecone, by its own SDK over HTTP, against a server that refuses, fails, stalls and cuts as the service may."""

from __future__ import annotations

import json
import logging
import pickle
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
import yaml

from pipeline.config import ConfigError, Pinecone, load
from pipeline.index import pinecone_client, pinecone_records
from pipeline.index.pinecone_client import Budget
from pipeline.index.pinecone_store import PineconeStore
from pipeline.index.table import PLACE, StoreError
from pipeline.index.vectors import as_column
from tests.pinecone_server import RefusalError, Service, pinecone_server

WIDTH = 5
KEY = "pcsk_3Zq9_never_to_be_seen"
ALL_FAULTS = ("429", "429-after", "500", "503", "timeout", "cut-before", "cut-after", "part", "short")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[Service]:
    with pinecone_server(KEY) as service:
        yield service


def store_at(
    server: Service, namespace: str = "n", width: int = WIDTH, budget: Budget | None = None, **settings: Any
) -> PineconeStore:
    chosen = {"host": server.url, "create": True, "requests_per_second": 5000.0, "max_attempts": 3, "timeout_s": 5.0}
    return PineconeStore(Pinecone(**{**chosen, **settings}), namespace, width, budget=budget, backoff_s=0.005)


def made(server: Service, *place: str, **settings: Any) -> PineconeStore:
    store = store_at(server, *place, **settings)
    store.create()
    return store


def refusal(ask: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        ask()
    return str(caught.value)


def rows_of(ids: list[str], seed: int = 0, text: str = "a text", metadata: str = '{"n": 1}') -> pa.Table:
    """Rows as of the vector table, of one place each."""
    vectors = np.random.default_rng(seed).normal(size=(len(ids), WIDTH))
    places = [[{"source": "s", "source_id": i, "metadata": metadata}] for i in ids]
    columns = {"id": ids, "places": pa.array(places, pa.list_(PLACE)), "text": [text] * len(ids), "digest": ids}
    columns |= {name: [place[0][name] for place in places] for name in ("source", "source_id", "metadata")}
    return pa.table({**columns, "vector": as_column(vectors)})


def numbered(count: int) -> list[str]:
    return [f"id{n}" for n in range(count)]


def held(server: Service, namespace: str = "n") -> dict[str, Any]:
    return server.records["text-embedding-pipeline"].get(namespace, {})


class TestFaults:
    def test_with_a_fifth_of_all_requests_failing_nothing_is_lost_nothing_double_and_the_budget_kept(self) -> None:
        rate, at_once = 60.0, 4
        with pinecone_server(KEY, {kind: 0.2 / len(ALL_FAULTS) for kind in ALL_FAULTS}, seed=5) as server:
            server.work_s = 0.02
            server.retry_after_s = 0.1
            budget = Budget(rate, at_once)
            # Two stores, as of two processes, that share one budget.
            settings = {"batch_rows": 20, "max_attempts": 12, "timeout_s": 1.5, "max_concurrency": 16}
            stores = [store_at(server, budget=budget, **settings) for _ in range(2)]
            stores[0].create()
            ids = numbered(1500)
            rows = rows_of(ids)
            assert stores[0].upsert(rows.slice(0, 900)) == []
            assert stores[1].upsert(rows.slice(900)) == []
            stores[0].delete(ids[:250])
            assert stores[1].upsert(rows.slice(0, 50)) == []
            while set(server.faulted) < set(ALL_FAULTS):
                assert stores[0].upsert(rows.slice(250, 20)) == []
            expected = {*ids[:50], *ids[250:]}
            assert set(held(server)) == expected
            found = [i for page in stores[0].ids() for i in page]
            assert len(found) == len(set(found)) == stores[1].count() == len(expected)
            back = stores[0].fetch(sorted(expected))
            at = {i: n for n, i in enumerate(ids)}
            wanted = rows.take([at[i] for i in back])
            assert set(back) == expected
            assert [row["vector"].tolist() for row in back.values()] == wanted["vector"].to_pylist()
            assert 0.1 < len(server.faulted) / len(server.requests) < 0.3
            # Of those that the budget let go, at most so many were still on their way when a second began.
            assert server.busiest(1.0) <= rate + 1 + at_once
            assert 1 < server.most_under_way <= at_once
            assert len(server.requests) > 2 * rate

    @pytest.mark.parametrize("kind", ["429", "503", "timeout", "cut-before", "cut-after", "part"])
    def test_what_cannot_be_written_is_refused_with_the_reason(self, kind: str) -> None:
        with pinecone_server(KEY, {kind: 1.0}, retry_after_s=0.01) as server:
            store = made(server, timeout_s=1.0 if kind == "timeout" else 20.0, batch_rows=4)
            refused = store.upsert(rows_of(numbered(6)))
            assert sorted(one.id for one in refused) == numbered(6)
            assert {one.attempts for one in refused} == {3}
            assert server.count("vectors/upsert") == 6  # two batches, three times
            words = {"timeout": "timed out", "cut-before": "disconnected", "cut-after": "disconnected", "part": "500"}
            assert all("not written in 3 attempts" in one.reason for one in refused)
            assert all(words.get(kind, kind) in one.reason for one in refused)
            assert "Pinecone: describe_index_stats failed after 3 attempts" in refusal(store.count)

    def test_only_the_batches_that_failed_are_sent_again(self, server: Service) -> None:
        store = made(server, batch_rows=10)
        server.faults = {"500": 0.3}
        assert store.upsert(rows_of(numbered(200))) == []
        assert [len(ids) for ids in server.writes] == [10] * 20
        assert server.count("vectors/upsert") == 20 + server.faulted.count("500") > 22

    def test_a_record_that_the_service_will_not_have_takes_no_other_with_it(self, server: Service) -> None:
        store = made(server)
        server.poison = {"id13", "id77"}
        refused = store.upsert(rows_of(numbered(100)))
        assert sorted(one.id for one in refused) == ["id13", "id77"]
        assert "not to our taste" in refused[0].reason
        assert set(held(server)) == {*numbered(100)} - server.poison

    def test_half_a_batch_written_is_found_and_mended(self, server: Service) -> None:
        store = made(server, batch_rows=8)
        server.faults = {"short": 0.6}
        ids = numbered(64)
        refused = store.upsert(rows_of(ids))
        assert "short" in server.faulted
        assert set(held(server)) >= set(ids) - {one.id for one in refused}
        assert all("Pinecone wrote 0 of 1 records" in one.reason for one in refused)

    def test_retry_after_is_waited_for_by_all(self) -> None:
        with pinecone_server(KEY, retry_after_s=0.4) as server:
            budget = Budget(5000, 1)
            stores = [made(server, budget=budget, max_attempts=2) for _ in range(2)]
            for store in stores:
                store.count()
            server.faults = {"429-after": 1.0}
            hold = budget.pause

            def hold_and_mend(seconds: float) -> None:
                server.faults.clear()
                hold(seconds)

            budget.pause = hold_and_mend  # type: ignore[method-assign]
            begun = len(server.requests)
            stores[0].count()
            stores[1].count()
            first, *others = [at for at, _ in server.requests[begun:]]
            assert server.faulted == ["429-after"]
            assert len(others) == 2
            assert min(others) - first >= 0.4  # by the server's clock

    def test_retry_after_is_seconds_or_a_date(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "time", lambda: 1_000_000)  # 13:46:40 of that day
        dates = {"Mon, 12 Jan 1970 13:47:10 GMT": 30, "Mon, 12 Jan 1970 13:46:00 GMT": 0}
        for header, asked in {None: None, "7": 7, "soon": None, **dates}.items():
            assert pinecone_client._seconds(header) == asked


class TestSentences:
    """What is wrong with all of it is a sentence, and what was written stays."""

    def test_a_wrong_key(self, server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        made(server)
        monkeypatch.setenv("PINECONE_API_KEY", "pc-wrong-key")
        words = "Pinecone refused the key (401); check PINECONE_API_KEY in the environment or in api.env"
        for ask in (store_at(server).create, store_at(server).count, store_at(server).is_new):
            assert refusal(ask) == words
        assert len(server.control) < 9  # it is not tried again

    def test_no_key_and_keys_in_files(self, server: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PINECONE_API_KEY")
        config = tmp_path / "conf" / "c.yaml"
        config.parent.mkdir()
        config.write_text(yaml.safe_dump({"embedding": {"store": "pinecone"}, "pinecone": {"host": server.url}}))
        monkeypatch.chdir(tmp_path)
        words = "found no Pinecone key; set PINECONE_API_KEY on each node, or add PINECONE_API_KEY=… to "

        def create() -> None:
            settings = load(config)
            PineconeStore(settings.pinecone, "t", WIDTH, settings.secret_files).create()

        assert refusal(create) == f"{words}{tmp_path / 'api.env'}"
        (config.parent / "api.env").write_text(f"# secrets\nOTHER=1\nexport PINECONE_API_KEY='{KEY}'\n")
        assert refusal(create).startswith("Pinecone has no index")
        (tmp_path / "api.env").write_text("PINECONE_API_KEY=wrong")
        assert "401" in refusal(create)

    def test_an_index_that_is_not_there(self, server: Service) -> None:
        store = store_at(server, create=False, index="other")
        words = (
            "Pinecone has no index other; set pinecone.create=true to create it, or choose another with pinecone.index"
        )
        for ask in (store.create, store.count, lambda: store.upsert(rows_of(["a"]))):
            assert refusal(ask) == words

    def test_an_index_that_is_made(self, server: Service) -> None:
        server.not_ready = 2
        made(server, cloud="gcp", region="europe-west4", metric="dotproduct")
        index = server.indexes["text-embedding-pipeline"]
        vectors = {"type": "dense_vector", "dimension": WIDTH, "metric": "dotproduct"}
        assert index["schema"] == {"fields": {"_values": vectors}}
        assert (index["deployment"]["cloud"], index["deployment"]["region"]) == ("gcp", "europe-west4")
        assert index["status"]["ready"]

    def test_an_index_of_another_kind(self, server: Service) -> None:
        made(server)
        said = refusal(store_at(server, width=9).create)
        assert said.endswith("has 5 dimensions, the model 9; choose another index with pinecone.index")
        said = refusal(store_at(server, metric="dotproduct").create)
        assert said.endswith("has the metric cosine; pinecone.metric is dotproduct")
        server.indexes["text-embedding-pipeline"]["schema"]["fields"] = {"body": {"type": "string"}}
        assert refusal(store_at(server).create).endswith("holds body; allowed is an index of dense vectors")

    def test_an_index_deleted_in_mid_run(self, server: Service) -> None:
        store = made(server, batch_rows=5)
        store.upsert(rows_of(["a", "b"]))
        server.remove("text-embedding-pipeline")
        asks = [
            lambda: store.upsert(rows_of(numbered(50))),
            lambda: store.delete(["a"]),
            lambda: store.query(np.ones(WIDTH), 1),
            lambda: store.fetch(["a"]),
            store.count,
        ]
        for ask in asks:
            said = refusal(ask)
            assert "text-embedding-pipeline" in said
            assert "set pinecone.create=true" in said

    def test_hosts(self, server: Service) -> None:
        gone = made(server, index_host="http://127.0.0.1:9", max_attempts=2)
        assert {one.id for one in gone.upsert(rows_of(["a"]))} == {"a"}  # the index is there: it may come back
        direct = store_at(server, host="http://127.0.0.1:9", index_host=f"{server.url}/data/text-embedding-pipeline")
        assert direct.upsert(rows_of(["a"])) == []
        assert direct.count() == 1
        said = refusal(store_at(server, index_host="nonsense").count)
        assert said.startswith("pinecone.index_host: ")
        assert "does not appear to be a valid URL" in said
        server.remove("text-embedding-pipeline")
        assert "Pinecone has no index" in refusal(lambda: gone.upsert(rows_of(["a"])))

    def test_too_many_results(self, server: Service) -> None:
        store = made(server)
        assert "Pinecone returns at most 10,000" in refusal(lambda: store.query(np.ones(WIDTH), 10_001))


class TestRecords:
    def test_rows_that_pinecone_does_not_take(self, server: Service) -> None:
        store = made(server)
        good, most = rows_of(["good"]), "x" * 512
        bad = {
            "x" * 513: (rows_of(["x" * 513]), "its id has 513 bytes; Pinecone accepts 512"),
            "naïve": (rows_of(["naïve"]), "its id is empty or not ASCII"),
            "big": (rows_of(["big"], metadata=json.dumps({"a": "y" * 50_000})), "Pinecone accepts 40,960"),
            "broken": (rows_of(["broken"], metadata="{"), "its metadata is not a JSON object"),
            "list": (rows_of(["list"], metadata="[]"), "its metadata is not a JSON object"),
        }
        rows = pa.concat_tables([good, rows_of([most]), *(table for table, _ in bad.values())])
        refused = {one.id: one for one in store.upsert(rows)}
        assert set(refused) == set(bad)
        assert all(reason in refused[i].reason and refused[i].attempts == 0 for i, (_, reason) in bad.items())
        assert set(held(server)) == {"good", most}
        assert [*store.fetch(["naïve", most, "x" * 513])] == [most]
        store.delete(["naïve", most])
        assert set(held(server)) == {"good"}

    def test_texts_are_cut_to_what_fits_and_it_is_said(self, server: Service, caplog: pytest.LogCaptureFixture) -> None:
        store = made(server, text_bytes=101)
        with caplog.at_level(logging.WARNING, "pipeline"):
            store.upsert(rows_of(["a", "b"], text="ä" * 300))
            store.upsert(rows_of(["c"], text="ä" * 300))
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said == (
            "text-embedding-pipeline/n: truncating texts to 101 bytes (pinecone.text_bytes) and lists of places"
        )
        assert store.fetch(["a"])["a"]["text"] == "ä" * 50
        # Beside metadata that nearly fills a record, less of the text is left; quotes take two bytes each.
        wide = made(server, "wide", text_bytes=40_000)
        assert wide.upsert(rows_of(["a"], text='"' * 30_000, metadata=json.dumps({"a": "y" * 30_000}))) == []
        kept = wide.fetch(["a"])["a"]["text"]
        others = len('{"a":"","digest":"a","source":"s","source_id":"a","text":""}')
        assert len(kept) == (40_960 - 30_000 - others) // 2

    def test_vectors_that_cannot_be_compared(self, server: Service) -> None:
        store = made(server)
        vectors = np.ones((4, WIDTH), np.float32)
        vectors[0, 1], vectors[1, 2], vectors[2] = np.nan, np.inf, 0
        rows = rows_of(numbered(4))
        rows = rows.set_column(rows.column_names.index("vector"), "vector", as_column(vectors))
        refused = {one.id: one.reason for one in store.upsert(rows)}
        assert [refused[i] for i in ("id0", "id1")] == ["its vector holds NaN or infinity"] * 2
        assert refused["id2"] == "its vector is zero, so it has no cosine"
        assert set(held(server)) == {"id3"}
        said = refusal(lambda: store_at(server, width=9).upsert(rows))
        assert said == "text-embedding-pipeline/n takes vectors of 9 dimensions; found vectors of 5"

    def test_what_is_sent(self, server: Service) -> None:
        store = made(server, metadata=["a", "deep"])
        store.upsert(rows_of(["x"], metadata=json.dumps({"a": 1, "b": 2, "deep": {"c": [None]}})))
        columns = {"source": "s", "source_id": "x", "text": "a text", "digest": "x"}
        assert max(len(repr(number)) for number in held(server)["x"]["values"]) <= 14
        assert held(server)["x"]["metadata"] == {"a": 1.0, **columns, "metadata_json": '{"deep": {"c": [null]}}'}
        assert json.loads(store.fetch(["x"])["x"]["metadata"]) == {"a": 1, "deep": {"c": [None]}}

    def test_batches_by_count_and_by_bytes(self, server: Service) -> None:
        store = made(server, batch_rows=1000)
        store.upsert(rows_of([f"id{n:05}" for n in range(2500)], text=""))
        assert sorted(map(len, server.writes)) == [500, 1000, 1000]
        server.writes.clear()
        store.upsert(rows_of([f"id{n:05}" for n in range(1000)], text="t" * 7_000))  # 7 MB
        sizes = sorted(map(len, server.writes))
        assert sum(sizes) == 1000
        assert all(200 < size < 290 for size in sizes[1:])  # the server refuses more than 2 MiB

    def test_no_batch_is_over_its_bytes_and_none_is_left_out(self) -> None:
        chance = random.Random(0)
        records = [{"id": str(n), "metadata": {"text": "é" * chance.randrange(20_000)}} for n in range(300)]
        for size in (50_000, 100_000, 2_000_000):
            groups = list(pinecone_records.batches(records, 40, size))
            assert [one for group in groups for one in group] == records
            bodies = [orjson.dumps({"vectors": group, "namespace": "n" * 512}) for group in groups]
            assert max(map(len, bodies)) <= size
            assert max(map(len, groups)) <= 40
        assert list(pinecone_records.batches([], 40, 100)) == []

    def test_many_long_ids_fit_the_addresses_of_a_fetch(self, server: Service) -> None:
        store = made(server)
        ids = [f"{n:03}/" + "%" * 500 for n in range(40)]
        store.upsert(rows_of(ids))
        assert sorted(store.fetch(ids)) == ids


class TestKey:
    def test_it_is_in_no_log_repr_dump_pickle_or_error(
        self, server: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PINECONE_DEBUG_CURL", "1")
        caplog.set_level(logging.DEBUG)
        seen: list[str] = []
        store = made(server)
        store.upsert(rows_of(["a"]))
        store.query(np.ones(WIDTH), 1)
        server.key = "another"  # the server's refusal names the key that it was given
        for ask in (store.count, store_at(server).is_new):
            with pytest.raises(StoreError) as caught:
                ask()
            seen += [str(caught.value), repr(caught.value), repr(vars(caught.value))]
        server.key = KEY

        def refuse(*_: object) -> None:
            raise RefusalError(400, f"no, {KEY}")

        monkeypatch.setattr(server, "checked", refuse)
        (refused,) = store.upsert(rows_of(["b"]))
        assert "***" in refused.reason
        seen += [refused.reason, repr(store), repr(vars(store)), repr(vars(store.client))]
        config = tmp_path / "c.yaml"
        config.write_text("embedding: {store: pinecone}")
        seen += [json.dumps(load(config).dump()), repr(load(config)), str(load(config).secret_files)]
        seen += [record.getMessage() + str(record.__dict__) for record in caplog.records]
        seen += [repr(pickle.dumps(store)), repr(pickle.dumps(store.client)), repr(pickle.dumps(caught.value))]
        assert len(caplog.records) > 10
        assert set(server.keys) == {KEY}
        assert not [text for text in seen if KEY in text]
        assert pickle.loads(pickle.dumps(store)).count() == 1  # which reads it anew

    def test_one_in_the_config_is_refused_without_being_shown(self, tmp_path: Path) -> None:
        config = tmp_path / "c.yaml"
        config.write_text(f"pinecone: {{api_key: {KEY}}}")
        with pytest.raises(ConfigError, match="unknown key") as caught:
            load(config)
        assert KEY not in str(caught.value)


class TestBudget:
    def test_requests_are_let_go_one_by_one_and_no_more_than_so_many_at_once(self) -> None:
        now = [0.0]
        budget = Budget(10, 2, lease_s=5, clock=lambda: now[0])
        assert budget.try_acquire() == 0
        assert budget.try_acquire() == pytest.approx(0.1)
        now[0] = 0.1
        assert budget.try_acquire() == 0
        now[0] = 0.3
        assert 0 < budget.try_acquire() <= 0.1  # two are under way
        budget.release()
        assert budget.try_acquire() == 0
        budget.pause(2)
        budget.release()
        budget.release()
        assert budget.try_acquire() == pytest.approx(2)
        budget.pause(1)  # a shorter one takes nothing from it
        assert budget.try_acquire() == pytest.approx(2)

    def test_what_a_lost_process_had_comes_back(self) -> None:
        now = [0.0]
        budget = Budget(1000, 1, lease_s=5, clock=lambda: now[0])
        assert budget.try_acquire() == 0
        now[0] = 4.9
        assert budget.try_acquire() > 0
        now[0] = 5.1
        assert budget.try_acquire() == 0
        budget.release()
        budget.release()  # the lost one, after all: it takes no place from others
        assert budget.try_acquire() > 0

    def test_a_turn_waits_as_long_as_it_is_told(self) -> None:
        now, waits = [0.0], list[float]()

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            now[0] += seconds

        budget = Budget(4, 100, clock=lambda: now[0])
        for _ in range(9):
            with budget.slot(sleep):
                pass
        assert now[0] == pytest.approx(2)
        assert waits == pytest.approx([0.25] * 8)
