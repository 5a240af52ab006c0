"""Artifacts: made once, by tasks that can be killed anywhere; what is damaged on the disk is found and named."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config, load
from pipeline.core import artifact, files
from pipeline.core.artifact import Artifact, Output, checked, open_parquet
from pipeline.core.files import link_or_copy
from pipeline.core.outcome import JobError, job_lock
from pipeline.data.feed import training_plan, validation_rows
from pipeline.data.prepare import Inputs, prepare
from pipeline.evaluation.tasks import held_out_task
from tests.conftest import make_pairs, progress, write_jsonl

FLIPS = 60


def write(made: Artifact, name: str, data: bytes) -> dict[str, Any]:
    made.output.write(name, data)
    return {"length": len(data)}


def as_another_process() -> None:
    """Forget which files were checked."""
    artifact._checked.clear()


def test_it_is_made_once_and_says_what_is_in_it(tmp_path: Path) -> None:
    made = Artifact(tmp_path, "words", {"from": "a"})
    assert made.read() is None
    manifest = made.make(lambda: write(made, "deep/words.txt", b"one two"))
    assert manifest == made.read() == json.loads((made.folder / "manifest.json").read_text())
    assert manifest["length"] == manifest["files"]["deep/words.txt"]["bytes"] == 7
    again = Artifact(tmp_path, "words", {"from": "a"})
    assert again.make(lambda: pytest.fail("made twice")) == manifest
    assert Artifact(tmp_path, "words", {"from": "b"}).folder != made.folder
    assert not made.scratch.exists()


def test_files_are_on_the_disk_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(f"synced {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.split('.')[0]}")

    def replaced(path: Path, target: Path) -> Path:
        done.append(f"named {target.name.split('.')[0]}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    made = Artifact(tmp_path, "words", [])
    made.make(lambda: write(made, "words.txt", b"one two"))
    assert done == ["synced words", "named words", "synced manifest", "named manifest"]


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_what_is_no_longer_whole_is_made_again(damage: str, tmp_path: Path) -> None:
    made = Artifact(tmp_path, "words", [])
    manifest = made.make(lambda: write(made, "words.txt", b"one two"))
    file = made.folder / "words.txt"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"one" if damage == "cut" else b"")
    assert made.read() is None
    assert made.make(lambda: write(made, "words.txt", b"one two")) == manifest
    assert file.read_bytes() == b"one two"


def test_a_second_job_waits_for_the_first(tmp_path: Path) -> None:
    made, began, calls = Artifact(tmp_path, "words", []), threading.Event(), []

    def fill() -> dict[str, Any]:
        began.set()
        calls.append(1)
        time.sleep(0.5)
        return write(made, "words.txt", b"one two")

    first = threading.Thread(target=made.make, args=(fill,))
    first.start()
    began.wait()
    assert Artifact(tmp_path, "words", []).make(fill)["length"] == 7
    first.join()
    assert len(calls) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_job_resumes_with_the_tasks_that_have_no_note(tmp_path: Path) -> None:
    """A note is cut, as by a full disk, and one is empty."""
    made, ran = Artifact(tmp_path, "squares", []), tmp_path / "ran"
    ran.mkdir()

    def square(index: int, output: Output) -> int:
        (ran / f"{index}-{time.monotonic_ns()}").touch()
        output.write(f"squares/{index}", str(index**2).encode())
        output.write(f"scratch/{index}", b"gone at the end")
        return index**2

    expected = [index**2 for index in range(5)]
    assert made.tasks(progress(), "squares", [1] * 5, square) == expected
    notes = sorted(made.scratch.glob("squares/*.json"))
    notes[1].unlink()
    notes[3].write_bytes(b"")
    again = Artifact(tmp_path, "squares", [])
    assert again.tasks(progress(), "squares", [1] * 5, square) == expected
    assert sorted(path.name[0] for path in ran.iterdir()) == ["0", "1", "1", "2", "3", "3", "4"]
    manifest = again.finish({})
    assert manifest["files"].keys() == {f"squares/{index}" for index in range(5)}
    assert not again.scratch.exists()


def test_a_task_reports_its_parts_and_never_more_than_its_size(tmp_path: Path) -> None:
    sent: list[dict[str, int]] = []
    output = Output(tmp_path, {}, sent.append, 1000)
    for share in (0.2, 0.1, 0.5, 0.5, 7.0, 1.0):
        output.advance(share)
    assert sent == [{"done": 200}, {"done": 300}, {"done": 500}]


def test_a_step_is_done_once(tmp_path: Path) -> None:
    made = Artifact(tmp_path, "steps", [])
    assert made.once("first", lambda: {"rows": 3}) == {"rows": 3}
    assert Artifact(tmp_path, "steps", []).once("first", lambda: pytest.fail("done twice")) == {"rows": 3}


def config_of(folder: Path) -> Config:
    write_jsonl(folder / "a.jsonl", make_pairs(400))
    source = {"name": "s", "type": "json", "path": str(folder / "a.jsonl")}
    settings = {"data": {"sources": [source], "validation_fraction": 0.1}, "tokenizer": {"vocab_size": 600}}
    (folder / "c.yaml").write_text(json.dumps(settings))
    return load(folder / "c.yaml", [f"storage.root={folder / 'store'}"], environ={})


@pytest.fixture(scope="module")
def prepared(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config = config_of(tmp_path_factory.mktemp("prepared"))
    folder, _ = prepare(config, progress)
    assert isinstance(folder, Path)
    return config, folder


@pytest.fixture
def damaged(prepared: tuple[Config, Path]) -> Iterator[Callable[[Path, int], None]]:
    """Flips a bit of a file, and takes it back at the end."""
    flipped: list[tuple[Path, int, os.stat_result]] = []

    def flip(path: Path, bit: int) -> None:
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk would do it
        as_another_process()
        flipped.append((path, bit, stat))

    yield flip
    for path, bit, _ in flipped[::-1]:
        flip(path, bit)
    as_another_process()


def readers(config: Config, folder: Path) -> dict[str, Callable[[], object]]:
    """What reads each kind of file in a job."""
    manifest = prepare(config, lambda: pytest.fail("there is nothing to do"))[1]
    plan = training_plan(folder, manifest, 64, seed=1)
    return {
        "train": lambda: plan.read(0, plan.batches_per_epoch, 0, 1),
        "validation": lambda: validation_rows(folder, manifest, 1000),
        "records": lambda: held_out_task(config, folder),
        "tokenizer.json": lambda: checked(folder / "tokenizer.json").read_text(),
    }


@pytest.mark.parametrize("kind", ["train", "validation", "records", "tokenizer.json"])
def test_every_flipped_bit_is_found_and_named(
    kind: str, prepared: tuple[Config, Path], damaged: Callable[[Path, int], None]
) -> None:
    config, folder = prepared
    path = folder / kind if kind.endswith(".json") else folder / kind / "00000.parquet"
    read, chance = readers(config, folder)[kind], random.Random(0)
    for _ in range(FLIPS):
        bit = chance.randrange(8 * path.stat().st_size)
        damaged(path, bit)
        with pytest.raises(JobError, match=f"^{re.escape(str(path))} is damaged: "):
            read()
        damaged(path, bit)
        read()


def test_what_the_message_says_makes_it_whole_again(
    prepared: tuple[Config, Path], damaged: Callable[[Path, int], None], tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    shutil.copytree(prepared[1].parents[1], tmp_path / "store")
    (tmp_path / "a.jsonl").write_bytes((prepared[1].parents[2] / "a.jsonl").read_bytes())
    config = config.changed({"storage.root": str(tmp_path / "store")}, "the test")
    folder, manifest = prepare(config, progress)
    assert isinstance(folder, Path)
    path = folder / "train" / "00000.parquet"
    expected = path.read_bytes()
    for file in (path, Inputs(config).tokens.folder / "train" / "00000.parquet"):  # a copied store has no hard links
        file.write_bytes(expected[:100] + bytes([expected[100] ^ 1]) + expected[101:])
    as_another_process()
    with pytest.raises(JobError) as refused:
        open_parquet(path)
    for advised in re.findall(r"delete (\S+) and (\S+) and run", str(refused.value))[0]:
        shutil.rmtree(advised)
    assert prepare(config, progress) == (folder, manifest)
    assert path.read_bytes() == expected


def test_pages_have_checksums_that_are_verified(prepared: tuple[Config, Path], tmp_path: Path) -> None:
    """Of a file that was checked already, as when it is damaged while a job is under way."""
    made = Artifact(tmp_path, "table", [])
    made.make(lambda: made.output.write_table("rows.parquet", pa.table({"n": list(range(50_000))})) or {})
    path = made.folder / "rows.parquet"
    open_parquet(path)
    data, group = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(3).column(0)
    place = group.dictionary_page_offset or group.data_page_offset
    stat = path.stat()
    path.write_bytes(data[: place + 200] + bytes([data[place + 200] ^ 1]) + data[place + 201 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(OSError, match="checksum"):
        open_parquet(path).read_row_group(3)


def test_a_file_of_no_artifact_is_taken_as_it_is(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "a.txt", b"x")
    assert checked(tmp_path / "a.txt").read_bytes() == b"x"


def test_the_folder_is_held_while_it_is_made(tmp_path: Path) -> None:
    made = Artifact(tmp_path, "words", [])

    def fill() -> dict[str, Any]:
        with pytest.raises(JobError, match="another job is at work in"), job_lock(made.folder):
            pytest.fail("two at once")
        return {}

    made.make(fill)


def test_a_symbolic_link_is_copied_as_the_file_it_leads_to(tmp_path: Path) -> None:
    """As the files of a model in the cache of the Hugging Face hub are."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "3f9c").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.bin").symlink_to("../blobs/3f9c")
    target = tmp_path / "somewhere" / "else" / "model.bin"
    link_or_copy(tmp_path / "snapshot" / "model.bin", target)
    assert not target.is_symlink()
    assert target.read_bytes() == b"weights"
