"""Embedding through Ray, killed and changed between runs. Run by `make test-slow`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lancedb
import numpy as np
import psutil
import pytest

from pipeline.embedding.encode import TextEncoder
from tests.conftest import make_pairs, write_jsonl
from tests.pinecone_server import pinecone_server
from tests.test_faults import JobProcess, rows_and_ids, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def begun(config: Path, arguments: tuple[str, ...]) -> JobProcess:
    job = JobProcess("embed", config, *arguments)
    job.wait_for("embed: begins")
    return job


def until(true: Callable[[], object], job: JobProcess) -> bool:
    """Wait for something, or for the job's end. Whether it was the former."""
    while job.process.poll() is None:
        if true():
            return True
        time.sleep(0.005)
    return False


def kill(processes: list[psutil.Process]) -> int:
    """Returns 1 where there was something to kill."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return int(bool(processes))


def rows_there(folder: Path) -> int:
    return rows_and_ids(folder)[0] if list((folder / "store" / "lancedb").glob("*.lance/_versions/*")) else 0


def test_killed_at_four_points_and_changed_it_ends_with_one_vector_a_document(tmp_path: Path) -> None:
    """SIGKILL to all processes as cache and table get their first rows, to an encoder, to all again; then edited."""
    config = write_config(tmp_path, pairs=60_000)
    arguments = ("training.max_steps=10", "embedding.batch_tokens=256")
    last = run("train", config, *arguments)
    model = Path(last["paths"]["model"])
    store = tmp_path / "store"

    kills = 0
    for point in ("cache", "table", "encoder, then table"):
        before, job = rows_there(tmp_path), begun(config, arguments)
        if point == "cache":
            reached = until(lambda: list((store / "cache").rglob("data/*.lance")), job)
        else:
            if point != "table" and until(lambda job=job: job.descendants("EncodeRows"), job):
                kills += kill(job.descendants("EncodeRows")[:1])
            reached = until(lambda before=before: rows_there(tmp_path) > before, job)
        if reached:
            kills += kill([psutil.Process(job.process.pid), *job.descendants("")])  # the whole machine
        job.process.wait()
    assert kills == 4
    job = begun(config, arguments)
    code, last = job.end()
    assert code == 0, job.log.read_text()
    kept = last["metrics"]["rows"]
    assert rows_and_ids(tmp_path) == (kept, kept)
    assert last["metrics"]["embedded"] < kept  # what the killed ones left was taken up

    db = lancedb.connect(str(store / "lancedb"))
    rows = db.open_table(db.list_tables().tables[0]).to_arrow().to_pylist()[::200]
    vectors = TextEncoder(model, 1, "cpu").encode([row["text"] for row in rows], "document")
    np.testing.assert_allclose([row["vector"] for row in rows], vectors, atol=1e-5)

    pairs = make_pairs(60_000)
    for pair in pairs[::100]:
        pair["positive"] = f"{pair['positive']} And more."
    write_jsonl(tmp_path / "pairs.jsonl", pairs[:-10])
    again = (*arguments, f"embedding.model={model}")
    planned = run("embed", config, *again, "--dry-run")["metrics"]
    last = run("embed", config, *again)["metrics"]
    assert last["changed"] + last["new"] == planned["changed"] + planned["new"] == last["embedded"] <= 600
    assert last["deleted"] == planned["deleted"] >= 10
    assert last["untouched"] > 0.95 * kept
    assert rows_and_ids(tmp_path) == (last["rows"],) * 2
    assert last["verified"] == 100
    alias = json.loads((store / "runs/r/embedded/alias.json").read_text())
    assert (store / alias["model"] / "model.safetensors").is_file()

    _to_pinecone(config, again, last["rows"])


def _to_pinecone(config: Path, arguments: tuple[str, ...], rows: int) -> None:
    """The same vectors to another store: none is made again, faults lose none, and a wrong key is one sentence."""
    with pinecone_server(faults={"429": 0.05, "503": 0.05, "part": 0.05}, retry_after_s=0.01) as server:
        options = ["embedding.store=pinecone", f"pinecone.host={server.url}", "pinecone.create=true"]
        options += ["pinecone.max_wait_s=0.1", "pinecone.requests_per_second=500"]
        job = JobProcess("embed", config, *arguments, *options, environment={"PINECONE_API_KEY": "pc-wrong"})
        code, last = job.end()
        assert (code, last["status"]) == (1, "failed")
        assert "401" in job.log.read_text()
        job = JobProcess("embed", config, *arguments, *options, environment={"PINECONE_API_KEY": "pc-test"})
        code, last = job.end()
        assert code == 0, job.log.read_text()
        assert (last["metrics"]["written"], last["metrics"]["rows"]) == (rows, rows)
        assert last["metrics"]["embedded"] == 0  # the cache has them all
        (spaces,) = server.records.values()
        assert sum(map(len, spaces.values())) == rows
        assert server.faulted
        logs = [path.read_text() for path in config.parent.rglob("*.log")]
        assert not any("pc-test" in text or "pc-wrong" in text for text in logs)
