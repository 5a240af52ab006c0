"""A teacher's vectors beside the token shards, against sentence-transformers, and what a teacher may not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from pipeline.config import Config, ConfigError, load
from pipeline.core.outcome import JobError
from pipeline.data.feed import LocalFeed, RayFeed, training_plan
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import prepare
from pipeline.index.teacher import check_teacher, with_teacher
from pipeline.training.assembly import train_locally
from pipeline.training.prefetch import to_batch
from tests.conftest import make_pairs, no_progress, progress, write_jsonl
from tests.job_process import JobProcess, kill, ray_processes, wait_until, write_config
from tests.test_hf_io import bert as bert
from tests.test_hf_io import saved

NEGATIVES = 2
Data = tuple[Config, Path, Manifest]


def config_of(folder: Path, teacher: Path | str, *overrides: str) -> Config:
    source = {"name": "pages", "type": "json", "path": str(folder / "pairs.jsonl")}
    settings = {
        "storage": {"root": str(folder / "store"), "run": "r"},
        "data": {
            "sources": [source | {"fields": {name: name for name in ("anchor", "positive", "negatives")}}],
            "validation_fraction": 0.1,
        },
        "tokenizer": {"vocab_size": 600, "max_length": 24},
        "model": {"d_model": 16, "num_layers": 0, "d_ff": 16},
        "training": {"global_batch_size": 16, "max_steps": 6, "log_every_steps": 1},
        "objective": {"distillation": {"teacher": str(teacher), "loss": "scores", "hard_negatives": NEGATIVES}},
    }
    (folder / "c.yaml").write_text(json.dumps(settings))
    return load(folder / "c.yaml", list(overrides), environ={})


@pytest.fixture(scope="module")
def teacher(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "find: ", "document": "page: "}
    return saved(bert, tmp_path_factory.mktemp("teacher") / "model", prompts=prompts)


@pytest.fixture(scope="module")
def data(teacher: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Pairs of which some have negatives, in several record files."""
    folder = tmp_path_factory.mktemp("taught")
    rows, others = make_pairs(300), make_pairs(900, seed=5)
    for i, row in enumerate(rows):
        row["negatives"] = [others[3 * i + k]["positive"] for k in range(i % 4)]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = config_of(folder, teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.prepare.SHARD_BYTES", 1 << 13)
        prepared, manifest = prepare(config, progress)
    assert isinstance(prepared, Path)
    assert len(list((prepared / "records").iterdir())) > 2
    return config, prepared, manifest


def made(data: Data, *overrides: str, asked: Any = progress) -> Manifest:
    config, folder, manifest = data
    return with_teacher(load(config.root.parent / "c.yaml", list(overrides), environ={}), folder, manifest, asked)


def folder_of(manifest: Manifest) -> Path:
    assert manifest.teacher
    return Path(manifest.teacher.folder)


def texts_of(data: Data) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(data[1] / "records").to_pylist()}


def encoded(teacher: Path, rows: list[dict[str, Any]]) -> dict[str, list[npt.NDArray[np.float32]]]:
    """Of each row: the anchor's vector, the positive's, and those of the negatives, by sentence-transformers."""
    model = SentenceTransformer(str(teacher), device="cpu")
    texts = [text for row in rows for text in (row["positive"], *(row["negatives"] or []))]
    documents = iter(model.encode_document(texts))
    queries = model.encode_query([row["anchor"] for row in rows])
    return {
        row["id"]: [query, *(next(documents) for _ in range(1 + len(row["negatives"] or [])))]
        for row, query in zip(rows, queries, strict=True)
    }


def test_the_vectors_are_those_of_sentence_transformers(data: Data, teacher: Path) -> None:
    manifest = made(data)
    rows, expected = texts_of(data), encoded(teacher, [*texts_of(data).values()])
    seen = 0
    for shard in manifest.shards:
        ids = pq.read_table(data[1] / shard.path, columns=["id"])["id"].to_pylist()
        file = pq.ParquetFile(folder_of(manifest) / shard.path)
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == shard.row_groups
        for one, row in zip(ids, file.read().to_pylist(), strict=True):
            found = [row["teacher_anchor"], row["teacher_positive"], *(row["teacher_negatives"] or [])]
            np.testing.assert_allclose(np.array(found), np.array(expected[one]), atol=1e-5)
            seen += 1
    assert seen == len(rows) == 300
    assert manifest.teacher
    assert manifest.teacher.width == len(expected[ids[0]][0])


def test_it_is_made_once(data: Data) -> None:
    assert made(data, asked=no_progress) == made(data)
    assert made(data, "objective.distillation.weight=3", asked=no_progress) == made(data)


@pytest.mark.parametrize("kind", [LocalFeed, RayFeed])
def test_a_feed_has_them_at_any_step(kind: type[LocalFeed | RayFeed], data: Data, teacher: Path) -> None:
    manifest = made(data)
    plan = training_plan(data[1], manifest, 16, seed=3)
    expected = encoded(teacher, [*texts_of(data).values()])
    for rank in (0, 1):
        for table in kind(plan, rank, 2).batches(plan.batches_per_epoch - 1, plan.batches_per_epoch + 2):
            batch = to_batch(table, NEGATIVES)
            of_negatives = iter(batch.teacher["negatives"].numpy())
            for i, one in enumerate(batch.ids):
                anchor, positive, *negatives = expected[one]
                np.testing.assert_allclose(batch.teacher["anchor"][i].numpy(), anchor, atol=1e-5)
                np.testing.assert_allclose(batch.teacher["positive"][i].numpy(), positive, atol=1e-5)
                assert batch.negative_counts[i] == min(len(negatives), NEGATIVES)
                for negative in negatives[:NEGATIVES]:
                    np.testing.assert_allclose(next(of_negatives), negative, atol=1e-5)


def test_it_trains_on_them(data: Data) -> None:
    """The loss falls; the validation has it too, and its best metric is still of the vectors' use."""
    config, folder, _ = data
    rates = ["training.max_steps=40", "training.learning_rate=0.03", "storage.run=taught"]
    config = load(config.root.parent / "c.yaml", rates, environ={})
    history: list[dict[str, float]] = []
    train_locally(config, folder, made(data), history.append)
    losses = [row["distillation_loss"] for row in history if "distillation_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert {"validation_distillation_loss", "validation_ndcg@10"} <= history[-1].keys()


# Vectors that someone else has made.


def given(data: Data, folder: Path, **changed: Any) -> Path:
    """All records' vectors in two Parquet files, in another order; `changed` replaces columns."""
    rows, chance = [*texts_of(data).values()][::-1], np.random.default_rng(0)
    table = {
        "id": [row["id"] for row in rows],
        "anchor": [*chance.normal(size=(len(rows), 8))],
        "positive": [*chance.normal(size=(len(rows), 8))],
        "negatives": [[*chance.normal(size=(len(row["negatives"] or []), 8))] for row in rows],
    } | changed
    whole = pa.table({name: values for name, values in table.items() if values is not None})
    folder.mkdir()
    for i, part in enumerate((whole.slice(0, 100), whole.slice(100))):
        pq.write_table(part, folder / f"{i}.parquet", row_group_size=70)
    return folder


def taught_by(data: Data, folder: Path) -> Manifest:
    return made(data, f"objective.distillation.teacher={folder}")


def test_given_vectors(data: Data, tmp_path: Path) -> None:
    folder = given(data, tmp_path / "vectors")
    manifest = taught_by(data, folder)
    expected = {row["id"]: row for row in pq.read_table(folder).to_pylist()}
    for shard in manifest.shards:
        ids = pq.read_table(data[1] / shard.path, columns=["id"])["id"].to_pylist()
        rows = pq.read_table(folder_of(manifest) / shard.path).to_pylist()
        for one, row in zip(ids, rows, strict=True):
            for name in ("anchor", "positive", "negatives"):
                np.testing.assert_allclose(row[f"teacher_{name}"], expected[one][name], rtol=1e-6)


def scored(data: Data, folder: Path, longer: int = 0) -> Path:
    """A folder of scores of the positives and negatives."""
    chance = np.random.default_rng(1)
    rows = [*texts_of(data).values()]
    scores = [chance.normal(size=1 + longer + len(row["negatives"] or [])).tolist() for row in rows]
    folder.mkdir()
    pq.write_table(pa.table({"id": [row["id"] for row in rows], "scores": scores}), folder / "scores.parquet")
    return folder


def test_given_scores(data: Data, tmp_path: Path) -> None:
    folder = scored(data, tmp_path / "scores")
    manifest = taught_by(data, folder)
    expected = {row["id"]: row["scores"] for row in pq.read_table(folder).to_pylist()}
    plan = training_plan(data[1], manifest, 16, seed=3)
    for table in LocalFeed(plan).batches(0, 3):
        batch = to_batch(table, NEGATIVES)
        for i, one in enumerate(batch.ids):
            scores = expected[one][: 1 + NEGATIVES]
            np.testing.assert_allclose(batch.teacher["scores"][i, : len(scores)].numpy(), scores, rtol=1e-6)
    config = load(
        data[0].root.parent / "c.yaml", [f"objective.distillation.teacher={folder}", "storage.run=scored"], environ={}
    )
    history: list[dict[str, float]] = []
    train_locally(config, data[1], manifest, history.append)
    assert "distillation_loss" in history[0]
    assert "validation_ndcg@10" in history[-1]


def test_what_given_scores_may_not_be(data: Data, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"found another number of scores than texts in the record [0-9a-f]{32}; give"):
        taught_by(data, scored(data, tmp_path / "longer", longer=1))
    folder = scored(data, tmp_path / "scores")
    for other in ("objective.distillation.loss=vectors", f"objective.contrastive.guide={folder}"):
        with pytest.raises(ConfigError, match=r"found scores; they need objective\.distillation\.loss=scores"):
            made(data, f"objective.distillation.teacher={folder}", other)
    with pytest.raises(ConfigError, match="found scores; they need records with negatives"):
        made(data, f"objective.distillation.teacher={folder}", "objective.distillation.hard_negatives=0")


def test_what_given_vectors_may_not_be(data: Data, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8))
    uneven, broken = [*vectors], vectors.copy()
    uneven[7], broken[5, 3] = vectors[7][:5], np.nan
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "strange": ({"id": [f"id\n{i}" for i in range(300)]}, r"the id 'id\\n\d+' in .*; give the ids in"),
        "missing": (
            {"id": [f"{i:032x}" for i in range(300)]},
            "no vectors of .* records of .*such as [0-9a-f]{32}; give vectors of all ids",
        ),
        "other": ({"positive": None}, "no column positive in .*; give a column of anchor, positive, negatives"),
        "texts": ({"positive": ["a text"] * 300}, "no vectors in column positive of "),
        "uneven": ({"anchor": uneven}, "vectors of 8 and 5|vectors of 5 and 8"),
        "nan": ({"anchor": [*broken]}, "NaN or infinite numbers in anchor of"),
        "widths": ({"anchor": [*vectors[:, :4]]}, "vectors of 8 and 4 numbers|vectors of 4 and 8 numbers"),
    }
    for name, (changed, words) in cases.items():
        with pytest.raises(JobError, match=f"objective.distillation.teacher: found {words}"):
            taught_by(data, given(data, tmp_path / name, **changed))


def test_what_a_teacher_may_not_be(data: Data, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for teacher, words in (
        (tmp_path / "empty", "found no model and no Parquet files"),
        (tmp_path / "missing", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=f"objective.distillation.teacher: .*{words}"):
            check_teacher(config_of(tmp_path, teacher))
    (tmp_path / "empty" / "model.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"objective.distillation.teacher: .*model\.json does not describe a model"):
        check_teacher(config_of(tmp_path, tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"same model as distillation\.teacher and contrastive\.guide, not a and b"):
        config_of(tmp_path, "a", "objective.contrastive.guide=b")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("shared_ray")
def test_a_job_killed_while_the_teacher_embeds_goes_on(teacher: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=4)
    told = [f"objective.distillation.teacher={teacher}", "objective.contrastive=null"]
    job = JobProcess("train", config, *told)
    notes = tmp_path / "store" / "stages"

    def done() -> list[Path]:
        return [*notes.glob("teacher-*/scratch/train-teacher*/*.json")]

    wait_until(done, job)
    job.kill()
    before = {path: path.stat().st_mtime_ns for path in done()}
    assert before
    again = JobProcess("train", config, *told)
    wait_until(lambda: len(done()) > len(before), again)
    kill(ray_processes("MapWorker"))
    code, last = again.end()
    assert code == 0, again.log.read_text()
    assert last["metrics"]["step"] == 4
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items() if path.exists())
