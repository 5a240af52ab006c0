"""Checkpoints in buckets of S3 (moto) and GCS (a stand-in): put there, damaged there, rotated, uploads cut short.

Without Ray. What a run left in a bucket must be what it leaves on a disk, file by file and bit by bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pipeline.config import Config, load
from pipeline.core.files import local_copy, scratch, write_atomically
from pipeline.core.object_store import BucketError
from pipeline.core.path import BucketPath
from pipeline.data.manifest import Manifest
from pipeline.training import checkpoints
from pipeline.training.checkpoints import (
    Committer,
    ResumePoint,
    TrainState,
    best_checkpoint,
    newest_valid,
    next_attempt,
    prune,
    read_state,
    seal,
    step_folder,
)
from pipeline.training.run_folder import claim_run_folder
from pipeline.training.saving import consolidate
from pipeline.training.trackers import Trackers
from tests.bucket_servers import CREDENTIALS, Served, serving
from tests.killed_loop import Kill, Start, train_in
from tests.test_resume import SETTINGS, STEPS, assert_same_batches

FILES = ("model.safetensors", "model.json", "tokenizer.json", "optimizer.pt")


@pytest.fixture(scope="module", params=["s3", "gs", "az"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(request.param, "models", tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders of the test's own, here and in the processes that it starts."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def config(served: Served, request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    (tmp_path / "c.yaml").write_text("storage: {run: r}\n")
    return load(tmp_path / "c.yaml", [f"storage.root={served.uri(request.node.name)}"], environ={})


@pytest.fixture
def run_dir(config: Config) -> BucketPath:
    assert isinstance(config.run_dir, BucketPath)
    return config.run_dir


def written(folder: Path, step: int, files: tuple[str, ...] = FILES) -> Path:
    """A sealed folder of random bytes, the same for a step every time."""
    chance, folder = random.Random(step), folder / step_folder(step)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(chance.randbytes(1000))
    seal(folder, TrainState(step))
    return folder


@pytest.fixture
def save(run_dir: BucketPath, tmp_path: Path) -> Callable[..., BucketPath]:
    def save_step(step: int, *, attempt: int = 1, is_best: bool = False) -> BucketPath:
        target, folder = run_dir / f"attempt-{attempt:03d}" / step_folder(step), written(tmp_path / "incoming", step)
        Committer(run_dir, 0, 1, "start", 60).commit(folder, target, is_best)
        assert not folder.exists()
        return target

    return save_step


def test_a_checkpoint_arrives_as_it_was_written(save: Any, run_dir: BucketPath, tmp_path: Path, served: Served) -> None:
    expected = {path.name: path.read_bytes() for path in written(tmp_path, 7).iterdir()}
    target = save(7)
    prefix = target.key.removeprefix("models/")
    assert {key.removeprefix(f"{prefix}/"): served.read(key) for key in served.keys(prefix)} == expected
    assert newest_valid(run_dir) == ResumePoint(target, TrainState(7))
    assert {path.name: path.read_bytes() for path in local_copy(target).iterdir()} == expected
    assert read_state(target).step == 7
    assert next_attempt(run_dir) == "attempt-002"


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "unsealed", "half a seal"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, save: Any, run_dir: BucketPath, served: Served) -> None:
    whole, damaged = save(1), save(2)
    path = damaged / ("state.json" if damage in ("unsealed", "half a seal") else "optimizer.pt")
    key, data = path.key.removeprefix("models/"), path.read_bytes()
    if damage == "bit":
        served.write(key, data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage in ("cut", "half a seal"):
        served.write(key, data[: len(data) // 2])
    else:
        served.delete(key)
    said = f"skipped {damaged}: its {path.name} is missing or broken"
    assert newest_valid(run_dir) == ResumePoint(whole, TrainState(1), (said,))
    prune(run_dir, 1, newest=whole)
    assert newest_valid(run_dir) == ResumePoint(whole, TrainState(1))


@pytest.mark.parametrize("at", range(1, len(FILES) + 2))
def test_an_upload_that_ends_anywhere_leaves_no_checkpoint(at: int, save: Any, run_dir: BucketPath) -> None:
    """At each of its files, and at the state.json that ends it."""
    whole = save(1)
    left, lock, upload, write = at, threading.Lock(), BucketPath.upload, BucketPath.write_bytes

    def counted(path: BucketPath, *args: Any) -> None:
        nonlocal left
        with lock:
            left -= 1
        if left <= 0:
            raise BucketError("lost")
        (upload if isinstance(args[0], Path) else write)(path, *args)

    with patch.multiple(BucketPath, upload=counted, write_bytes=counted), pytest.raises(BucketError):
        save(2)
    point = newest_valid(run_dir)
    assert (point.folder, len(point.skipped)) == (whole, at > 1)


def test_a_bucket_that_fails_passes_no_checkpoint_over(save: Any, run_dir: BucketPath) -> None:
    save(1)
    with patch.object(BucketPath, "download", side_effect=BucketError("lost")), pytest.raises(BucketError):
        newest_valid(run_dir)


def test_the_newest_are_kept_and_the_best_beside_them(
    save: Any, run_dir: BucketPath, tmp_path: Path, served: Served
) -> None:
    for step in range(1, 7):
        save(step, attempt=1 + step // 3, is_best=step in (1, 2))
        prune(run_dir, 2)
        assert len(list(run_dir.glob("attempt-*/step-*"))) == min(step, 2)
    assert {path.name for path in run_dir.glob("attempt-*/step-*")} == {step_folder(5), step_folder(6)}
    assert [path.name for path in run_dir.glob("attempt-*")] == ["attempt-002", "attempt-003"]
    best = run_dir / "best" / step_folder(2)
    assert best_checkpoint(run_dir) == best
    assert list((run_dir / "best").iterdir()) == [best]
    again = written(tmp_path / "again", 2)
    expected = {name: (again / name).read_bytes() for name in FILES if name != "optimizer.pt"}
    assert {name: (best / name).read_bytes() for name in best.files() if name != "state.json"} == expected
    assert read_state(best).step == 2
    served.write((best / "model.json").key.removeprefix("models/"), b"broken")
    assert best_checkpoint(run_dir) == run_dir / "attempt-003" / step_folder(6)


def test_a_checkpoint_without_all_its_files_does_not_count_as_kept(save: Any, run_dir: BucketPath) -> None:
    kept, broken = save(1), save(2)
    (broken / "optimizer.pt").unlink()
    half = run_dir / "attempt-001" / step_folder(3)
    (half / "model.json").write_bytes(b"{}")
    prune(run_dir, 1)
    assert list(run_dir.glob("attempt-*/step-*")) == [kept]


@patch.object(checkpoints, "POLL_S", 0.01)
def test_the_first_of_several_workers_seals_once_all_parts_are_there(run_dir: BucketPath, tmp_path: Path) -> None:
    """The last worker comes late; another start of the workers has left its parts in the same folder."""
    target = run_dir / "attempt-001" / step_folder(4)
    parts = [written(tmp_path / f"{i}", 4, (f"weights/shard-{i}", f"optimizer/shard-{i}")) for i in range(3)]
    earlier, now = ([Committer(run_dir, rank, 3, start, 60) for rank in range(3)] for start in ("earlier", "now"))
    (target / earlier[1].part(1)).write_bytes(b'{"files": {"weights/shard-1": "another"}}')
    (target / earlier[2].part(2)).write_bytes(b'{"files": {"weights/shard-2": "another"}}')
    first = threading.Thread(target=now[0].commit, args=(parts[0], target, True))
    first.start()
    now[2].commit(parts[2], target, True)
    assert newest_valid(run_dir).folder is None
    assert first.is_alive()
    now[1].commit(parts[1], target, True)
    first.join()
    assert newest_valid(run_dir) == ResumePoint(target, TrainState(4))
    names = {f"{kind}/shard-{rank}" for kind in ("weights", "optimizer") for rank in range(3)}
    assert json.loads((target / "state.json").read_text())["files"].keys() == names
    best = run_dir / "best" / step_folder(4)
    assert best_checkpoint(run_dir) == best
    assert best.files().keys() == {"state.json", *(f"weights/shard-{rank}" for rank in range(3))}


def test_a_worker_that_never_comes_is_given_up(run_dir: BucketPath, tmp_path: Path) -> None:
    target = run_dir / "attempt-001" / step_folder(4)
    with pytest.raises(BucketError, match=r"^worker 1 has not written its part of (s3|gs|az)://.* in 0 s"):
        Committer(run_dir, 0, 2, "now", 0).commit(written(tmp_path, 4), target, False)
    assert newest_valid(run_dir).folder is None


def test_metrics_go_on_on_another_machine(config: Config, run_dir: BucketPath) -> None:
    with Trackers.open(config, 0) as trackers:
        for step in (10, 20):
            trackers.log({"step": step, "loss": 1.0})
        trackers.alert("odd", "step 20 is odd", 20)
    shutil.rmtree(scratch())
    with Trackers.open(config, 10) as trackers:
        trackers.log({"step": 20, "loss": 2.0})
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}]
    assert (run_dir / "alerts.jsonl").read_text() == ""
    assert list(scratch().glob("mirror-*")) == []


def test_no_credential_is_written(config: Config, save: Any, run_dir: BucketPath, served: Served) -> None:
    prepared = config.root / "prepared" / "0123456789abcdef"
    write_atomically(prepared / "tokenizer.json", b"{}")
    claim_run_folder(config, prepared, Manifest("data", [], {}, [], {}, [], {}), steps=1)
    save(1, is_best=True)
    with Trackers.open(config, 0) as trackers:
        trackers.log({"step": 1, "loss": 1.0})
    prefix = run_dir.key.removeprefix("models/")
    assert {"config.resolved.yaml", "run.json"} <= {key.rpartition("/")[2] for key in served.keys(prefix)}
    written_bytes = b"".join(served.read(key) for key in served.keys(prefix)) + json.dumps(config.dump()).encode()
    secrets = [CREDENTIALS["AWS_SECRET_ACCESS_KEY"], CREDENTIALS["AWS_ACCESS_KEY_ID"]]
    assert not [secret for secret in secrets if secret.encode() in written_bytes]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("served", ["s3"], indirect=True)
def test_killed_amid_uploads_a_run_ends_with_the_bits_of_one_on_disk(served: Served, tmp_path: Path) -> None:
    kills = [Kill("uploading", 5, [0]), Kill("sealing", 2, [0]), Kill("sealed", 1, [0])]
    alone = train_in(tmp_path / "alone", SETTINGS, [Start(2)])
    starts = [*(Start(2, [kill]) for kill in kills), Start(2)]
    killed = train_in(tmp_path / "killed", SETTINGS, starts, root=served.uri("ddp"))
    assert killed.weights == alone.weights
    assert_same_batches(killed, alone)
    assert killed.losses == alone.losses
    assert left_in(served, "ddp") == left_on(tmp_path / "alone")
    assert not (tmp_path / "killed" / "runs").exists()


@pytest.mark.timeout(300)
@pytest.mark.exhaustive
@pytest.mark.parametrize("served", ["s3"], indirect=True)
def test_fsdp_workers_that_share_no_disk_end_with_the_bits_of_those_that_do(served: Served, tmp_path: Path) -> None:
    settings = SETTINGS | {"training": SETTINGS["training"] | {"strategy": "fsdp"}}
    alone = train_in(tmp_path / "alone", settings, [Start(2)])
    kills = [Kill("uploading", 3, [1]), Kill("sealing", 1, [0])]
    starts = [*(Start(2, [kill]) for kill in kills), Start(2)]
    killed = train_in(tmp_path / "killed", settings, starts, root=served.uri("fsdp"))
    assert killed.weights == alone.weights
    assert_same_batches(killed, alone)
    whole = {f"runs/r/attempt/{step_folder(STEPS)}/{name}" for name in ("model.safetensors", "heads.safetensors")}
    assert left_in(served, "fsdp") == left_on(tmp_path / "alone") - whole  # which the test has put together there

    config = load(tmp_path / "killed" / "c.yaml", environ={})
    best, expected = best_checkpoint(config.run_dir), best_checkpoint(tmp_path / "alone" / "runs" / "r")
    assert isinstance(best, BucketPath)
    assert isinstance(expected, Path)
    consolidate(best)
    consolidate(expected)
    assert (best / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert best_checkpoint(config.run_dir) == best


def left_on(folder: Path) -> set[str]:
    """Names of a run's files, without the number of the attempt."""
    paths = (path for path in (folder / "runs").rglob("*") if path.is_file() and not path.name.startswith("written-"))
    return {without_attempt(path.relative_to(folder).as_posix()) for path in paths} - {"runs/r/.lock"}


def left_in(served: Served, prefix: str) -> set[str]:
    names = {without_attempt(key.removeprefix(f"{prefix}/")) for key in served.keys(f"{prefix}/")}
    return {name for name in names if not os.path.basename(name).startswith("written-")}


def without_attempt(name: str) -> str:
    return "/".join("attempt" if part.startswith("attempt-") else part for part in name.split("/"))
