"""jobs/search.py over a store of each kind, with a model that knows only which words a text has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from pipeline.config import load
from pipeline.index.documents import PLACE_COLUMNS
from pipeline.index.published import open_pinecone
from pipeline.index.table import PLACE, VectorTable
from pipeline.index.vectors import as_column
from pipeline.job import DEFAULT_CONFIG
from tests.conftest import run_here
from tests.pinecone_server import pinecone_server

WIDTH = 64
TEXTS = {
    "a": ("merge two sorted lists", {"name": "merge", "file": "lists.py", "line": 3}),
    "b": ("merge a pull request", {"name": "pull", "line": 40}),
    "c": ("open a window", {"name": "window", "line": 400}),
}


class Words:
    """A text's words, each at a place of its own."""

    def encode(self, texts: list[str], prompt: str = "") -> np.ndarray:
        vectors = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, xxhash.xxh32_intdigest(word.encode()) % WIDTH] += 1
        return vectors


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    config = tmp_path / "c.yaml"
    config.write_text("{}")
    table = VectorTable(tmp_path / "lancedb", "t", WIDTH)
    monkeypatch.setattr("pipeline.index.search.published", lambda _: (SimpleNamespace(folder=tmp_path), table))
    monkeypatch.setattr("pipeline.index.search.open_encoder", lambda *_, **__: Words())

    def run(*args: str) -> tuple[int, Any, str]:
        shared = ["--config", str(config), f"storage.root={tmp_path}"]
        code, last, out, err = run_here(capsys, "search", *shared, *args)
        return code, last, out + err

    def fill() -> None:
        texts, metadata = zip(*TEXTS.values(), strict=True)
        columns = {"id": list(TEXTS), "source": ["code", "web", "web"], "source_id": [f"s:{i}" for i in TEXTS]}
        columns |= {"text": texts, "metadata": list(map(json.dumps, metadata)), "digest": ["0" * 32] * 3}
        places = [{name: columns[name][row] for name in PLACE_COLUMNS} for row in range(3)]
        places_of = [[places[0]], [places[1]], [places[2], {"source": "code", "source_id": "s:d", "metadata": "{}"}]]
        rows = pa.table(
            {**columns, "places": pa.array(places_of, pa.list_(PLACE)), "vector": as_column(Words().encode(texts))}
        )
        with table.writing() as writer:
            writer.append(table.write(table.stored(rows)))

    run.fill = fill  # type: ignore[attr-defined]
    run.table = table  # type: ignore[attr-defined]
    return run


def test_with_conditions(search: Any) -> None:
    code, _, said = search("merge lists")
    assert code == 1
    assert " yet for the model in" in said
    search.fill()
    code, found, _ = search("merge lists", "--json")
    assert code == 0
    assert [one["id"] for one in found] == ["a", "b", "c"]
    assert set(found[0]) == {"rank", "score", "id", "source_id", "text", "metadata"}
    assert found[0]["metadata"] == TEXTS["a"][1]
    for conditions, ids in (
        (["--where", "source=web"], ["b", "c"]),
        (["--where", "source=code"], ["a", "c"]),  # the other place of c
        (["--where", "source=web", "--where", "line>100"], ["c"]),
        (["--where", "source=code", "--where", "line>100"], []),  # one place has to meet both
        (["--where", "name=[merge, window]", "--limit", "1"], ["a"]),
        (["--where", "name=nothing"], []),
    ):
        code, found, _ = search("merge lists", "--json", *conditions)
        assert (code, [one["id"] for one in found]) == (0, ids), conditions
    code, _, said = search("merge", "lists", "--where", "source=code")  # words need no quotes
    assert code == 0
    assert "lists.py:3  merge" in said


def test_no_results_are_explained(search: Any) -> None:
    with search.table.writing() as writer:
        writer.begin()
    for argument in ([], ["--json"], ["--where", "source=web"]):
        code, _, said = search("merge lists", *argument)
        assert code == 0
        assert "no results: the table" in said
        assert "is empty; tep embed fills it" in said
    search.fill()
    code, found, said = search("merge lists", "--where", "source=wbe", "--json")
    assert (code, found) == (0, [])
    assert "no results: no record meets the condition on source, which has values such as code, web" in said


def test_hybrid_says_that_its_scores_are_of_ranks(search: Any, tmp_path: Path) -> None:
    search.fill()
    code, found, _ = search("--hybrid", "merge a request", "--json")
    assert (code, found[0]["id"], found[0]["score_type"]) == (0, "b", "fusion")
    _, _, said = search("--hybrid", "merge a request")
    assert "scores are sums of 1 / (60 + rank) over the rankings by meaning and by words" in said
    code, _, said = search("--hybrid", "merge", "embedding.store=pinecone")
    assert code == 2
    assert "--hybrid: found embedding.store=pinecone; allowed with it are lancedb and parquet" in said


def test_from_pinecone(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", "k")
    with pinecone_server("k") as server:
        settings = ["embedding.store=pinecone", f"pinecone.host={server.url}", "pinecone.create=true"]
        search.fill()
        config = load(DEFAULT_CONFIG, settings)
        store = open_pinecone(config, search.table)
        store.create()
        assert store.upsert(search.table.read(search.table.schema.names)) == []
        code, found, _ = search("merge lists", "--json", *settings)
        assert (code, [one["id"] for one in found]) == (0, ["a", "b", "c"])
        code, found, _ = search("merge lists", "--json", "--where", "line>100", *settings)
        assert (code, [one["id"] for one in found]) == (0, ["c"])
        code, _, said = search("merge lists", "--where", "nosuch=1", *settings)
        assert code == 2
        assert "no record with the key 'nosuch'; the keys are source, source_id, file, line, name" in said
        code, _, said = search("merge lists", "--where", "line>100", "pinecone.metadata=[name]", *settings)
        assert code == 2
        assert "found line, which Pinecone does not hold; allowed are source, source_id, name (pinecone" in said


def test_conditions_that_are_none(search: Any) -> None:
    search.fill()
    for condition, sentence in (
        ("source", "--where 'source': allowed are key=value"),
        ("nosuch=1", "no record with the key 'nosuch'; the keys are source, source_id, file, line, name"),
        ("name>5", "bounds on name, which has no numbers, but values such as"),
    ):
        code, _, said = search("words", "--where", condition)
        assert code == 2
        assert sentence in said
