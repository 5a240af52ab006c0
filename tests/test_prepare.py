"""Prepared data: the books balance, the bytes do not depend on how the work was cut, and bad input is data."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError, load
from pipeline.data import prepare as prepare_module
from pipeline.data import sources
from pipeline.data.manifest import read_manifest
from pipeline.data.prepare import prepare
from pipeline.runtime.job import JobError
from pipeline.runtime.session import Board
from pipeline.text.identity import content_id, is_validation
from tests.conftest import make_pairs, write_jsonl

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_of(root: Path, path: Path, *overrides: str) -> Config:
    file = root / "c.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps(
            {
                "data": {
                    "sources": [{"name": "s", "type": "json", "path": str(path), "metadata": ["line"]}],
                    "validation_fraction": 0.1,
                },
                "tokenizer": {"vocab_size": 600, "max_length": 16},
            }
        )
    )
    return load(file, [f"storage.root={root / 'store'}", *overrides], environ={})


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


@pytest.fixture
def messy_file(tmp_path: Path) -> Path:
    rows = make_pairs(3000)
    rows += [dict(row, id=f"copy{i}") for i, row in enumerate(rows[:70])]
    rows += [{"anchor": "short", "positive": "s"}, {"anchor": "\x00\x01\x02" * 9, "positive": "not to be printed"}]
    path = write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    with path.open("ab") as file:
        file.write(b'{"anchor": "broken\n{"anchor": "alone, with no positive"}\n')
    return path


def test_every_record_is_accounted_for(messy_file: Path, tmp_path: Path) -> None:
    folder, manifest = prepare(config_of(tmp_path, messy_file), Board)
    (source,) = manifest.sources
    expected = {json.dumps([row["anchor"], row["positive"]]) for row in make_pairs(3000)}
    assert source.rows_in == 3074
    assert source.rows_kept == len(expected)
    assert source.rejected == {
        "broken_json": 1,
        "duplicate": 3070 - len(expected),
        "missing_field": 1,
        "nonprintable": 1,
        "too_short": 1,
    }
    rejected = pq.read_table(folder / "rejected")
    assert Counter(rejected["reason"].to_pylist()) == source.rejected
    assert all(rejected["excerpt"].to_pylist())
    kept = pq.read_table(folder / "records").to_pylist()
    assert {json.dumps([row["anchor"], row["positive"]]) for row in kept} == expected
    assert all(row["id"] == content_id([row["anchor"], row["positive"]]) for row in kept)
    assert all(set(json.loads(row["metadata"])) == {"line"} for row in kept)


def test_shards_hold_the_tokens_of_the_records_and_the_split_is_by_hash(messy_file: Path, tmp_path: Path) -> None:
    folder, manifest = prepare(config_of(tmp_path, messy_file), Board)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    records = {row["id"]: row for row in pq.read_table(folder / "records").to_pylist()}
    seen = []
    for shard in manifest.shards:
        rows = pq.read_table(folder / shard.path).to_pylist()
        assert len(rows) == shard.rows == sum(shard.row_groups)
        assert hashlib.sha256((folder / shard.path).read_bytes()).hexdigest() == shard.sha256
        for row in rows:
            assert row["anchor"] == tokenizer.encode(records[row["id"]]["anchor"]).ids
            assert row["positive"] == tokenizer.encode(records[row["id"]]["positive"]).ids
            assert is_validation(row["id"], 0.1) == (shard.split == "validation")
        seen += [row["id"] for row in rows]
    assert sorted(seen) == sorted(records)
    assert manifest.lengths["positive"]["max"] == 16


def test_bytes_do_not_depend_on_order_or_cut(messy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same records shuffled over three files, read in many small tasks into the same number of shards."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 100_000)
    first, manifest = prepare(config_of(tmp_path / "1", messy_file), Board)
    assert len(list((first / "records").iterdir())) > 2
    lines = messy_file.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        (other / f"{i}.jsonl").write_bytes(b"".join(lines[i::3]))
    monkeypatch.setattr(sources, "TASK_BYTES", 20_000)
    second, again = prepare(config_of(tmp_path / "2", other), Board)
    skip = "rejected"  # whose source_ids name files and offsets
    assert {k: v for k, v in contents(first).items() if skip not in k} == {
        k: v for k, v in contents(second).items() if skip not in k
    }
    assert manifest.fingerprint == again.fingerprint


def test_nothing_to_do_and_what_makes_it_stale(messy_file: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, messy_file)
    folder, manifest = prepare(config, Board)

    def no_board() -> Board:
        raise AssertionError("Ray was asked for")

    assert prepare(config, no_board) == (folder, manifest)
    with messy_file.open("a") as file:
        file.write(json.dumps({"anchor": "a record added later", "positive": "which makes the data stale"}) + "\n")
    later, changed = prepare(config, Board)
    assert later != folder
    assert changed.sources[0].rows_kept == manifest.sources[0].rows_kept + 1


def test_finished_stages_are_not_done_again(messy_file: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, messy_file)
    folder, manifest = prepare(config, Board)
    times = {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    (folder / "manifest.json").unlink()  # as after a kill
    next((folder / "train").iterdir()).unlink()
    assert prepare(config, Board) == (folder, manifest)
    assert {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()} == times
    assert read_manifest(folder) == manifest


def test_names_and_ids_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "\\ud800", "line": "\\udfff", "anchor": "an anchor text", "positive": "a positive text"}\n')
    folder, _ = prepare(config_of(tmp_path, path), Board)
    (row,) = pq.read_table(folder / "records").to_pylist()
    assert (row["source_id"], row["metadata"]) == ("s:?", '{"line": "?"}')


def test_of_equal_records_the_same_one_stays_in_any_order(tmp_path: Path) -> None:
    rows = [{"id": "x", "line": i, "anchor": "an anchor text", "positive": "a positive text"} for i in range(5)]
    kept = []
    for name, order in (("1", rows), ("2", rows[::-1])):
        folder, _ = prepare(config_of(tmp_path / name, write_jsonl(tmp_path / name / "a.jsonl", order)), Board)
        kept.append(pq.read_table(folder / "records").to_pylist())
    assert kept[0] == kept[1]


def test_a_tokenizers_padding_is_not_trained_on(messy_file: Path, tmp_path: Path) -> None:
    folder, _ = prepare(config_of(tmp_path, messy_file), Board)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.enable_padding(length=14)
    own.save(str(tmp_path / "own.json"))
    other, _ = prepare(config_of(tmp_path / "2", messy_file, f"tokenizer.load_path={tmp_path / 'own.json'}"), Board)
    assert contents(other / "train") == contents(folder / "train")


def test_a_tokenizer_of_ones_own(messy_file: Path, tmp_path: Path) -> None:
    folder, _ = prepare(config_of(tmp_path, messy_file), Board)
    own = tmp_path / "own.json"
    own.write_bytes((folder / "tokenizer.json").read_bytes())
    other, _ = prepare(config_of(tmp_path / "2", messy_file, f"tokenizer.load_path={own}"), Board)
    assert (other / "tokenizer.json").read_bytes() == own.read_bytes()
    with pytest.raises(ConfigError, match=r"no\.json"):
        prepare(config_of(tmp_path / "3", messy_file, f"tokenizer.load_path={tmp_path / 'no.json'}"), Board)


def test_too_much_bad_input_stops_with_a_sentence(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_pairs(30))
    with path.open("a") as file:
        file.write("{broken\n" * 10)
    with pytest.raises(JobError, match=r"source s: 10 broken_json of 40 records .*max_bad_fraction=0\.05"):
        prepare(config_of(tmp_path, path), Board)
    assert prepare(config_of(tmp_path, path, "data.max_bad_fraction=0.3"), Board)[1].sources[0].rejected == {
        "broken_json": 10
    }


def test_everything_rejected_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b"}])
    with pytest.raises(JobError, match=r"none of its 1 records was kept \(1 too_short\)"):
        prepare(config_of(tmp_path, path), Board)
