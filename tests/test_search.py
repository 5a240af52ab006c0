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
from pipeline.embedding.columns import as_column
from pipeline.embedding.store import named_store
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
    monkeypatch.setattr("pipeline.stages.model_folder", lambda _: tmp_path)
    monkeypatch.setattr("pipeline.embedding.store.recipe_of", lambda *_: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr("pipeline.embedding.encode.open_encoder", lambda *_, **__: Words())
    monkeypatch.setattr("pipeline.embedding.store.open_store", lambda c, _: named_store(c, "t", WIDTH))

    def run(*args: str) -> tuple[int, Any, str]:
        shared = ["--config", str(config), f"storage.root={tmp_path}"]
        code, last, out, err = run_here(capsys, "search", *shared, *args)
        return code, last, out + err

    def fill(*overrides: str) -> None:
        store = named_store(load(config, [f"storage.root={tmp_path}", *overrides]), "t", WIDTH)
        store.create()
        texts, metadata = zip(*TEXTS.values(), strict=True)
        columns = {"id": list(TEXTS), "source": ["code", "web", "web"], "source_id": [f"s:{i}" for i in TEXTS]}
        columns |= {"text": texts, "metadata": list(map(json.dumps, metadata))}
        assert store.upsert(pa.table({**columns, "vector": as_column(Words().encode(texts))})) == []

    run.fill = fill  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("kind", ["lancedb", "parquet", "pinecone"])
def test_from_any_store_with_conditions(kind: str, search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", "k")
    with pinecone_server("k") as server:
        settings = [f"embedding.store={kind}", f"pinecone.host={server.url}", "pinecone.create=true"]
        code, _, said = search(*settings, "merge lists")
        assert code == 1
        assert "no index yet" in said
        search.fill(*settings)
        code, found, _ = search(*settings, "merge lists", "--json")
        assert code == 0
        assert [one["id"] for one in found] == ["a", "b", "c"]
        assert set(found[0]) == {"rank", "score", "id", "source_id", "text", "metadata"}
        assert found[0]["metadata"] == TEXTS["a"][1]
        for conditions, ids in (
            (["--where", "source=web"], ["b", "c"]),
            (["--where", "source=web", "--where", "line>100"], ["c"]),
            (["--where", "name=[merge, window]", "--limit", "1"], ["a"]),
            (["--where", "name=nothing"], []),
        ):
            code, found, _ = search(*settings, "merge lists", "--json", *conditions)
            assert (code, [one["id"] for one in found]) == (0, ids), conditions
        code, _, said = search(*settings, "merge lists", "--where", "source=code")
        assert code == 0
        assert "lists.py:3  merge" in said
        code, found, said = search(*settings, "--hybrid", "merge a request", "--json")
        if kind == "lancedb":
            assert found[0]["id"] == "b"
        else:
            assert code == 2
            assert f"--hybrid: found embedding.store={kind}; allowed with it is lancedb alone" in said


def test_conditions_that_are_none(search: Any) -> None:
    code, _, said = search("words", "--where", "source")
    assert code == 2
    assert "--where 'source': allowed are key=value" in said
