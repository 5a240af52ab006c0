"""A store kept in step with its records, in this process: changes, kills at every step, what is refused."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

from pipeline.embedding.cache import cache_key
from pipeline.embedding.columns import TOKENS, as_matrix
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.lookup import open_embedder
from pipeline.embedding.store import open_cache, open_store, publish, published_model, recipe_of
from pipeline.embedding.stores.lancedb_store import LanceStore
from pipeline.embedding.stores.store import Refused
from pipeline.embedding.sync import sync_here
from pipeline.embedding.verify import verify
from tests.embedding_world import Corpus, World, corpus_of, save_random_model
from tests.pinecone_server import pinecone_server

TEXTS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def world(model: Path, tmp_path: Path) -> World:
    shutil.copytree(model, tmp_path / "model")
    return World(tmp_path, corpus_of(TEXTS))


def run(world: World, encoder: TextEncoder | None = None) -> Counter[str]:
    sync = world.sync()
    counts, refused = sync_here(sync, world.files, encoder or world.encoder())
    sync.store.finish()
    sync.ledger.compact()
    assert refused == []
    return +counts


def edited(corpus: Corpus) -> Corpus:
    """Two texts changed, three documents' metadata, one that is gone, four that are new."""
    names = list(corpus)
    corpus = dict(corpus)
    for name in names[:2]:
        corpus[name] = (f"Altogether another text, of {name}.", corpus[name][1])
    for name in names[2:5]:
        corpus[name] = (corpus[name][0], {"line": -1})
    del corpus[names[5]]
    return corpus | {f"new{i}": (f"A page that was not there, number {i}.", {"line": i}) for i in range(4)}


ENCODE = (TextEncoder, "encode_tokens")


def spy(owner: type, name: str) -> Any:
    """Note the calls of a method, which does what it does."""
    return patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


def test_just_what_changed_is_embedded_and_sent(world: World) -> None:
    assert run(world) == {"new": TEXTS, "embedded": TEXTS, "written": TEXTS}
    world.check()
    assert run(world) == {"untouched": TEXTS}
    before = world.corpus
    world.corpus = edited(before)
    changes = {"new": 4, "changed": 2, "metadata": 3, "untouched": TEXTS - 6}
    with spy(LanceStore, "upsert") as upsert, spy(LanceStore, "update") as update, spy(*ENCODE) as encode:
        assert run(world) == {**changes, "embedded": 6, "written": 9, "deleted": 3}
    writes = [*upsert.call_args_list, *update.call_args_list]
    sent = [row_id for write in writes for row_id in write.args[1]["id"].to_pylist()]
    assert (sum(len(call.args[1]) for call in encode.call_args_list), len(sent), len(set(sent))) == (6, 9, 9)
    world.check()
    world.corpus = before  # texts that come back are in the cache
    counts = run(world)
    assert "embedded" not in counts
    assert (counts["new"] + counts["changed"], counts["deleted"]) == (3, 6)
    world.check()


class Killed(BaseException):
    pass


STEPS = [("cache", "put"), ("ledger", "note"), ("store", "upsert"), ("store", "update"), ("store", "delete")]


def die_at(sync: Any, calls: int, *, after: bool) -> None:
    """Let the n-th call that writes be the last one, before it does anything or right after."""
    left = iter(range(calls))

    def dying(original: Any) -> Any:
        def call(*args: Any) -> Any:
            last = next(left, None) is None
            result = None if last and not after else original(*args)
            if last:
                raise Killed
            return result

        return call

    for owner, name in STEPS:
        part = getattr(sync, owner)
        setattr(part, name, dying(getattr(part, name)))


def test_killed_at_any_step_the_next_run_makes_it_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At twenty seeded points, with changes between them."""
    monkeypatch.setattr("pipeline.embedding.sync.ROWS", 16)
    world.corpus = corpus_of(80)
    chance, made, encoder = random.Random(0), Counter[str](), world.encoder()
    encode = encoder.encode_tokens

    def encoding(texts: Any) -> np.ndarray:
        made.update(str(text) for text in texts)
        return encode(texts)

    monkeypatch.setattr(encoder, "encode_tokens", encoding)
    killed = turn = 0
    while killed < 20:
        turn += 1
        sync = world.sync()
        die_at(sync, chance.randrange(1, 24 if turn == 1 else 12), after=turn % 2 == 1)
        try:
            sync_here(sync, world.files, encoder)
        except Killed:
            killed += 1
        if turn % 3 == 0:
            run(world, encoder)
            world.check()
            names = list(world.corpus)
            for name in chance.sample(names, 20):
                text, metadata = world.corpus[name]
                world.corpus[name] = chance.choice([(f"{text} Turn {turn}.", metadata), (text, {"turn": turn})])
            del world.corpus[chance.choice(names)]
    run(world, encoder)
    world.check()
    # A kill between a vector and its way into the cache costs that batch, of 16 texts at most, a second time.
    assert sum(made.values()) - len(made) <= 16 * killed


def test_rows_lost_come_back_from_the_cache_and_a_lost_ledger_from_the_store(world: World) -> None:
    run(world)
    world.store.delete(next(world.store.ids())[:7])
    assert run(world) == {"new": 7, "written": 7, "untouched": TEXTS - 7}
    world.check()
    shutil.rmtree(world.folder / "ledgers")
    assert run(world) == {"untouched": TEXTS}
    world.corpus = edited(world.corpus)
    shutil.rmtree(world.folder / "ledgers")
    counts = run(world)
    assert (counts["new"], counts["changed"], counts["metadata"], counts["deleted"]) == (4, 2, 3, 3)
    world.check()


def test_a_vector_that_is_no_number_is_refused_alone_and_tried_again(world: World) -> None:
    encode = TextEncoder.encode_tokens

    def broken(self: TextEncoder, texts: Any) -> np.ndarray:
        vectors = encode(self, texts)
        vectors[0] = np.nan
        return vectors

    with patch.object(*ENCODE, broken):
        counts, refused = sync_here(world.sync(), world.files, world.encoder())
    assert len(refused) == counts["refused"] > 0
    assert {each.reason for each in refused} == {"its vector holds NaN or infinity"}
    assert world.store.count() == TEXTS - len(refused)
    assert run(world)["embedded"] == len(refused)
    world.check()


def test_what_a_store_refuses_is_tried_again(world: World) -> None:
    upsert = LanceStore.upsert

    def picky(self: LanceStore, rows: Any) -> list[Refused]:
        upsert(self, rows.slice(1))
        return [Refused(rows["id"][0].as_py(), "too heavy", 3)]

    with patch.object(LanceStore, "upsert", picky):
        _, refused = sync_here(world.sync(), world.files, world.encoder())
    counts = run(world)
    assert counts["written"] == len(refused)
    assert "embedded" not in counts
    world.check()


def test_verification_finds_what_is_wrong(world: World) -> None:
    run(world)
    sync = world.sync()
    found = verify(sync, world.files, world.encoder(), 50)
    assert (found.rows, found.sampled, found.wrong) == (TEXTS, 50, [])
    assert found.least_cosine > 0.99999
    rows = world.store.fetch(next(world.store.ids()))
    spoilt = as_matrix(rows["vector"])[::-1]
    world.store.upsert(rows.set_column(1, "vector", type(rows["vector"].chunk(0)).from_arrays(spoilt.ravel(), 32)))
    world.store.delete(rows["id"].to_pylist()[:3])
    found = verify(sync, world.files, world.encoder(), TEXTS)
    assert len(found.wrong) == 3
    assert "197 rows are in the store, and 200 in the ledger" in found.wrong[0]
    assert re.match(r"3 of 1\d\d sampled rows are not there", found.wrong[1])
    assert "sampled vectors are not those of their texts" in found.wrong[2]


@pytest.mark.parametrize("kind", ["mean", "chunks"])
def test_long_texts(kind: str, world: World) -> None:
    long = " ".join(text for text, _ in corpus_of(30, seed=1).values())
    world.corpus["long"] = (long, {"line": 1})
    world.overrides = [f"embedding.long_texts={kind}", "embedding.window_overlap=4"]
    run(world)
    encoder = TextEncoder(world.model, device="cpu")
    windows = TextEncoder(world.model, device="cpu", window_overlap=4).tokenizer.encode("text: " + long)
    pieces = [windows, *windows.overflowing]
    assert len(pieces) > 20
    vectors = encoder.encode_tokens(pa.array([piece.ids for piece in pieces], TOKENS))
    found = sorted((row for row in world.rows() if row["source_id"] == "long"), key=lambda row: str(row["id"]))
    if kind == "mean":
        vectors = (vectors * [[len(piece.ids)] for piece in pieces]).sum(axis=0, keepdims=True)
        vectors /= np.linalg.norm(vectors)
    else:
        assert all(row["text"] in long for row in found)
        assert long.startswith(found[0]["text"][:20])
        assert long.endswith(found[-1]["text"][-20:])
    assert len(found) == len(vectors)
    np.testing.assert_allclose([row["vector"] for row in found], vectors, atol=1e-5)
    assert run(world) == {"untouched": TEXTS + 1}
    del world.corpus["long"]
    assert run(world)["deleted"] == (1 if kind == "mean" else len(pieces))
    world.check()


def test_a_vector_of_the_cache_by_its_text(world: World) -> None:
    run(world)
    text = world.corpus["doc3"][0]
    encoder = TextEncoder(world.model, device="cpu")
    embedder = open_embedder(world.config, world.model)
    with patch.object(*ENCODE, None):
        found = embedder.get_embedding(f"  {text} ", cache_only=True)
        assert embedder.get_embedding(text, "query", cache_only=True) is None
        assert embedder.get_embedding("never seen", cache_only=True) is None
    np.testing.assert_allclose(found, encoder.encode([text], "document")[0], atol=1e-5)
    made = embedder.get_embedding("never seen", "query")
    np.testing.assert_allclose(made, encoder.encode(["never seen"], "query")[0], atol=1e-5)
    np.testing.assert_array_equal(embedder.get_embedding("never seen", "query", cache_only=True), made)


def test_the_cache_is_kept_below_its_size(world: World) -> None:
    cache, row_bytes = open_cache(world.config, world.recipe), 4 * 32 + 32
    for first in range(0, 1000, 100):
        keys = [cache_key(str(number)) for number in range(first, first + 100)]
        cache.put(keys, np.full((100, 32), first, np.float32))
    cache.trim(400 * row_bytes)
    vectors, found = cache.get([cache_key(str(number)) for number in range(1000)])
    assert found.sum() == cache.table.count_rows() == 400
    assert found[-400:].all()
    assert vectors[-1, 0] == 900


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnxruntime_gives_nearly_the_same_vectors(precision: str, world: World) -> None:
    pytest.importorskip("onnxruntime")
    world.overrides = ["embedding.backend=onnxruntime", f"embedding.precision={precision}"]
    assert run(world)["embedded"] == TEXTS
    rows = world.rows()
    whole = TextEncoder(world.model, device="cpu").encode([row["text"] for row in rows], "document")
    cosines = (whole * np.array([row["vector"] for row in rows])).sum(axis=1)
    assert cosines.min() > {"fp32": 0.99999, "int8": 0.9}[precision]
    assert (cosines.min() < 0.99999) == (precision == "int8")
    assert not verify(world.sync(), world.files, world.encoder(), 50).wrong


def test_another_size_and_another_model_have_tables_of_their_own(world: World, tmp_path: Path) -> None:
    run(world)
    first = world.store.name
    world.overrides = ["embedding.dimensions=16"]
    assert run(world)["embedded"] == TEXTS
    rows = world.rows()
    whole = TextEncoder(world.model, device="cpu").encode([row["text"] for row in rows], "document")[:, :16]
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose([row["vector"] for row in rows], whole, atol=1e-5)
    world.overrides = []
    shutil.rmtree(world.model)
    save_random_model(world.model, seed=1)
    assert run(world)["embedded"] == TEXTS
    assert world.store.name != first
    world.check()


def test_pinecone_with_faults_of_all_kinds_and_kills(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the requests fail, and every run but the last is killed: nothing is lost, nothing double."""
    monkeypatch.setenv("PINECONE_API_KEY", "pc-test")
    monkeypatch.setattr("pipeline.embedding.sync.ROWS", 32)
    kinds = ("429", "429-after", "500", "503", "cut-before", "cut-after", "part", "short")
    with pinecone_server(faults=dict.fromkeys(kinds, 0.2 / len(kinds)), retry_after_s=0.01) as server:
        settings = {"host": server.url, "create": "true", "requests_per_second": 5000, "batch_rows": 2}
        settings |= {"max_wait_s": 0.02, "max_attempts": 12}
        world.overrides = ["embedding.store=pinecone", *(f"pinecone.{name}={each}" for name, each in settings.items())]
        for turn in range(4):
            sync = world.sync()
            die_at(sync, 3 + 2 * turn, after=bool(turn % 2))
            with suppress(Killed):
                sync_here(sync, world.files, world.encoder())
            if turn % 2:
                world.corpus = edited(world.corpus)
        run(world)
        world.check()
        assert len(set(server.faulted)) >= 6


def test_readers_go_on_with_the_table_and_the_model_that_were_published(world: World) -> None:
    run(world)
    assert published_model(world.config) is None
    text = next(iter(world.corpus.values()))[0]
    vector = world.encoder().encode([text])[0]
    publish(world.config, world.recipe, world.store)
    shutil.rmtree(world.model)
    save_random_model(world.model, seed=1)
    model = published_model(world.config)
    assert model is not None
    recipe = recipe_of(world.config, model)
    assert open_store(world.config, recipe).count() == TEXTS
    np.testing.assert_array_equal(open_encoder(recipe, 1, "cpu").encode([text])[0], vector)
    world.overrides = [f"embedding.model={world.model}"]
    assert published_model(world.config) is None
