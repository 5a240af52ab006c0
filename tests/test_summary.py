"""The end of a job: a person at a terminal reads a summary in plain words, and a program a line of JSON."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import stages
from pipeline.config import Config, ConfigError, load
from pipeline.core.cluster import Cluster, Node
from pipeline.core.console import duration, number
from pipeline.core.outcome import Result
from pipeline.data.manifest import Manifest, Shard, SourceCount
from pipeline.evaluation.summary import summary
from pipeline.job import parser, run_job
from pipeline.training.history import final_table
from pipeline.training.workers import AUTO_LAYERS, choose_layers, size_workers
from tests.conftest import run_here

SCORES = {"ndcg@10": 0.7, "mrr@10": 0.6}
METRICS: dict[str, Any] = {
    "prepare": {"rows_in": 6000, "rows_kept": 5000, "tokens": 90_000, "splits": {"train": 4000, "validation": 1000}},
    "train": {"step": 24, "train_seconds": 100.0},
    "evaluate": {
        "held-out": {
            "queries": 500,
            "documents": 1000,
            "model": SCORES,
            "bm25": SCORES | {"ndcg@10": 0.5},
            "hybrid": SCORES | {"ndcg@10": 0.6},
        }
    },
    "embed": {"embedded": 5000, "rows": 5000},
}
VERDICT = "On held-out the model is better than BM25: NDCG@10 0.700, and 0.500 for BM25."


def run_of(folder: Path, *, pairs: bool = True, rows: int = 4000, cut: float = 0.0, losses: tuple[float, float]) -> Any:
    """A finished run's config, with the files that a summary reads."""
    config = load(Path("configs/pairs.yaml"), [f"storage.root={folder}"], environ={})
    fields = ("anchor", "positive") if pairs else ("text",)
    lengths = {name: {"truncation_rate": cut, "tokens": 45_000.0} for name in fields}
    source = SourceCount("pages\x1b[2J", 6000, 5000, {"duplicate": 1000})
    shard = Shard("train/00000.parquet", "train", rows, [rows], ["pages"], "")
    manifest = Manifest("f", [source], {"train": rows, "validation": 1000}, [shard], lengths, [], {})
    prepared = folder / "prepared" / "x"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").write_text(json.dumps(asdict(manifest)))
    config.run_dir.mkdir(parents=True)
    begun = {"data_fingerprint": "f", "prepared": "prepared/x", "settings": {}, "steps": 24}
    (config.run_dir / "run.json").write_text(json.dumps(begun | {"fixed": {"model.num_layers": 2}}))
    history = [
        {"step": 20, "loss": losses[0], "pairs_per_s": 1234.5},
        {"step": 24, "validation_loss": losses[1]},
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history) + '{"step": 3')
    (config.run_dir / "evaluation.json").write_text(json.dumps({"comparisons": [{"sentence": VERDICT}]}))
    return config


def test_a_run_says_what_was_done_how_good_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    config = run_of(tmp_path, losses=(1.0, 1.5))
    said = summary("run", config, Result(METRICS, {"prepared": str(tmp_path / "prepared" / "x"), "model": "m"}))
    assert "4,000 pairs" in said
    assert "24 steps of 512 pairs in 1.7 min, 1,234 pairs/s at the end" in said
    assert "2 transformer layers, of width 256" in said
    assert VERDICT in said
    assert "5,000 can be searched" in said
    assert "hybrid search was worse" in said
    assert len(re.findall(r"^  .*jobs/|^  tep ", said, re.MULTILINE)) == 3
    for other in ("cut", "much better than others", "few for a model", "Nothing was scored"):
        assert other not in said
    assert not re.search(r"\d[eE][+-]\d", said)


def test_warnings_name_the_key_to_change(tmp_path: Path) -> None:
    config = run_of(tmp_path, rows=900, cut=0.48, losses=(0.02, 1.2))
    said = summary("train", config, Result(METRICS["train"]))
    assert "48% of the texts in `positive` are longer than 128 tokens and were cut" in said
    assert "tokenizer.max_length" in said
    assert "900 pairs are few for a model from scratch" in said
    assert "training loss, 0.02, is far below the validation loss, 1.2" in said
    assert "more data may give a better one" in said
    assert "early_stopping" not in said
    lines = (config.run_dir / "metrics.jsonl").read_text()
    (config.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 12, "validation_loss": 1.1}) + "\n" + lines)
    said = summary("train", config, Result(METRICS["train"]))
    assert "the validation loss was 1.1 before" in said
    assert "training.early_stopping.patience" in said


def test_texts_alone_say_what_a_score_would_need(tmp_path: Path) -> None:
    config = run_of(tmp_path, pairs=False, losses=(1.0, 1.5))
    (config.run_dir / "evaluation.json").unlink()
    said = summary("run", config, Result(METRICS | {"evaluate": {}}))
    assert "4,000 texts" in said
    assert "texts/s" in said
    assert "Nothing was scored" in said
    assert "evaluation.beir_dir=DIR" in said
    assert "\n\n\n" not in said
    assert "pairs/s" not in said


@pytest.mark.parametrize(("argv", "ends"), [([], "done\\x1b"), (["--json"], "}")])
def test_a_terminal_gets_the_summary_and_json_only_on_demand(
    argv: list[str], ends: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    result = Result({"a": 1}, summary="done\x1b")
    argv = [*argv, f"storage.root={tmp_path}"]
    assert run_job("prepare", "", lambda config, args: result, parser("prepare", ""), argv) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith(ends)
    assert ("{" in out) == ("--json" in argv)
    log = tmp_path / "runs" / "quickstart" / "training.log"
    assert "done\\x1b" in log.read_text()


def test_a_pipe_gets_json_and_the_log_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, argv = Result({"a": 1}, summary="all is done"), [f"storage.root={tmp_path}"]
    assert run_job("prepare", "", lambda config, args: result, argv=argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["metrics"] == {"a": 1}
    assert "all is done" in err


def test_a_damaged_history_does_not_fail_a_finished_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, losses=(1.0, 1.5))
    (config.run_dir / "metrics.jsonl").write_bytes(b"\xff}\n")
    monkeypatch.setattr("pipeline.api.train", lambda config, **options: Result(METRICS["train"]))
    code, last, _, err = run_here(capsys, "train", "--config", "configs/pairs.yaml", f"storage.root={tmp_path}")
    assert (code, last["status"], last["metrics"]["step"]) == (0, "ok", 24)
    assert "train: cannot summarise the run: UnicodeDecodeError" in err


def test_a_failed_job_prints_no_summary_at_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, args: Any) -> Result:
        raise ConfigError("data.sources: found nothing")

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_job("prepare", "", fail, argv=[f"storage.root={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "prepare: data.sources: found nothing\n")


def test_a_result_without_a_summary_is_a_table_of_readable_numbers() -> None:
    said = str(Result({"loss": 1.05e-05, "of": {"rows": 1234567}}, {"model": "m"}))
    assert [line.split() for line in said.split("\n")[2:]] == [
        ["loss", "0.0000105"],
        ["of.rows", "1,234,567"],
        ["model", "m"],
    ]
    assert str(Result()) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (7, "7"),
        (1234567, "1,234,567"),
        (0.63441, "0.6344"),
        (1.05e-05, "0.0000105"),
        (12.5, "12.5"),
        (-0.5, "-0.5"),
        (123456.7, "123,457"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_for_people(value: float, shown: str) -> None:
    assert number(value) == shown


def test_durations_for_people() -> None:
    assert [duration(each) for each in (0.25, 8.44, 89, 114, 7200)] == ["0.2 s", "8.4 s", "89 s", "1.9 min", "2.0 h"]


def test_the_table_of_training_has_units() -> None:
    row = {
        "step": 20,
        "loss": 0.5,
        "accuracy": 0.985,
        "learning_rate": 1.05e-05,
        "pairs_per_s": 2000.4,
        "tokens_per_s": 1e5,
        "data_wait_share": 0.021,
        "eta_s": 0.0,
        "train_seconds": 100.0,
        "memory_bytes": 8.1e8,
        "skipped_steps": 0,
    }
    said = final_table([row], "texts")
    assert [line.split(maxsplit=1) for line in said.split("\n")[2:]] == [
        ["loss", "0.5"],
        ["accuracy", "98.5%"],
        ["learning_rate", "0.0000105"],
        ["speed", "2,000 texts/s"],
        ["speed", "100,000 tokens/s"],
        ["data_wait", "2.1%"],
        ["time", "1.7 min"],
        ["memory", "0.81 GB"],
    ]


def cluster_of(gpus: float) -> Cluster:
    return Cluster((Node(8.0, gpus, {}),))


def auto(*overrides: str) -> Config:
    return load(Path("configs/quickstart.yaml"), overrides, environ={})


class TestLayers:
    def test_cpus_train_a_table_and_gpus_layers(self) -> None:
        config = auto()
        layers, why = choose_layers(config, size_workers(config, cluster_of(0)), 1e8)
        assert (layers, "no GPU" in why) == (0, True)
        layers, why = choose_layers(config, size_workers(config, cluster_of(2)), 1e8)
        assert (layers, "2 GPUs" in why) == (AUTO_LAYERS, True)
        config = auto("scaling.gpus_per_worker=0")
        assert choose_layers(config, size_workers(config, cluster_of(2)), 1e8)[0] == 0

    def test_no_more_layers_than_the_time_allows(self) -> None:
        """A layer of `tiny` has 4 x 256² + 3 x 256 x 768 weights, 6 operations each a token, at 1e13 a second."""
        layer_s = 6 * (4 * 256**2 + 3 * 256 * 768) * 1e9 / 1e13
        workers = size_workers(auto(), cluster_of(1))
        for limit, expected in ((2.1 * layer_s, 2), (1.9 * layer_s, 1), (0.9 * layer_s, 0)):
            layers, why = choose_layers(auto(f"training.max_time_s={limit}"), workers, 1e9)
            assert layers == expected, why
        assert choose_layers(auto("model.size=small", "training.max_time_s=1e6"), workers, 1e9)[0] == 6

    @pytest.mark.parametrize("gpus", [0, 1])
    def test_the_number_is_chosen_before_anything_is_hashed_and_then_kept(
        self, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        run_of(tmp_path, losses=(1.0, 1.0))
        manifest = Manifest(**json.loads((tmp_path / "prepared" / "x" / "manifest.json").read_text()))
        manifest = Manifest(**vars(manifest) | {"shards": [Shard(**manifest.shards[0])], "sources": []})  # type: ignore[arg-type]

        def session() -> Any:
            config = auto(f"storage.root={tmp_path}")
            prepared = (tmp_path / "prepared" / "x", manifest)
            return SimpleNamespace(config=config, prepared=lambda: prepared, progress=lambda: None)

        monkeypatch.setattr(stages, "connected_cluster", lambda: cluster_of(gpus))
        caplog.set_level("INFO")
        first = session()
        config = stages._choose_layers(first)
        assert config.model.num_layers == AUTO_LAYERS * gpus
        assert config.training.table_warmup_fraction == 0.5 * gpus
        assert first.config is config
        assert f"model.num_layers={AUTO_LAYERS * gpus}" in caplog.text
        assert ("1 GPU should train them" if gpus else "training has no GPU") in caplog.text
        kept = {"model.num_layers": 5, "training.table_warmup_fraction": 0.25}
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "run.json").write_text(json.dumps({"fixed": kept}))
        again = stages._choose_layers(session())
        assert (again.model.num_layers, again.training.table_warmup_fraction) == (5, 0.25)

    def test_another_word_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.num_layers.*auto"):
            auto("model.num_layers=many")
        with pytest.raises(ConfigError, match=r"model\.num_layers"):
            auto("model.num_layers=-1")
