"""Data prepared in a bucket is, byte for byte, what is prepared on a disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, load
from pipeline.core.path import BucketPath
from pipeline.data.feed import training_plan, validation_rows
from pipeline.data.manifest import read_prepared
from pipeline.data.prepare import Inputs, prepare
from pipeline.evaluation.tasks import held_out_task
from tests.bucket_servers import Served, s3
from tests.conftest import make_pairs, no_progress, progress, write_jsonl
from tests.test_similarity import variants

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def served() -> Iterator[Served]:
    with s3("data") as server:
        yield server


def config_of(root: str, folder: Path) -> Config:
    rows = make_pairs(500)
    near = [dict(rows[0], id=f"near{i}", positive=text) for i, text in enumerate(variants(20, seed=1))]
    write_jsonl(folder / "a.jsonl", rows + [dict(row, id=f"copy{i}") for i, row in enumerate(rows[:70])])
    write_jsonl(folder / "b.jsonl", [*near, {"anchor": "short", "positive": "s"}])
    (folder / "b.jsonl").open("ab").write(b'{"anchor": "broken\n')
    write_jsonl(folder / "beir" / "corpus.jsonl", [{"_id": "d", "text": rows[5]["positive"]}])
    write_jsonl(folder / "beir" / "queries.jsonl", [{"_id": "q", "text": rows[6]["anchor"]}])
    (folder / "c.yaml").write_text(
        json.dumps(
            {
                "data": {
                    "sources": [{"name": "s", "type": "json", "path": str(folder / "[ab].jsonl")}],
                    "validation_fraction": 0.1,
                    "near_duplicates": {"threshold": 0.8},
                    "decontaminate": [str(folder / "beir")],
                },
                "tokenizer": {"vocab_size": 600, "max_length": 16},
            }
        )
    )
    return load(folder / "c.yaml", [f"storage.root={root}"], environ={})


def test_a_bucket_holds_the_bytes_of_a_disk(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.prepare.SHARD_BYTES", 1 << 14)
    monkeypatch.setattr(tempfile, "tempdir", None)
    local = config_of(str(tmp_path / "disk"), tmp_path / "in")
    remote = config_of(served.uri("bucket"), tmp_path / "in")
    folder, expected = prepare(local, progress)
    place, manifest = prepare(remote, progress)
    assert isinstance(folder, Path)
    assert isinstance(place, BucketPath)
    assert manifest == expected == read_prepared(place)
    (source,) = manifest.sources
    assert {"duplicate", "near_duplicate", "contaminated", "broken_json"} <= source.rejected.keys()
    assert len([shard for shard in manifest.shards if shard.split == "train"]) > 2

    on_disk = {
        path.relative_to(tmp_path / "disk").as_posix(): path
        for path in (tmp_path / "disk").rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    there = {key.removeprefix("bucket/") for key in served.keys("bucket/")}
    assert {name for name in there if not name.endswith(".lock")} == on_disk.keys()
    for name, path in on_disk.items():
        if path.name != "manifest.json":  # which holds seconds; the data set's was compared
            assert served.read(f"bucket/{name}") == path.read_bytes(), name
    assert prepare(remote, no_progress) == (place, manifest)

    for step in (0, 3):
        plans = [training_plan(where, manifest, 64, seed=1) for where in (folder, place)]
        assert plans[0].read(step, step + 2, 1, 2) == plans[1].read(step, step + 2, 1, 2)
    assert validation_rows(folder, manifest, 50) == validation_rows(place, manifest, 50)
    assert held_out_task(local, folder) == held_out_task(remote, place)

    tokens = Inputs(remote).tokens.folder  # killed before its end, with one shard short
    (tokens / "manifest.json").unlink()
    (place / "manifest.json").unlink()
    assert prepare(remote, progress) == (place, manifest)
