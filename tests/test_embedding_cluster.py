"""Embedding through Ray: pairs that share texts, many commits, indexes by all workers, Parquet beside the table."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lance_ray
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data.partitions import content_id
from pipeline.index import embed
from pipeline.index.encoder import TextEncoder
from pipeline.index.table import VectorTable
from pipeline.index.vectors import as_matrix
from pipeline.index.writer import Writer
from tests.conftest import make_pairs, run_here, write_jsonl
from tests.embedding_world import save_random_model

PAIRS, PASSAGES = 1200, 600

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_pairs_that_share_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(PAIRS)
    passages = [f"{pair['positive']} Passage {number}." for number, pair in enumerate(pairs[:PASSAGES])]
    for number, pair in enumerate(pairs):  # two questions about one passage
        pair["positive"] = passages[number % PASSAGES]
    model = save_random_model(tmp_path / "model")
    fields = {"anchor": "anchor", "positive": "positive"}
    source: dict[str, Any] = {"name": "s", "type": "json", "fields": fields, "metadata": ["line"]}
    source["path"] = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    root, config = tmp_path / "root", tmp_path / "c.yaml"
    config.write_text(json.dumps({"data": {"sources": [source]}, "tokenizer": {"vocab_size": 600}}))
    commits: list[int] = []
    append = Writer.append

    def counting(self: Writer, fragments: Any) -> None:
        commits.append(len(fragments))
        append(self, fragments)

    monkeypatch.setattr(Writer, "append", counting)
    monkeypatch.setattr(embed, "MIN_WAVE_S", -1e9)  # a commit for each fragment
    monkeypatch.setattr(embed, "MIN_FRAGMENT_ROWS", 100)
    monkeypatch.setattr(embed, "SPREAD_ROWS", 256)
    monkeypatch.setattr(embed, "LOCAL_ROWS", 0)
    create_index = Mock(side_effect=partial(lance_ray.create_index, num_partitions=2))  # for so few rows
    monkeypatch.setattr(lance_ray, "create_index", create_index)

    def run(*options: str) -> dict[str, Any]:
        common = [
            "--config",
            str(config),
            f"storage.root={root}",
            f"embedding.model={model}",
            "embedding.index_rows=256",
        ]
        code, last, _, err = run_here(capsys, "embed", *common, *options)
        assert code == 0, err
        return dict(last)

    last = run("embedding.store=parquet")
    assert last["metrics"]["embedded"] == last["metrics"]["rows"] == PASSAGES
    assert len(commits) >= 2
    assert sum(commits) >= 6
    assert last["metrics"]["recall@10"] > 0.9
    table = VectorTable(root / "lancedb", last["paths"]["table"], 32)
    rows = {row["text"]: row for row in table.read(table.schema.names).to_pylist()}
    assert rows.keys() == {pair["positive"] for pair in pairs}
    vectors = TextEncoder(model, 1, "cpu").encode(list(rows), "document")
    np.testing.assert_allclose([row["vector"] for row in rows.values()], vectors, atol=1e-5)
    for number, pair in enumerate(pairs[:PASSAGES]):
        row = rows[str(pair["positive"])]
        assert row["id"] == content_id([row["text"]])
        lines = [json.loads(place["metadata"])["line"] for place in row["places"]]
        assert sorted(lines) == sorted([pairs[number]["line"], pairs[number + PASSAGES]["line"]])
    assert {index.field_names[0] for index in table.open().describe_indices()} == {"id", "vector"}
    create_index.assert_called_once()
    snapshot = pq.read_table(Path(last["metrics"]["parquet"]) / "rows")
    assert snapshot["id"].to_pylist() == sorted(row["id"] for row in rows.values())

    pairs[3]["line"] = -5  # one place of one text, one new text, and two that are gone with all their places
    pairs[4]["positive"] = "A passage that was not there."
    left = [pair for number, pair in enumerate(pairs) if number % PASSAGES not in (7, 8)]
    write_jsonl(tmp_path / "pairs.jsonl", left)
    planned = run("--dry-run")["metrics"]
    changes = {"new": 1, "changed": 0, "metadata": 2, "untouched": PASSAGES - 4, "deleted": 2}
    assert changes.items() <= planned.items()
    metrics = run()["metrics"]
    assert {**changes, "embedded": 1, "rows": PASSAGES - 1}.items() <= metrics.items()
    after = table.read(["text", "vector"])
    assert set(after["text"].to_pylist()) == {pair["positive"] for pair in left}
    kept = dict(zip(after["text"].to_pylist(), as_matrix(after["vector"]), strict=True))
    assert all(np.array_equal(kept[text], row["vector"]) for text, row in rows.items() if text in kept)
    assert run()["metrics"] == {"embedded": 0, "rows": PASSAGES - 1}
