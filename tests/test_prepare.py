"""Prepared data: the books balance, the bytes do not depend on how the work was cut, and bad input is data."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from pipeline.config import Config, ConfigError, load
from pipeline.core.artifact import Artifact, Output
from pipeline.core.outcome import JobError
from pipeline.data import prepare as prepare_module
from pipeline.data import sources
from pipeline.data.manifest import Manifest
from pipeline.data.partitions import content_id, is_validation
from pipeline.data.prepare import Inputs, prepare
from tests.conftest import make_pairs, no_progress, progress, write_jsonl
from tests.test_similarity import likeness, variants, word_tuples

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


def write_messy(path: Path) -> Path:
    rows = make_pairs(3000)
    rows += [dict(row, id=f"copy{i}") for i, row in enumerate(rows[:70])]
    rows += [{"anchor": "short", "positive": "s"}, {"anchor": "\x00\x01\x02" * 9, "positive": "not to be printed"}]
    with write_jsonl(path, rows).open("ab") as file:
        file.write(b'{"anchor": "broken\n{"anchor": "alone, with no positive"}\n')
    return path


@dataclass
class Messy:
    """A source with something of everything, prepared once into several shards. Tests leave it as it is."""

    root: Path
    path: Path
    config: Config
    folder: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Messy:
    root = tmp_path_factory.mktemp("messy")
    path = write_messy(root / "in" / "a.jsonl")
    config = config_of(root, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD_BYTES", 100_000)
        folder, manifest = prepare(config, progress)
    assert isinstance(folder, Path)
    return Messy(root, path, config, folder, manifest)


def test_every_record_is_accounted_for(messy: Messy) -> None:
    folder, manifest = messy.folder, messy.manifest
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


def test_shards_hold_the_tokens_of_the_records_and_the_split_is_by_hash(messy: Messy) -> None:
    folder, manifest = messy.folder, messy.manifest
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


def test_bytes_do_not_depend_on_order_or_cut(messy: Messy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same records shuffled over three files, read in many small tasks into the same number of shards."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 100_000)
    assert len(list((messy.folder / "records").iterdir())) > 2
    lines = messy.path.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        (other / f"{i}.jsonl").write_bytes(b"".join(lines[i::3]))
    monkeypatch.setattr(sources, "TASK_BYTES", 20_000)
    second, again = prepare(config_of(tmp_path, other), progress)
    skip = "rejected"  # whose source_ids name files and offsets
    assert {k: v for k, v in contents(messy.folder).items() if skip not in k} == {
        k: v for k, v in contents(second).items() if skip not in k
    }
    assert messy.manifest.fingerprint == again.fingerprint


def test_what_is_done_is_found_and_what_changed_is_done_again(tmp_path: Path) -> None:
    """Inputs are known by their path, size and time, or by their content; a killed job does only what is missing."""
    path = write_jsonl(tmp_path / "a.jsonl", make_pairs(300))
    config = config_of(tmp_path, path)
    folder, manifest = prepare(config, progress, rehash=True)
    assert prepare(config, no_progress, rehash=True) == (folder, manifest)

    found, files = contents(folder), {p: p.stat().st_mtime_ns for p in folder.rglob("records/*.parquet")}
    (folder / "manifest.json").unlink()
    for file in folder.glob("train/*"):
        file.unlink()
    assert prepare(config, no_progress, rehash=True) == (folder, manifest)  # every stage was done
    assert contents(folder) == found
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("records/*.parquet")} == files

    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert prepare(config, no_progress, rehash=True)[0] == folder
    path.write_bytes(path.read_bytes().replace(b"invoice", b"receipt"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare(config, progress, rehash=True)[0] != folder

    before, manifest = prepare(config, progress)
    assert prepare(config, no_progress) == (before, manifest)
    with path.open("a") as file:
        file.write(json.dumps({"anchor": "a record added later", "positive": "which makes the data stale"}) + "\n")
    later, changed = prepare(config, progress)
    assert later != before
    assert changed.sources[0].rows_kept == manifest.sources[0].rows_kept + 1


def stages(root: Path) -> dict[str, int]:
    """Each finished stage and when it was."""
    found = (root / "store" / "stages").glob("*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("tokenizer.max_length=8", {"tokens"}),
        ("data.validation_fraction=0.2", {"tokens"}),
        ("data.sources.0.prompts={anchor: 'find: '}", {"tokens"}),
        ("data.sources.0.weight=2.0", set()),
        ("data.max_bad_fraction=0.5", set()),
        ("tokenizer.vocab_size=700", {"tokenizer", "tokens"}),
        ("data.near_duplicates.threshold=0.9", {"distinct", "tokenizer", "tokens"}),
        ("data.min_chars=12", {"records", "tokenizer", "tokens"}),
    ],
)
def test_a_changed_option_redoes_what_depends_on_it(
    override: str, redone: set[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = tmp_path_factory.getbasetemp() / "changed-options"
    path = shared / "a.jsonl"
    if not path.exists():
        write_jsonl(path, make_pairs(300))
    prepare(config_of(shared, path), progress)
    before = stages(shared)
    prepare(config_of(shared, path, override), progress if redone else no_progress)
    after = stages(shared)
    assert {name.rpartition("-")[0] for name in set(after) - set(before)} == redone
    assert {name: after[name] for name in before} == before


def test_what_goes_wrong_in_a_task_is_said_in_one_sentence(tmp_path: Path) -> None:
    def work(index: int, output: Output) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(JobError, match=r"^prepare: x: the disk that holds .* is full; free some space .*$"):
        Artifact(tmp_path, "x", []).tasks(progress(), "prepare: x", [1], work)


def test_sources_together(tmp_path: Path) -> None:
    """Clashing ids, duplicates over sources, weights, prompts; one source is all duplicates, one is empty."""
    rows = make_pairs(60)
    for name, part in (("one", rows[:40]), ("two", rows[20:]), ("copies", [rows[0]] * 9), ("empty", [])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{**row, "id": f"doc{i}"} for i, row in enumerate(part)])
    prompts = {"one": {"anchor": "find: "}}
    entries = [
        {"name": name, "type": "json", "path": str(tmp_path / f"{name}.jsonl"), "weight": i + 1.0}
        | ({"prompts": prompts[name]} if name in prompts else {})
        for i, name in enumerate(("one", "two", "copies", "empty"))
    ]
    folder, manifest = prepare(config_of(tmp_path, tmp_path, f"data.sources={json.dumps(entries)}"), progress)
    found = {source.name: source for source in manifest.sources}
    assert [found[name].rows_in for name in found] == [40, 40, 9, 0]
    assert sum(source.rows_kept for source in found.values()) == 60
    assert found["copies"].rows_kept in (0, 1)  # it may have the least source_id
    assert [source.weight for source in manifest.sources] == [1.0, 2.0, 3.0, 4.0]
    assert found["one"].prompts == {"anchor": "find: "}
    records = pq.read_table(folder / "records")
    assert len(set(records["source_id"].to_pylist())) == 60
    rejected = pq.read_table(folder / "rejected").to_pylist()
    assert {row["duplicate_of"] for row in rejected} <= set(records["source_id"].to_pylist())
    assert manifest.shards[0].row_group_sources == sorted({*records["source"].to_pylist()})


def test_sources_with_and_without_negatives(tmp_path: Path) -> None:
    rows = make_pairs(60)
    for row in rows[:30]:
        row["negatives"] = ["nothing to do with it at all", "nor has this one"]
    entries = [
        {"name": name, "type": "json", "path": str(write_jsonl(tmp_path / f"{name}.jsonl", part)), "fields": fields}
        for name, part, fields in (
            ("with", rows[:30], {"anchor": "anchor", "positive": "positive", "negatives": "negatives"}),
            ("without", rows[30:], {"anchor": "anchor", "positive": "positive"}),
        )
    ]
    folder, manifest = prepare(config_of(tmp_path, tmp_path, f"data.sources={json.dumps(entries)}"), progress)
    negatives = {row["source"]: row["negatives"] for row in pq.read_table(folder / "train").to_pylist()}
    assert len(negatives["with"]) == 2
    assert negatives["without"] == []
    assert manifest.lengths["negatives"]["rows"] == 60


def test_the_cap_on_duplicates(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_pairs(10) * 3)
    with pytest.raises(JobError, match=r"20 of 30 records are duplicates, more than data\.max_removed_fraction=0\.5"):
        prepare(config_of(tmp_path, path, "data.max_removed_fraction=0.5"), progress)
    words = [f"word{i}" for i in range(50)]
    near = [{"anchor": f"anchor number {i}", "positive": " ".join([*words, str(i)])} for i in range(20)]
    path = write_jsonl(tmp_path / "b.jsonl", near)
    likely = "data.near_duplicates.threshold=0.7"
    with pytest.raises(JobError, match=r"19 of 20 records are duplicates"):
        prepare(config_of(tmp_path, path, likely, "data.max_removed_fraction=0.5"), progress)
    _, manifest = prepare(config_of(tmp_path, path, likely), progress)
    assert (manifest.sources[0].rows_kept, manifest.sources[0].rejected) == (1, {"near_duplicate": 19})
    assert [cluster["removed"] for cluster in manifest.clusters] == [19]


def test_train_and_validation_share_no_near_duplicate(tmp_path: Path) -> None:
    texts = variants(600, 4)
    rows = [{"anchor": text.split(" ", 1)[0] + " as an anchor", "positive": text} for text in texts]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = config_of(tmp_path, path, "data.near_duplicates.threshold=0.7", "data.validation_fraction=0.3")
    folder, manifest = prepare(config, progress)
    kept = {
        row["id"]: word_tuples(f"{row['anchor']}\n{row['positive']}")
        for row in pq.read_table(folder / "records").to_pylist()
    }
    assert manifest.sources[0].rejected["near_duplicate"] > 50
    held_out = {one for one in kept if is_validation(one, 0.3)}
    for one in held_out:
        assert max(likeness(kept[one], kept[other]) for other in kept if other not in held_out) < 0.7


def test_text_alone_in_windows(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i} " + "goes on and on about it " * (i % 30) for i in range(80)))
    entry = {"name": "book", "type": "text", "record": "paragraph", "path": str(path)}
    overrides = [f"data.sources=[{json.dumps(entry)}]", "tokenizer.long_texts=windows", "tokenizer.window_overlap=4"]
    folder, manifest = prepare(config_of(tmp_path, path, *overrides), progress)
    table = pq.read_table(folder / "train")
    assert table["window"].to_pylist() != [0] * len(table)
    assert manifest.lengths["text"]["max"] == 16
    assert set(table["id"].to_pylist()) <= set(pq.read_table(folder / "records")["id"].to_pylist())
    with pytest.raises(ConfigError, match=r"tokenizer\.long_texts: found windows, with the record fields anchor,"):
        prepare(config_of(tmp_path, write_jsonl(tmp_path / "p.jsonl", make_pairs(5)), *overrides[1:]), progress)


def test_of_equal_records_the_same_one_stays_in_any_order(tmp_path: Path) -> None:
    rows = [{"id": "x", "line": i, "anchor": "an anchor text", "positive": "a positive text"} for i in range(5)]
    kept = []
    for name, order in (("1", rows), ("2", rows[::-1])):
        folder, _ = prepare(config_of(tmp_path / name, write_jsonl(tmp_path / name / "a.jsonl", order)), progress)
        kept.append(pq.read_table(folder / "records").to_pylist())
    assert kept[0] == kept[1]


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    """Its file is taken over as it is; the tokens are without the padding that it asks for."""
    path = write_jsonl(tmp_path / "a.jsonl", make_pairs(300))
    folder, _ = prepare(config_of(tmp_path, path), progress)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=14)
    own = tmp_path / "own.json"
    tokenizer.save(str(own))
    other, _ = prepare(config_of(tmp_path / "2", path, f"tokenizer.load_path={own}"), progress)
    assert (other / "tokenizer.json").read_bytes() == own.read_bytes()
    assert contents(other / "train") == contents(folder / "train")
    with pytest.raises(ConfigError, match=r"no\.json"):
        prepare(config_of(tmp_path / "3", path, f"tokenizer.load_path={tmp_path / 'no.json'}"), progress)


def test_too_much_bad_input_stops_with_a_sentence(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_pairs(30))
    with path.open("a") as file:
        file.write("{broken\n" * 10)
    with pytest.raises(
        JobError, match=r"source s: 10 broken_json of 40 records, more than data\.max_bad_fraction=0\.05"
    ):
        prepare(config_of(tmp_path, path), progress)
    assert prepare(config_of(tmp_path, path, "data.max_bad_fraction=0.3"), progress)[1].sources[0].rejected == {
        "broken_json": 10
    }


def test_everything_rejected_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b"}])
    with pytest.raises(JobError, match=r"all 1 records were rejected \(1 too_short\)"):
        prepare(config_of(tmp_path, path), progress)


def test_sections_are_pairs_documents_and_counts(tmp_path: Path) -> None:
    """Rows in are rows kept and rejected, a section's document is its text, and its place is its heading's line."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(30):
        (notes / f"{i:02}.md").write_text(
            f"# Chapter of number {i}\n\nWords about {i} and more.\n\n## Empty part {i}\n"
        )
    (notes / "none.md").write_text("No heading, but some words.\n")
    entry = {"name": "n", "type": "text", "path": str(notes), "pairs": "heading"}
    config = config_of(tmp_path, notes, f"data.sources=[{json.dumps(entry)}]")
    folder, manifest = prepare(config, progress)
    (source,) = manifest.sources
    assert (source.rows_in, source.rows_kept) == (61, 30)
    assert source.rejected == {"empty_section": 30, "no_heading": 1}
    records = sorted(pq.read_table(folder / "records").to_pylist(), key=lambda record: record["source_id"])
    assert [(record["source_id"], record["anchor"], record["positive"]) for record in records] == [
        (f"n:{i:02}.md:1", f"Chapter of number {i}", f"Words about {i} and more.") for i in range(30)
    ]
    assert json.loads(records[7]["metadata"]) == {"file": "07.md", "line": 1}
    assert [record["id"] for record in records] == [content_id([r["anchor"], r["positive"]]) for r in records]


def test_texts_without_a_heading_have_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Words.\n\nAnd more words, but no heading.\n")
    entry = {"name": "n", "type": "text", "path": str(tmp_path / "a.txt"), "pairs": "heading"}
    config = config_of(tmp_path, tmp_path, f"data.sources=[{json.dumps(entry)}]")
    with pytest.raises(JobError, match="source n: found no heading with text under it; use pairs: neighbours"):
        prepare(config, progress)


def test_a_source_that_loses_everything_can_be_accepted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "lost.jsonl", [{"anchor": "a", "positive": "b"}])
    write_jsonl(tmp_path / "kept.jsonl", make_pairs(30))
    sources = [{"name": name, "type": "json", "path": str(tmp_path / f"{name}.jsonl")} for name in ("lost", "kept")]
    config = config_of(tmp_path, tmp_path / "kept.jsonl", f"data.sources={json.dumps(sources)}")
    with pytest.raises(JobError, match=r"source lost: all 1 records were rejected .* data\.max_bad_fraction=1"):
        prepare(config, progress)
    accepted = prepare(config.changed({"data.max_bad_fraction": 1.0}, "test"), progress)[1]
    assert [(source.rows_kept, source.rejected) for source in accepted.sources] == [(0, {"too_short": 1}), (30, {})]


def test_what_a_cut_file_may_have_cost_is_compared_with_the_limit(tmp_path: Path) -> None:
    """And one message names all sources that fail."""
    cut = tmp_path / "cut"
    write_jsonl(cut / "a.jsonl", make_pairs(30))
    data = gzip.compress(write_jsonl(tmp_path / "b.jsonl", make_pairs(30, seed=1)).read_bytes())
    (cut / "b.jsonl.gz").write_bytes(data[:20])
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{broken\n" * 5)
    sources = [{"name": "c", "type": "json", "path": str(cut)}, {"name": "d", "type": "json", "path": str(broken)}]
    named = r"^source c: cannot read 1 file to the end \(b\.jsonl\.gz: .* 50% of the records.*; source d: 5 broken_json"
    with pytest.raises(JobError, match=named):
        prepare(config_of(tmp_path, broken, f"data.sources={json.dumps(sources)}"), progress)
    alone = f"data.sources={json.dumps(sources[:1])}"
    (count,) = prepare(config_of(tmp_path, broken, alone, "data.max_bad_fraction=1"), progress)[1].sources
    assert (count.rows_in, count.rows_kept, count.rejected) == (31, 30, {"unreadable_file": 1})
    assert count.lost_fraction == 0.5


def test_all_sources_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "no pair"}\n')
    sources = [{"name": name, "type": "json", "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b", "c")]
    with pytest.raises(ConfigError, match=r"sources a: found nothing .*; data\.sources b: .*sources c: found no field"):
        Inputs(config_of(tmp_path, tmp_path, f"data.sources={json.dumps(sources)}"))
