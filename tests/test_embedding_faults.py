"""Embedding through Ray, killed and changed between runs. Run by `make test-slow`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import lancedb
import numpy as np
import pytest

from pipeline.index.encoder import TextEncoder
from tests.conftest import make_pairs, write_jsonl
from tests.embedding_world import save_random_model
from tests.job_process import JobProcess, kill, ray_processes, rows_and_ids, rows_there, write_config
from tests.pinecone_server import pinecone_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("shared_ray")]
PAIRS = 6000


def until(true: Callable[[], object], job: JobProcess) -> bool:
    """Wait for something, or for the job's end. Whether it was the former."""
    while job.process.poll() is None:
        if true():
            return True
        time.sleep(0.005)
    return False


def test_killed_at_four_points_and_changed_it_ends_with_one_vector_a_document(tmp_path: Path) -> None:
    """The driver is killed at a fragment, after a commit, an encoder, the driver again; then texts change."""
    model = save_random_model(tmp_path / "model")
    config = write_config(tmp_path, pairs=PAIRS)
    pairs = make_pairs(PAIRS)
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    arguments = (f"embedding.model={model}", "embedding.batch_tokens=256", f"data.sources.0.path={source}")
    store = tmp_path / "store"

    def embed(*more: str, **environment: str) -> JobProcess:
        return JobProcess("embed", config, *arguments, *more, **environment)

    kills = 0
    for point in ("fragments", "table", "encoder, then table"):
        before, job = rows_there(tmp_path), embed()
        job.wait_for("embed: begins")
        if point == "fragments":
            reached = until(lambda: list((store / "lancedb").rglob("data/*.lance")), job)
        else:
            if point != "table" and until(lambda: ray_processes("EncodeTexts"), job):
                kills += kill(ray_processes("EncodeTexts")[:1])
            reached = until(lambda before=before: rows_there(tmp_path) > before, job)
        if reached:
            kills += 1
            job.kill()
        job.process.wait()
    assert kills == 4
    last = embed().finish()
    kept = last["metrics"]["rows"]
    assert rows_and_ids(tmp_path) == (kept, kept)
    assert last["metrics"]["embedded"] < kept  # what the killed ones left was taken up

    db = lancedb.connect(str(store / "lancedb"))
    rows = db.open_table(db.list_tables().tables[0]).to_arrow().to_pylist()[::20]
    vectors = TextEncoder(model, 1, "cpu").encode([row["text"] for row in rows], "document")
    np.testing.assert_allclose([row["vector"] for row in rows], vectors, atol=1e-5)

    for pair in pairs[::100]:
        pair["positive"] = f"{pair['positive']} And more."
    write_jsonl(source, pairs[:-10])
    planned = embed("--dry-run").finish()["metrics"]
    last = embed().finish()["metrics"]
    assert last["changed"] + last["new"] == planned["changed"] + planned["new"] == last["embedded"] <= 60
    assert last["deleted"] == planned["deleted"] >= 10
    assert last["untouched"] > 0.95 * kept
    assert rows_and_ids(tmp_path) == (last["rows"],) * 2
    assert last["verified"] == 100
    alias = json.loads((store / "runs/r/published.json").read_text())
    assert (store / alias["model"] / "model.safetensors").is_file()

    # The same vectors to Pinecone: none is made again, faults lose none, and a wrong key is one sentence.
    rows = last["rows"]
    with pinecone_server(faults={"429": 0.05, "503": 0.05, "part": 0.05}, retry_after_s=0.01) as server:
        options = ["embedding.store=pinecone", f"pinecone.host={server.url}", "pinecone.create=true"]
        options += ["pinecone.max_wait_s=0.1", "pinecone.requests_per_second=500", "pinecone.batch_rows=50"]
        job = embed(*options, RAY_ADDRESS="", PINECONE_API_KEY="pc-wrong")  # a session with the key in its environment
        code, ended = job.end()
        assert (code, ended["status"]) == (1, "failed")
        assert "401" in job.log.read_text()
        metrics = embed(*options, RAY_ADDRESS="", PINECONE_API_KEY="pc-test").finish()["metrics"]
        assert (metrics["upserted"], metrics["rows"], metrics["embedded"]) == (rows, rows, 0)
        (spaces,) = server.records.values()
        assert sum(map(len, spaces.values())) == rows
        assert server.faulted
        logs = [path.read_text() for path in tmp_path.rglob("*.log")]
        assert not any("pc-test" in text or "pc-wrong" in text for text in logs)
