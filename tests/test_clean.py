"""What nothing uses is removed, and nothing else: on disk and in a bucket, never under a running job."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from pipeline.config import Config, load
from pipeline.core import lock
from pipeline.core.files import files_below, lance_location, write_atomically
from pipeline.core.lock import locked
from pipeline.core.path import StoragePath, as_path, without_options
from pipeline.data.prepare import prepare
from pipeline.data.unused import find_unused, remove, tables
from pipeline.index import table
from pipeline.index.table import forget_versions, open_dataset
from pipeline.job import DEFAULT_CONFIG
from tests.bucket_servers import S3, s3
from tests.conftest import make_pairs, no_progress, progress, run_here, write_jsonl
from tests.embedding_world import World, corpus_of

A, B, D, E, F = (letter * 16 for letter in "abdef")  # keys of data sets and stages
M, N = "1" * 16, "2" * 16  # of models
T, U = "3" * 16, "4" * 16  # of tables

STAYS: dict[str, Any] = {
    # Runs that have something: a checkpoint, the best of one, an alias, an evaluation, a sweep
    "runs/good/run.json": {"data_fingerprint": f"{A}{B}"},
    "runs/good/attempt-001/step-00000100/state.json": {},
    "runs/team/best/run.json": {},
    "runs/team/best/best/step-00000100/state.json": {},
    "runs/searched/published.json": {"model": f"models/{M}", "table": f"/root/lancedb/searched-{T}.lance"},
    "runs/judged/evaluation.json": {"of": {"data": "no such"}},
    "runs/swept/tune/journal.jsonl": {"data": f"{D}{D}"},
    "runs/swept/tune/trials/0003/run.json": {},
    # What these name by fingerprint or folder, and what the config names
    f"prepared/{A}/manifest.json": {"fingerprint": f"{A}{B}", "files": {"x": {"from": f"stages/tokens-{A}"}}},
    f"prepared/{D}/manifest.json": {"fingerprint": f"{D}{D}", "files": {"x": {}}},
    f"prepared/{E}/manifest.json": {"fingerprint": "g", "files": {}},
    f"stages/tokens-{A}/tokens.parquet": {},
    f"stages/documents-{A}/manifest.json": {"data": A, "rows": [], "files": {}},
    f"models/{M}/config.json": {},
    f"onnx/{A}/manifest.json": {"model": f"{M}{M}", "files": {}},
    f"lancedb/searched-{T}.lance/data/1.lance": {},
    # Not named as ours
    "runs/.DS_Store": {},
    "runs/my-notes/todo.txt": {},
    "runs/outer/training.log": {},  # of a run that failed, with a good one below it
    "runs/outer/inner/run.json": {},
    "runs/outer/inner/attempt-001/step-00000001/state.json": {},
    "prepared/mine/notes.txt": {},
    "stages/notes.txt": {},
    "models/bert/model.safetensors": {},
    "lancedb/another.lance/_versions/1.manifest": {},
}
GOES: dict[str, dict[str, Any]] = {
    "runs/failed": {"training.log": {}, "run.json": {"data_fingerprint": "of a data set that is gone"}},
    "runs/team/failed": {"run.json": {}, "metrics.jsonl": {}},
    f"prepared/{B}": {"manifest.json": {"fingerprint": B * 4, "files": {"x": {"from": f"stages/tokens-{B}"}}}},
    f"prepared/{F}": {"records/00000.parquet": {}},
    f"stages/tokens-{B}": {"tokens.parquet": {}, "scratch/prepare/0.json": {}},
    f"stages/documents-{B}": {"manifest.json": {"data": B, "rows": [], "files": {}}},
    f"lancedb/gone-{U}.lance": {"data/1.lance": {}},
    f"models/{N}": {"model.safetensors": {}},
    f"onnx/{B}": {"manifest.json": {"model": f"{N}{N}", "files": {}}},
}


@pytest.fixture(scope="module")
def served() -> Iterator[S3]:
    with s3("store") as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, served: S3, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    monkeypatch.setattr(lock, "RENEW_EVERY_S", 0.05)
    return tmp_path / "root" if request.param == "disk" else as_path(served.uri(request.node.name.partition("[")[0]))


def fill(root: StoragePath) -> None:
    """A root with all that stays, and all that goes."""
    gone = {f"{folder}/{name}": content for folder, files in GOES.items() for name, content in files.items()}
    for name, content in {**STAYS, **gone}.items():
        write_atomically(root / name, json.dumps(content).encode())


def config_of(root: StoragePath, *overrides: str) -> Config:
    return load(DEFAULT_CONFIG, [f"storage.root={root}", f"data.prepared=prepared/{E}", *overrides], environ={})


def found_in(root: StoragePath, config: Config) -> set[str]:
    home = without_options(str(root))
    return {without_options(str(each.path)).removeprefix(f"{home}/") for each in find_unused(config)}


def names(root: StoragePath) -> set[str]:
    return {name for name in files_below(root) if not name.endswith(".lock")}


def make_old(root: Path, days: float = 8) -> None:
    for path in root.rglob("*"):
        os.utime(path, (time.time() - days * 86_400,) * 2)


def test_what_nothing_uses_goes_and_nothing_else(root: StoragePath) -> None:
    fill(root)
    assert found_in(root, config_of(root)) == GOES.keys()
    assert all(map(remove, list(find_unused(config_of(root)))))
    assert files_below(root).keys() == STAYS.keys()  # no lock is left either
    assert found_in(root, config_of(root)) == set()


def test_what_another_job_holds_stays(root: StoragePath) -> None:
    fill(root)
    with locked(root / "runs/failed"):
        kept = [each for each in find_unused(config_of(root)) if not remove(each)]
    assert [each.path for each in kept] == [root / "runs/failed"]
    assert names(root) == STAYS.keys() | {f"runs/failed/{name}" for name in GOES["runs/failed"]}


def test_without_its_sources_a_config_keeps_all_prepared_data(tmp_path: Path) -> None:
    fill(tmp_path)
    source = {"name": "s", "type": "json", "path": str(tmp_path / "not-mounted")}
    config = load(DEFAULT_CONFIG, [f"storage.root={tmp_path}", f"data.sources=[{json.dumps(source)}]"], environ={})
    gone = {name for name in GOES if not name.startswith(("prepared/", "stages/"))}
    assert found_in(tmp_path, config) == gone


def used_bytes(root: Path) -> int:
    return sum({(s := path.stat()).st_ino: s.st_size for path in root.rglob("*") if path.is_file()}.values())


@pytest.mark.usefixtures("ray_cluster")
def test_prepared_data_that_stays_is_whole(tmp_path: Path) -> None:
    """Of three data sets one has a run, and one is the config's: a rerun finds both, and their stages, as they were."""
    file, root = tmp_path / "c.yaml", tmp_path / "root"
    source = {"name": "s", "type": "json", "path": str(write_jsonl(tmp_path / "a.jsonl", make_pairs(300)))}
    file.write_text(json.dumps({"data": {"sources": [source]}, "tokenizer": {"vocab_size": 600}}))

    def config(length: int) -> Config:
        return load(file, [f"storage.root={root}", f"tokenizer.max_length={length}"], environ={})

    of_run, manifest = prepare(config(16), progress)
    of_none, _ = prepare(config(8), progress)
    of_config, _ = prepare(config(12), progress)
    write_atomically(root / "runs/r/attempt-001/step-00000001/state.json", b"{}")
    write_atomically(root / "runs/r/run.json", json.dumps({"data_fingerprint": manifest.fingerprint}).encode())
    unused, before = list(find_unused(config(12))), used_bytes(root)
    assert [each.kind for each in unused] == ["prepared", "stage"]
    assert unused[0].path == of_none
    assert all(map(remove, unused))
    freed, said = before - used_bytes(root), sum(each.bytes for each in unused)
    assert 0.8 * said < freed < 1.01 * said
    assert prepare(config(16), no_progress)[0] == of_run
    assert prepare(config(12), no_progress)[0] == of_config
    (of_config / "manifest.json").unlink()  # as after a kill at the end
    assert list(find_unused(config(12))) == []
    assert prepare(config(12), no_progress)[0] == of_config


def test_a_published_table_and_its_model_stay(tmp_path: Path) -> None:
    world = World(tmp_path, corpus_of(20))
    world.run()
    make(world.folder / f"lancedb/r-{U}.lance")  # an earlier model's
    assert found_in(world.folder, world.config) == {f"lancedb/r-{U}.lance"}
    for overrides in ("long_texts=chunks", "precision=bf16", "field=anchor", "dimensions=16", "vector_type=int8"):
        world.overrides = [f"embedding.{overrides}", "storage.run=a/b"]
        make(world.table.path)
        assert f"lancedb/{world.table.path.name}" in found_in(world.folder, world.config)


def make(path: StoragePath, rows: int = 1) -> None:
    uri, options = lance_location(path)
    lance.write_dataset(pa.table({"id": ["a"] * rows}), uri, storage_options=options)


def test_tables_forget_their_old_versions(root: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / f"lancedb/r-{T}.lance"
    make(path, 9)
    uri, options = lance_location(path)
    for i in range(3):
        lance.write_dataset(pa.table({"id": [str(i)]}), uri, mode="append", storage_options=options)
    assert tables(root) == [path]
    forget_versions(path, timedelta(0))
    assert len(open_dataset(path).versions()) == 4  # a search may read them for an hour
    monkeypatch.setattr(table, "READ_FOR", timedelta(milliseconds=1))
    with locked(path):
        forget_versions(path, timedelta(0))
    assert len(open_dataset(path).versions()) == 4
    assert forget_versions(path, timedelta(0)) > 0
    assert len(open_dataset(path).versions()) == 1
    assert open_dataset(path).count_rows() == 12


def test_the_job_removes_what_is_old_and_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"storage.root={tmp_path}", f"data.prepared=prepared/{E}"]
    code, last, out, _ = run_here(capsys, "clean", *arguments)
    assert (code, last["metrics"]) == (0, {"found": 0, "removed": 0, "bytes": 0})
    assert out.splitlines()[0] == f"nothing unused in {tmp_path}"
    fill(tmp_path)
    assert run_here(capsys, "clean", *arguments)[1]["metrics"]["found"] == 0  # it is young
    make_old(tmp_path)
    write_atomically(tmp_path / f"prepared/{F}/later.json", b"{}")  # one young file keeps its folder
    write_atomically(tmp_path / "runs/large/training.log", b"x" * 1_500_000)
    code, last, out, _ = run_here(capsys, "clean", "--dry-run", *arguments)
    assert (code, last["metrics"]["found"], last["metrics"]["removed"]) == (0, len(GOES) - 1, 0)
    assert "run again without --dry-run" in out
    code, last, out, _ = run_here(capsys, "clean", "--older-than", "0", "--larger-than", "1.4", *arguments)
    assert last["metrics"] == {"found": 1, "removed": 1, "bytes": 1_500_000}
    with locked(tmp_path / "runs/failed"):
        code, last, out, _ = run_here(capsys, "clean", "--older-than", "7.5", *arguments)
    assert f"kept {tmp_path / 'runs/failed'}: another job is at work there" in out
    assert last["metrics"]["removed"] == len(GOES) - 2
    code, _, _, err = run_here(capsys, "clean", "--older-than=-1", *arguments)
    assert (code, err) == (2, "clean: --older-than: found -1.0; allowed is a number from 0 to 10^8\n")
