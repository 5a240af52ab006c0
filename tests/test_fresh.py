"""Jobs repeated after their data changed: the model stays, the index follows, and what moved is said."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import load
from pipeline.data import prepare as prepare_module
from pipeline.data.drift import Drift
from pipeline.data.manifest import RECORD_SCHEMA, read_prepared
from pipeline.data.partitions import shard_of
from pipeline.data.prepare import prepare
from tests.conftest import make_pairs, no_progress, progress, run_here, write_jsonl


@pytest.mark.parametrize(("then", "now"), [(1, 1), (4, 4), (3, 7), (7, 3)])
def test_drift_against_sets(then: int, now: int, tmp_path: Path) -> None:
    chance = random.Random(then)
    before = {f"s:{number}": f"{chance.randrange(16**32):032x}" for number in range(500)}
    after = {one: text for one, text in before.items() if chance.random() < 0.9}
    after |= {one: f"{chance.randrange(16**32):032x}" for one in chance.sample(sorted(after), 30)}
    after |= {f"s:{number}": f"{chance.randrange(16**32):032x}" for number in range(500, 540)}
    for name, records, files in (("then", before, then), ("now", after, now)):
        rows = sorted(({"id": text, "source": "s", "source_id": one} for one, text in records.items()), key=str)
        for number in range(files):
            own = pa.Table.from_pylist([row for row in rows if shard_of(row["id"], files) == number], RECORD_SCHEMA)
            path = tmp_path / name / "records" / f"{number:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(own, path)
    found = Drift.between(tmp_path / "then", tmp_path / "now")
    removed, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert (found.new, found.changed, found.removed, found.of) == (len(new), 30, len(removed), 500)
    assert str(found) == f"40 records new, 30 changed, {len(removed)} removed ({(70 + len(removed)) / 500:.1%})"


class Corpus:
    """A folder of JSON Lines files, and jobs on it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.files, self.config = folder / "store", folder / "pages", folder / "c.yaml"
        self.write("a", make_pairs(400, seed=1))
        self.write("b", make_pairs(40, seed=2))
        self.config.write_text(
            json.dumps(
                {
                    "storage": {"root": str(self.root), "run": "notes"},
                    "data": {
                        "sources": [{"name": "pages", "type": "json", "path": str(self.files)}],
                        "validation_fraction": 0.1,
                    },
                    "tokenizer": {"vocab_size": 600, "max_length": 16},
                    "model": {"num_layers": 0, "d_model": 16},
                    "training": {"global_batch_size": 32, "max_steps": 6, "validate_every_steps": 3},
                    "scaling": {"num_workers": 1},
                    "evaluation": {"held_out_queries": 10, "bm25": False},
                }
            )
        )

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        write_jsonl(self.files / f"{name}.jsonl", [dict(row, id=f"{name}-{row['id']}") for row in rows])

    def __call__(self, capsys: pytest.CaptureFixture[str], name: str, *args: str) -> tuple[int, Any, str]:
        code, last, _, err = run_here(capsys, name, "--config", str(self.config), *args)
        return code, last, err

    def run_json(self, run: str = "notes") -> dict[str, Any]:
        return json.loads((self.root / "runs" / run / "run.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 10_000)


def tokens_of(prepared: str | Path) -> dict[str, dict[str, Any]]:
    """The token rows of a data set by id."""
    return {
        row["id"]: row for split in ("train", "validation") for row in pq.read_table(Path(prepared) / split).to_pylist()
    }


def drift_of(err: str) -> str:
    return re.search(r"the data have changed since the run's model was trained: (.*?); ", err)[1]  # type: ignore[index]


@pytest.mark.usefixtures("ray_cluster")
class TestFresh:
    """In this order: each test goes on from the one before."""

    def test_a_file_that_is_added_is_embedded_with_the_model_that_is_there(
        self, corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code, first, err = corpus(capsys, "run")
        assert code == 0, err
        assert "have changed" not in err
        before, run = tokens_of(first["paths"]["prepared"]), corpus.run_json()
        corpus.write("c", make_pairs(30, seed=3))
        code, last, err = corpus(capsys, "run")
        assert code == 0, err
        assert drift_of(err) == "30 records new, 0 changed, 0 removed (6.8%)"
        assert "tep run with the same arguments and storage.run=notes-2" in err
        assert "prepare: tokenized 30 of 470 records" in err
        assert "train: nothing to do" in err
        assert last["paths"]["model"] == first["paths"]["model"]
        assert corpus.run_json() == run
        after = tokens_of(last["paths"]["prepared"])
        assert len(after) == 470
        assert after.items() >= before.items()
        assert last["metrics"]["embed"]["rows"] == 470
        (table,) = lancedb.connect(str(corpus.root / "lancedb")).list_tables().tables
        rows = lancedb.connect(str(corpus.root / "lancedb")).open_table(table).to_arrow()
        records = pq.read_table(Path(last["paths"]["prepared"]) / "records")
        assert sorted(rows["text"].to_pylist()) == sorted(records["positive"].to_pylist())
        assert make_pairs(30, seed=3)[7]["positive"] in rows["text"].to_pylist()

        monkeypatch.setattr("pipeline.stages.ray_session", no_progress)
        code, last, err = corpus(capsys, "run")
        assert code == 0, err
        assert err.count("nothing to do") == 4
        assert drift_of(err) == "30 records new, 0 changed, 0 removed (6.8%)"
        for name in ("prepare", "train"):
            code, alone, err = corpus(capsys, name)
            assert (code, err.count(f"{name}: nothing to do")) == (0, 1), err
        assert alone["paths"]["model"] == first["paths"]["model"]

    def test_the_data_are_those_that_all_tokenizing_at_once_gives(self, corpus: Corpus, tmp_path: Path) -> None:
        tokenizer = corpus.root / "runs" / "notes" / "tokenizer.json"
        config = load(corpus.config, [f"storage.root={tmp_path}", f"tokenizer.load_path={tokenizer}"], environ={})
        _, anew = prepare(config, progress)
        assert len(anew.shards) > 4
        found = next(
            manifest
            for path in corpus.root.glob("prepared/*")
            if (manifest := read_prepared(path)) and sum(manifest.splits.values()) == 470
        )
        assert (found.fingerprint, found.lengths, found.shards) == (anew.fingerprint, anew.lengths, anew.shards)
        assert found.files["lengths.png"]["xxh3"] == anew.files["lengths.png"]["xxh3"]

    def test_files_that_are_changed_and_removed(self, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
        rows = make_pairs(400, seed=1)
        for row in rows[:5]:
            row["positive"] = f"{row['positive']} And no other."
        corpus.write("a", rows[:-2])
        (corpus.files / "b.jsonl").unlink()
        code, last, err = corpus(capsys, "embed")
        assert code == 0, err
        assert drift_of(err) == "30 records new, 5 changed, 42 removed (17.5%)"
        assert "prepare: tokenized 5 of 428 records" in err
        counts = {"embedded": 5, "changed": 5, "deleted": 42, "rows": 428}
        assert counts.items() <= last["metrics"].items()
        code, last, err = corpus(capsys, "evaluate")
        assert (code, last["metrics"]["held-out"]["queries"]) == (0, 10), err

    def test_another_run_trains_its_own_tokenizer_on_what_is_there(
        self, corpus: Corpus, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, last, err = corpus(
            capsys, "train", "storage.run=notes-2", "training.max_time_s=1e-3", "training.log_every_steps=1"
        )
        assert (code, last["metrics"]["step"] < 6) == (0, True), err
        assert "have changed" not in err
        tokenizer = "runs/notes{}/tokenizer.json"
        assert (corpus.root / tokenizer.format("")).read_bytes() != (corpus.root / tokenizer.format("-2")).read_bytes()
        assert corpus.run_json("notes-2")["prepared"] != corpus.run_json()["prepared"]

    def test_a_run_in_the_middle_is_refused_other_data(
        self, corpus: Corpus, capsys: pytest.CaptureFixture[str]
    ) -> None:
        corpus.write("d", make_pairs(20, seed=4))
        tokenizer = (corpus.root / "runs/notes-2/tokenizer.json").read_bytes()
        code, _, err = corpus(capsys, "train", "storage.run=notes-2")
        assert code == 2
        assert re.search(r"is at step \d of 6, and its data have changed since it began", err)
        assert "another run with storage.run=NAME" in err
        assert "checkpointing.accept_changes=[data]" in err
        code, _, err = corpus(capsys, "embed", "storage.run=notes-2")
        assert code == 2
        model = re.search(r"embedding\.model=(\S+)", err)[1]  # type: ignore[index]
        code, last, err = corpus(capsys, "embed", "storage.run=notes-2", f"embedding.model={model}")
        assert (code, last["metrics"]["rows"]) == (0, 448), err
        code, last, err = corpus(capsys, "train", "storage.run=notes-2", "checkpointing.accept_changes=[data]")
        assert (code, last["metrics"]["step"]) == (0, 6), err
        assert (corpus.root / "runs/notes-2/tokenizer.json").read_bytes() == tokenizer
        code, _, err = corpus(capsys, "train", "storage.run=notes-2")
        assert (code, "have changed" in err) == (0, False), err

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ("training.max_steps=9", "training.max_steps (then 6, now 9)"),
            ("training.learning_rate=0.5", "training.learning_rate (then "),
            ("tokenizer.max_length=12", "tokenizer.max_length (then 16, now 12)"),
            ("tokenizer.vocab_size=700", "tokenizer.vocab_size (then 600, now 700)"),
            ("data.seed=5", "data.seed (then 0, now 5)"),
        ],
    )
    def test_other_settings_are_refused_with_other_data(
        self, change: str, named: str, corpus: Corpus, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = corpus(capsys, "train", change)
        assert code == 2
        assert named in err
        assert "data (the prepared data" in err
        accepted = f"checkpointing.accept_changes=[{change.partition('=')[0]}]"
        assert corpus(capsys, "train", change, accepted)[0] == 2  # for data have changed too

    def test_all_is_tokenized_again_where_earlier_tokens_are_gone(
        self, corpus: Corpus, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for folder in corpus.root.glob("stages/tokens-*"):
            shutil.rmtree(folder)
        shutil.rmtree(corpus.root / corpus.run_json()["prepared"])
        corpus.write("e", make_pairs(10, seed=5))
        code, last, err = corpus(capsys, "prepare")
        assert (code, last["metrics"]["rows_kept"]) == (0, 458), err
        assert "prepare: tokenized" not in err
        assert drift_of(err).startswith("unknown by how much, because ")
        assert len(tokens_of(last["paths"]["prepared"])) == 458
