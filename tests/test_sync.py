"""A vector table brought up to date in one process: changes, kills at every step, damage, long texts."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lance
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from pipeline.core.outcome import JobError
from pipeline.data.partitions import content_id
from pipeline.index import embed
from pipeline.index.documents import PLACE_COLUMNS, first_places, place_digests
from pipeline.index.encoder import TextEncoder, open_encoder
from pipeline.index.published import publish, published
from pipeline.index.search import TableSearch, open_embedder
from pipeline.index.table import DIGEST_CHARS, PLACE, VectorTable
from pipeline.index.vectors import as_matrix
from pipeline.index.writer import Writer
from tests.embedding_world import Corpus, World, corpus_of, save_random_model

TEXTS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def world(model: Path, tmp_path: Path) -> World:
    shutil.copytree(model, tmp_path / "model")
    return World(tmp_path, corpus_of(TEXTS))


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


def test_just_what_changed_is_embedded(world: World) -> None:
    assert world.run() == {"new": TEXTS, "embedded": TEXTS}
    world.check()
    assert world.run() == {}
    before, vectors = world.corpus, {row["id"]: row["vector"] for row in world.rows()}
    world.corpus = edited(before)
    with spy(*ENCODE) as encode:
        counts = world.run()
    assert counts == {"new": 4, "changed": 2, "metadata": 3, "untouched": TEXTS - 6, "deleted": 1, "embedded": 6}
    sample = world.config.embedding.verify_sample
    assert sum(len(call.args[1]) for call in encode.call_args_list) == 6 + sample
    world.check()
    assert all(row["vector"] == vectors[row["id"]] for row in world.rows() if row["id"] in vectors)
    world.corpus = before
    assert world.run()["embedded"] == 3
    world.check()


class Killed(BaseException):
    pass


POINTS = [
    (VectorTable, "write"),  # a fragment that nobody sees
    (Writer, "append"),
    (Writer, "delete"),
    (Writer, "mark_verified"),
    (Writer, "_commit"),
    (lance.LanceDataset, "create_scalar_index"),
]


def killed_at(calls: int, *, after: bool) -> Any:
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

    return [patch.object(owner, name, dying(getattr(owner, name))) for owner, name in POINTS]


def test_killed_at_any_step_the_next_run_makes_it_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At twenty seeded points, with changes between them: nothing is embedded twice but what no commit had."""
    monkeypatch.setattr("pipeline.index.documents.READ_ROWS", 16)
    world.corpus = corpus_of(80)
    world.overrides = ["embedding.verify_sample=0", "embedding.max_deleted_fraction=1"]
    chance, made, encoder = random.Random(0), Counter[str](), world.encoder()
    encode = encoder.encode_tokens

    def encoding(texts: Any, *args: Any) -> np.ndarray:
        made.update(map(str, texts.to_pylist()))
        return encode(texts, *args)

    monkeypatch.setattr(encoder, "encode_tokens", encoding)
    killed = turn = 0
    while killed < 20:
        turn += 1
        patches = killed_at(chance.randrange(1, 24 if turn == 1 else 14), after=turn % 2 == 1)
        for each in patches:
            each.start()
        try:
            world.run(encoder)
        except Killed:
            killed += 1
        finally:
            for each in patches:
                each.stop()
        if turn % 3 == 0:
            world.run(encoder)
            world.check()
            names = list(world.corpus)
            for name in chance.sample(names, 20):
                text, metadata = world.corpus[name]
                world.corpus[name] = chance.choice([(f"{text} Turn {turn}.", metadata), (text, {"turn": turn})])
            del world.corpus[chance.choice(names)]
    world.run(encoder)
    world.check()
    # A kill between a fragment and its commit costs that batch, of 16 texts at most, a second time.
    assert sum(made.values()) - len(made) <= 16 * killed


def overwrite(table: VectorTable, rows: pa.Table) -> None:
    """As another program would: rows by id, whatever their digest says."""
    table.open().merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def test_damage_behind_our_back_is_found_and_repaired(world: World) -> None:
    """A row removed, a foreign one added, a row twice, and a text, metadata, places and a vector overwritten."""
    world.run()
    table = world.table
    rows = table.read(table.schema.names).sort_by("id")
    for name, damage, sentence in [
        ("removed", lambda: table.open().delete(f"id = '{rows['id'][0]}'"), "1 rows are missing"),
        ("foreign", lambda: overwrite(table, changed(rows.slice(1, 1), "id", "f" * 32)), "1 rows are of no document"),
        ("first", lambda: overwrite(table, changed(rows.slice(1, 1), "id", "'!\n/")), "1 rows are of no document"),
        ("last", lambda: overwrite(table, changed(rows.slice(1, 1), "id", "zü")), "1 rows are of no document"),
        ("twice", lambda: append(table, rows.slice(2, 2)), "2 rows are damaged"),
        ("text", lambda: overwrite(table, changed(rows.slice(4, 1), "text", "x")), "1 rows are damaged"),
        ("metadata", lambda: overwrite(table, changed(rows.slice(5, 1), "metadata", "{}")), "1 rows are damaged"),
        ("source", lambda: overwrite(table, changed(rows.slice(6, 1), "source", "t")), "1 rows are damaged"),
        ("digest", lambda: overwrite(table, changed(rows.slice(7, 1), "digest", "")), "1 rows are damaged"),
        ("vector", lambda: overwrite(table, swapped(rows.slice(8, 2))), "2 rows are damaged"),
    ]:
        damage()
        assert not world.index().is_done(), name
        with pytest.raises(JobError, match=sentence):
            world.index().verify(lambda: None)  # type: ignore[arg-type, return-value]
        world.run()
        world.check()
        assert world.index().is_done(), name
        assert world.index().verify(lambda: None)["rows"] == TEXTS  # type: ignore[arg-type, return-value]


def changed(rows: pa.Table, name: str, value: str) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, pa.array([value] * len(rows)))


def swapped(rows: pa.Table) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index("vector"), "vector", rows["vector"].take([1, 0]))


def append(table: VectorTable, rows: pa.Table) -> None:
    import lance

    lance.write_dataset(rows.cast(table.schema), str(table.path), mode="append")


def test_a_vector_of_another_text_is_found_by_encoding_it_again(world: World) -> None:
    world.run()
    table = world.table
    rows = table.read(table.schema.names)
    turned = pa.FixedSizeListArray.from_arrays(as_matrix(rows["vector"])[::-1].ravel(), 32)
    rows = rows.set_column(rows.schema.get_field_index("vector"), "vector", turned)
    rows = rows.set_column(
        rows.schema.get_field_index("digest"), "digest", pa.array([d[:32] for d in rows["digest"].to_pylist()])
    )
    overwrite(table, table.stored(rows))  # with digests that fit
    with pytest.raises(JobError, match=r"100 of 100 sampled vectors do not match their texts.*embed --rebuild"):
        world.index().verify(lambda: None)  # type: ignore[arg-type, return-value]
    assert world.run(rebuild=True) == {"new": TEXTS, "embedded": TEXTS}
    world.check()


def test_a_bit_that_flips_on_the_disk_is_found_and_repaired(world: World) -> None:
    """In a version that a job has verified: nobody has written since."""
    world.run()
    vector = np.array(world.rows()[0]["vector"], np.float32).tobytes()
    for file in (Path(str(world.table.path)) / "data").iterdir():
        content = bytearray(file.read_bytes())
        if (place := content.find(vector)) >= 0:
            content[place] ^= 1
            file.write_bytes(content)
    assert world.index().is_done()  # which looks at no text
    with pytest.raises(JobError, match=r"1 rows are damaged.*to repair it, run tep embed"):
        world.index().verify(lambda: None)  # type: ignore[arg-type, return-value]
    assert world.run()["embedded"] == 1
    world.check()


def test_indexes_that_cannot_be_read_are_built_again(world: World) -> None:
    world.overrides = ["embedding.vector_type=float16", "embedding.index_rows=256"]
    world.corpus = corpus_of(300)
    world.run()
    for file in (Path(str(world.table.path)) / "_indices").rglob("*.*"):
        file.unlink()
    assert not world.index().is_done()
    del world.corpus["doc3"]
    assert world.run() == {"untouched": 299, "deleted": 1}
    assert world.index().is_done()
    assert {index.name for index in world.table.open().describe_indices()} == {"id_idx", "vector_idx"}


def test_more_deletions_than_are_allowed_stop_the_job(world: World) -> None:
    world.run()
    whole = world.corpus
    world.corpus = dict(list(whole.items())[:150])
    with pytest.raises(JobError, match=r"50 of 200 documents in r-.* would be deleted.*max_deleted_fraction=1"):
        world.run()
    world.corpus = dict(list(whole.items())[:160])  # just what the default allows
    assert world.run()["deleted"] == 40
    world.overrides = ["embedding.max_deleted_fraction=1"]
    world.corpus = dict(list(whole.items())[:10])
    assert world.run()["deleted"] == 150
    world.check()
    world.overrides = []
    world.corpus = {name: (f"{text}!", each) for name, (text, each) in world.corpus.items()}  # edited, not gone
    assert world.run()["changed"] == 10
    world.check()


def test_texts_without_a_direction_are_set_aside_and_tried_again(world: World) -> None:
    encode = TextEncoder.encode_tokens

    def broken(self: TextEncoder, texts: Any, *args: Any) -> np.ndarray:
        vectors = encode(self, texts, *args).copy()
        if len(vectors) > 50:  # not the sample
            vectors[0] = np.nan
            vectors[1] = 0
        return vectors

    world.overrides = ["embedding.verify_sample=10"]
    with patch.object(*ENCODE, broken), pytest.raises(JobError, match=r"6 texts have no vector; .*dead_letters"):
        world.run()
    assert world.table.count() == TEXTS - 6
    assert published(world.config)[1] == world.table  # the others can be searched
    assert world.run() == {"new": 6, "embedded": 6, "untouched": TEXTS - 6}
    world.check()


def test_record_files_without_rows_and_of_large_documents(world: World) -> None:
    world.corpus = {"one": ("The only text there is.", {})}  # of three record files two have no rows
    documents = replace(world.index().documents, use_tokens=True)
    empty = documents.rows.index(0)
    assert sum(len(rows) for rows in documents.read(empty, ["id", "text", "tokens"])) == 0
    assert world.run()["embedded"] == 1
    world.check()
    world.corpus = {"one": ("word " * 200_000, {})}
    documents = world.index().documents
    assert 1e6 < documents.mean_bytes < 1.1e6
    assert [embed.fragment_rows(10**6, mean) for mean in (100, 1e6, 1e12)] == [10_000, 268, 1]
    assert world.run()["embedded"] == 1


def test_readers_see_a_verified_version_while_a_job_is_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    before = {row["id"] for row in world.rows()}
    world.corpus = edited(world.corpus)
    for name in ("delete", "mark_verified"):  # rows are there twice, or changed ones before they are verified
        with patch.object(Writer, name, side_effect=Killed), pytest.raises(Killed):
            world.run()
        found = TableSearch(world.table).query(np.ones(32), 1000)
        assert len(found) == TEXTS
        assert {row["id"] for row in found} == before
    world.run()
    assert {row["id"] for row in TableSearch(world.table).query(np.ones(32), 1000)} == {r["id"] for r in world.rows()}
    world.check()


def test_the_first_hybrid_query_leaves_the_table_verified(world: World) -> None:
    world.run()
    text = next(iter(world.corpus.values()))[0]
    other = TableSearch(world.table)
    assert TableSearch(world.table).hybrid(text, np.ones(32), 3)
    assert world.index().is_done()
    assert other.hybrid(text, np.ones(32), 3)  # opened before there was an index


@pytest.mark.parametrize("kind", ["mean", "chunks"])
def test_long_texts(kind: str, world: World) -> None:
    long = " ".join(text for text, _ in corpus_of(30, seed=1).values())
    world.corpus["long"] = (long, {"line": 1})
    world.overrides = [f"embedding.long_texts={kind}", "embedding.window_overlap=4"]
    world.run()
    encoder = TextEncoder(world.model, device="cpu")
    windows = TextEncoder(world.model, device="cpu", window_overlap=4).tokenizer.encode("text: " + long)
    pieces = [windows, *windows.overflowing]
    assert len(pieces) > 20
    vectors = encoder.encode_tokens(pa.array([piece.ids for piece in pieces], pa.list_(pa.int32())))
    found = sorted((row for row in world.rows() if row["source_id"] == "long"), key=lambda row: str(row["id"]))
    if kind == "mean":
        vectors = (vectors * [[len(piece.ids)] for piece in pieces]).sum(axis=0, keepdims=True)
        vectors /= np.linalg.norm(vectors)
    else:
        assert all(row["text"] in long for row in found)
        assert long.startswith(found[0]["text"][:20])
        assert long.endswith(found[-1]["text"][-20:])
        place = {"parent_id": content_id([long]), "parts": len(pieces)}
        assert [json.loads(row["metadata"]) for row in found] == [
            {"line": 1, **place, "part": part} for part in range(len(pieces))
        ]
        assert {row["parent_id"] for row in found} == {content_id([long])}
    assert len(found) == len(vectors)
    np.testing.assert_allclose([row["vector"] for row in found], vectors, atol=1e-5)
    assert world.run() == {}
    world.corpus["long"] = (long, {"line": 2})
    assert world.run() == {"untouched": TEXTS, "metadata": 1}
    changed_now = [row for row in world.rows() if row["source_id"] == "long"]
    assert {json.loads(row["metadata"])["line"] for row in changed_now} == {2}
    if kind == "chunks":
        assert sorted(json.loads(row["metadata"])["part"] for row in changed_now) == list(range(len(pieces)))
        world.table.open().delete(f"id = '{found[3]['id']}'")  # all of a text's chunks are made again
        assert world.run() == {"untouched": TEXTS, "new": 1, "embedded": len(pieces)}
        assert len([row for row in world.rows() if row["source_id"] == "long"]) == len(pieces)
    del world.corpus["long"]
    assert world.run()["deleted"] == 1
    if kind == "mean":
        world.check()


def test_the_vector_of_a_text_that_is_in_the_table(world: World) -> None:
    world.run()
    text = world.corpus["doc3"][0]
    encoder = TextEncoder(world.model, device="cpu")
    embedder = open_embedder(world.config)
    with patch.object(*ENCODE, None):
        found = embedder.get_embedding(f"  {text} ", cache_only=True)
        assert embedder.get_embedding("never seen", cache_only=True) is None
    assert found is not None
    np.testing.assert_allclose(found, encoder.encode([text], "document")[0], atol=1e-5)
    made = embedder.get_embedding("never seen")
    assert made is not None
    np.testing.assert_allclose(made, encoder.encode(["never seen"], "document")[0], atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnxruntime_gives_nearly_the_same_vectors(precision: str, world: World) -> None:
    pytest.importorskip("onnxruntime")
    world.overrides = ["embedding.backend=onnxruntime", f"embedding.precision={precision}"]
    assert world.run()["embedded"] == TEXTS  # its own verification encodes some again
    rows = world.rows()
    whole = TextEncoder(world.model, device="cpu").encode([row["text"] for row in rows], "document")
    cosines = (whole * np.array([row["vector"] for row in rows])).sum(axis=1)
    assert cosines.min() > {"fp32": 0.99999, "int8": 0.9}[precision]
    assert (cosines.min() < 0.99999) == (precision == "int8")


def test_runs_sizes_types_uris_and_models_have_tables_of_their_own(world: World, tmp_path: Path) -> None:
    world.run()
    tables = {str(world.table.path)}
    for overrides in (
        ["embedding.dimensions=16"],
        ["embedding.vector_type=float16"],
        ["embedding.uri=elsewhere"],
        ["storage.run=a/b"],
        ["storage.run=a.b"],
        ["storage.run=a-b"],
    ):
        world.overrides = overrides
        assert not world.index().is_done(), overrides
        assert world.run()["embedded"] == TEXTS, overrides
        tables.add(str(world.table.path))
    assert len(tables) == 7
    world.overrides = ["embedding.dimensions=16"]
    rows = world.rows()
    whole = TextEncoder(world.model, device="cpu").encode([row["text"] for row in rows], "document")[:, :16]
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose([row["vector"] for row in rows], whole, atol=1e-5)
    world.overrides = []
    assert world.index().is_done()
    world.corpus = edited(world.corpus)  # while the other tables stay behind
    world.run()
    world.overrides = ["embedding.uri=elsewhere"]
    assert world.run()["metadata"] == 3
    world.check()
    world.overrides = []
    shutil.rmtree(world.model)
    save_random_model(world.model, seed=1)
    assert world.run()["embedded"] == TEXTS + 3
    world.check()


def test_readers_go_on_with_the_table_and_the_model_that_were_published(world: World) -> None:
    with pytest.raises(JobError, match=r"the run r has no vectors yet; run tep run"):
        published(world.config)
    world.run()
    text = next(iter(world.corpus.values()))[0]
    vector = world.encoder().encode([text])[0]
    shutil.rmtree(world.model)
    save_random_model(world.model, seed=1)
    recipe, table = published(world.config)
    assert table.count() == TEXTS
    np.testing.assert_array_equal(open_encoder(recipe, 1, "cpu").encode([text])[0], vector)
    with patch.object(embed, "embed", side_effect=Killed), pytest.raises(Killed):  # the new model's table is not whole
        world.index().bring_up_to_date(lambda: None)  # type: ignore[arg-type, return-value]
    world.overrides = ["embedding.vector_type=float16", "embedding.uri=elsewhere"]  # not embedded yet
    assert published(world.config)[1] == table
    world.overrides = []
    publish(world.config, world.recipe, world.table)
    assert published(world.config)[0].local != recipe.local
    world.overrides = [f"embedding.model={world.model}"]
    assert published(world.config)[0].folder == world.model


def test_a_digest_is_that_of_all_places_and_of_nothing_else() -> None:
    """Against a hash of each place by itself, in Python; nulls, empty lists and slices as Lance gives them."""
    chance = random.Random(0)
    values = ["", "a", "ab", "1:a", ":", "ü", "日本", "\0", None]
    lists = [
        [{name: chance.choice(values) for name in PLACE_COLUMNS} for _ in range(chance.choice([1, 1, 2, 5]))]
        for _ in range(500)
    ]
    lists[3:5] = [[], None]  # type: ignore[list-item]
    column = pa.array(lists, pa.list_(PLACE))
    expected = []
    for places in lists:
        fields = [(place[name] or "").encode() for place in places or [] for name in PLACE_COLUMNS]
        expected.append(xxhash.xxh3_128_hexdigest(b":".join(b"%d:%s" % (len(one), one) for one in fields)))
    assert place_digests(column).to_pylist() == expected
    assert place_digests(column.slice(2, 40)).to_pylist() == expected[2:42]
    assert first_places(column.slice(2, 40)).to_pylist() == [places[0] if places else None for places in lists[2:42]]
    fields = {tuple(place[name] or "" for place in places or [] for name in PLACE_COLUMNS) for places in lists}
    assert len(set(expected)) == len(fields)


def test_documents_without_metadata_are_right_when_all_is_checked(world: World) -> None:
    world.run()
    with world.table.writing() as writer:
        rows = world.table.read([*world.table.schema.names, "_rowid"])
        bare = [[{**place, "metadata": None} for place in places] for places in rows["places"].to_pylist()]
        places = pa.array(bare, pa.list_(PLACE))
        of_content = [digest[DIGEST_CHARS:] for digest in rows["digest"].to_pylist()]
        digests = [a + b for a, b in zip(place_digests(places).to_pylist(), of_content, strict=True)]
        columns = {"metadata": pa.nulls(len(rows), pa.string()), "places": places, "digest": digests}
        own = {name: columns.get(name, rows[name]) for name in world.table.schema.names}
        writer.append(world.table.write(world.table.typed(pa.table(own)).sort_by("id")))
        writer.delete(rows["_rowid"].to_numpy())
    assert world.run()["embedded"] == 0
    world.check()
