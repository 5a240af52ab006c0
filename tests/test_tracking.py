"""Trackers: what each wrote, read back by its own reader; kills and restarts; one that fails; alerts."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, load
from pipeline.core.console import log
from pipeline.training.alerts import MIN_LOSSES, FullMemory, LossSpikes
from pipeline.training.history import (
    PANELS,
    JsonLines,
    Metrics,
    Tracker,
    final_table,
    grouped,
    metrics_kind,
    plot_history,
    read_rows,
    series_of,
)
from pipeline.training.trackers import Trackers, _mode, run_id


def config_of(root: Path, *overrides: str) -> Config:
    file = root / "config.yaml"
    file.write_text("data: {sources: [{name: pairs, type: json, path: pairs.jsonl}]}")
    return load(file, [f"storage.root={root}", "storage.run=small", *overrides], environ={})


def training(step: int, loss: float = 1.0, **others: float) -> Metrics:
    return {"step": step, "loss": loss, **others}


def validation(step: int, value: float = 0.5) -> Metrics:
    return {"step": step, "validation_ndcg@10": value}


def lines_of(path: Path) -> list[Metrics]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Warnings of our own log, as they come."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    yield said
    log.removeHandler(handler)


class TestHistory:
    def path(self, root: Path) -> Path:
        return root / "runs" / "small" / "metrics.jsonl"

    def test_lines_come_as_they_were_reported_and_a_new_run_begins_an_empty_file(self, tmp_path: Path) -> None:
        with Trackers.open(config_of(tmp_path), 0) as trackers:
            trackers.receive({"metrics": training(10, 2.5), "shown": "loss 2.500"})
            trackers.receive({"log": "a line that is no metric"})
        assert lines_of(self.path(tmp_path)) == [training(10, 2.5)]
        Trackers.open(config_of(tmp_path), 0).close()
        assert self.path(tmp_path).read_text() == ""

    @pytest.mark.parametrize(("resumed", "left"), [(19, [10]), (20, [10, 20, 20]), (29, [10, 20, 20])])
    def test_a_resumed_run_keeps_what_lies_before(self, tmp_path: Path, resumed: int, left: list[int]) -> None:
        with Trackers.open(config_of(tmp_path), 0) as trackers:
            for row in (training(10), training(20), validation(20), training(30)):
                trackers.log(row)
        with Trackers.open(config_of(tmp_path), resumed) as trackers:
            trackers.log(training(35))
        assert [row["step"] for row in lines_of(self.path(tmp_path))] == [*left, 35]

    def test_restarted_workers_replace_what_they_report_again(self, tmp_path: Path) -> None:
        def left_of(name: str, *rows: Metrics) -> list[Metrics]:
            lines = JsonLines(tmp_path / name, 0, metrics_kind)
            for row in rows:
                lines.write(row)
            return lines_of(lines.path)

        done = [training(10), training(20), validation(20), training(30), validation(40), training(40)]
        again = [training(20, 7.0), validation(20, 0.7), training(30, 7.0)]
        assert left_of("training first", *done, *again) == [training(10), *again]
        before = [training(14), validation(20), training(21)]
        assert left_of("validation first", *before, training(28), *before[1:]) == before

    def test_any_order_of_kills_gives_the_uninterrupted_file(self, tmp_path: Path) -> None:
        """A checkpoint every 20 steps, lines every 10, validations every 30; killed after each line in turn."""
        whole = [row for step in range(10, 101, 10) for row in (training(step), validation(step))]
        whole = [row for row in whole if "loss" in row or row["step"] % 30 == 0]
        for killed_after in range(len(whole)):
            done = whole[: killed_after + 1]
            resumed = (int(done[-1]["step"]) - 1) // 20 * 20  # a checkpoint comes after its step's lines
            for restart in ("driver", "workers"):
                path = tmp_path / restart / f"{killed_after}.jsonl"
                lines = JsonLines(path, 0, metrics_kind)
                for row in done:
                    lines.write(row)
                if restart == "driver":
                    with path.open("a") as file:
                        file.write('{"step": 9')
                    lines = JsonLines(path, resumed, metrics_kind)
                for row in whole:
                    if row["step"] > resumed:
                        lines.write(row)
                assert lines_of(path) == whole


class Kept(Tracker):
    name = "kept"

    def __init__(self) -> None:
        self.rows: list[Metrics] = []
        self.alerts: list[dict[str, Any]] = []
        self.closed: list[bool] = []

    def log(self, metrics: Metrics) -> None:
        self.rows.append(metrics)

    def alert(self, row: dict[str, Any]) -> None:
        self.alerts.append(row)

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


class Failing(Kept):
    name = "failing"

    def log(self, metrics: Metrics) -> None:
        super().log(metrics)
        raise ConnectionError("the server\nis gone")


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(warnings: list[str]) -> None:
    failing, kept = Failing(), Kept()
    trackers = Trackers([failing, kept], LossSpikes(6), FullMemory(0.85))
    for step in (10, 20):
        trackers.log(training(step))
    trackers.close()
    assert [[row["step"] for row in each.rows] for each in (failing, kept)] == [[10], [10, 20]]
    assert kept.closed == [False]
    assert warnings == ["train: the tracker failing failed and is disabled, training continues: the server is gone"]


def test_a_tracker_that_cannot_be_opened_is_left_out(tmp_path: Path, warnings: list[str]) -> None:
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("a file where its folder should be")
    with Trackers.open(config_of(tmp_path, "logging.trackers=[tensorboard]"), 0) as trackers:
        trackers.log(training(10))
    assert len(warnings) == 1
    assert "tensorboard failed" in warnings[0]
    assert lines_of(folder / "metrics.jsonl") == [training(10)]


def test_trackers_learn_that_a_run_failed() -> None:
    kept = Kept()
    with pytest.raises(RuntimeError, match="no luck"), Trackers([kept], LossSpikes(6), FullMemory(0.85)):
        raise RuntimeError("no luck")
    assert kept.closed == [True]


class TestTensorBoard:
    def events(self, root: Path) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(root / "runs" / "small" / "tensorboard"))
        accumulator.Reload()
        scalars = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
        return {tag: [(event.step, round(event.value, 4)) for event in events] for tag, events in scalars.items()}

    def test_it_reads_back_what_was_reported_without_what_a_restart_takes_again(self, tmp_path: Path) -> None:
        config = config_of(tmp_path, "logging.trackers=[tensorboard]")
        with Trackers.open(config, 0) as trackers:
            for row in (training(10, learning_rate=0.1), training(20), validation(20, 0.75), *map(training, (30, 40))):
                trackers.log(row)
        with Trackers.open(config, 20) as trackers:  # in the same second, as a rule
            for step in (30, 40, 50):
                trackers.log(training(step, 2.0))
            for step in (40, 50, 60):  # of restarted workers
                trackers.log(training(step, 3.0))
        assert self.events(tmp_path) == {
            "train/loss": [(10, 1.0), (20, 1.0), (30, 2.0), (40, 3.0), (50, 3.0), (60, 3.0)],
            "train/learning_rate": [(10, 0.1)],
            "validation/ndcg_10": [(20, 0.75)],
        }


class TestWeightsAndBiases:
    def records(self, folder: Path) -> list[Any]:
        """All records of a short offline run: protocol buffers in LevelDB's log format, of one block of 32 KiB.

        The format: https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of 7 bytes.
        """
        from wandb.proto import wandb_internal_pb2

        (path,) = folder.glob("*.wandb")
        data, at, records = path.read_bytes(), 7, []
        assert len(data) < 1 << 15
        while at < len(data):
            _, length, kind = struct.unpack_from("<IHB", data, at)
            assert kind == 1  # a whole record
            records.append(wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length]))
            at += 7 + length
        return records

    def history(self, folder: Path) -> list[dict[str, Any]]:
        rows = [record.history for record in self.records(folder) if record.WhichOneof("record_type") == "history"]
        return [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows
        ]

    def start(self, root: Path, resumed: int, body: str) -> subprocess.CompletedProcess[str]:
        """A process of its own, as each start of a run has: within one, wandb may lose what the second logs."""
        script = f"""if True:
            from tests.test_tracking import Path, Trackers, config_of, training, validation
            config = config_of(Path({str(root)!r}), "logging.trackers=[wandb]", "logging.project=tests")
            with Trackers.open(config, {resumed}) as trackers:
                {body}"""
        environ = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
        environ["WANDB_MODE"] = "online"
        return subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)

    def test_offline_runs_lie_in_the_runs_folder_and_go_on(self, tmp_path: Path) -> None:
        alert = "trackers.alert('loss spike', 'the loss is high', 10)"
        begun = self.start(tmp_path, 0, f"trackers.log(training(10, 2.5)); trackers.log(validation(10, 0.75)); {alert}")
        gone_on = self.start(tmp_path, 10, "trackers.log(training(20, 1.5)); trackers.log(training(15, 1.75))")
        assert begun.stderr.splitlines() == ["train: loss spike: the loss is high"]
        assert (begun.stdout, gone_on.stdout, gone_on.stderr) == ("", "", "")
        first, second = sorted((tmp_path / "runs" / "small" / "wandb").glob("offline-run-*-*"))
        assert first.name.split("-")[-1] == second.name.split("-")[-1]  # one run
        logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.history(first)]
        assert logged == [{"step": 10, "train/loss": 2.5}, {"step": 10, "validation/ndcg@10": 0.75}]
        assert [row["step"] for row in self.history(second)] == [20, 15]
        kinds = [record.WhichOneof("record_type") for record in self.records(first)]
        assert "alert" in kinds
        run = next(record.run for record in self.records(first) if record.WhichOneof("record_type") == "run")
        assert (run.project, run.display_name) == ("tests", "small")
        assert not Path("wandb").exists()  # none where the tests run

    def test_a_run_deleted_and_begun_anew_is_another(self, tmp_path: Path) -> None:
        first = run_id(tmp_path / "a")
        assert run_id(tmp_path / "a") == first
        assert run_id(tmp_path / "b") != first

    def test_without_a_key_it_is_offline(self) -> None:
        key = {"WANDB_API_KEY": "k"}
        assert _mode(key) == "online"
        for without in ({}, {"WANDB_MODE": "online"}, {**key, "WANDB_MODE": "offline"}):
            assert _mode(without) == "offline"


class TestRay:
    def test_names_fit_prometheus(self, ray_cluster: None, tmp_path: Path, warnings: list[str]) -> None:
        with Trackers.open(config_of(tmp_path, "logging.trackers=[ray]"), 0) as trackers:
            trackers.log(training(10, 2.5))
            trackers.log(validation(10))
            gauges = trackers.trackers[1].gauges  # type: ignore[attr-defined]
        assert warnings == []
        names = [gauge.info["name"] for gauge in gauges.values()]
        assert names == ["text_embedding_step", "text_embedding_loss", "text_embedding_validation_ndcg_10"]

    @pytest.mark.exhaustive
    def test_the_nodes_endpoint_shows_them(self, tmp_path: Path) -> None:
        """In a process of its own, whose Ray session exports metrics, as that of no other test does."""
        environment = os.environ | {"RAY_enable_metrics_collection": "1"}
        done = subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path)], env=environment, stdout=-1, text=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ray_text_embedding_loss{")]
        assert 'run="small"' in line
        assert float(line.split()[-1]) == 2.5


EXPORT = """
import sys, time, urllib.request, ray
from tests.test_tracking import Path, Trackers, config_of, training
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
endpoint, text = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", ""
with Trackers.open(config_of(Path(sys.argv[1]), "logging.trackers=[ray]"), 0) as trackers:
    for _ in range(120):
        trackers.log(training(10, 2.5))
        time.sleep(1)  # Ray exports every few seconds
        text = urllib.request.urlopen(endpoint).read().decode()
        if "text_embedding_loss" in text:
            break
print(text)
"""


def feed(spikes: LossSpikes, losses: list[float], first_step: int = 1) -> list[int]:
    """The steps at which a spike was found."""
    return [step for step, loss in enumerate(losses, first_step) if spikes.update(step, loss)]


class TestLossSpikes:
    QUIET = [0.9, 1.1] * 10  # mean 1, standard deviation 0.1

    @pytest.mark.parametrize(
        ("losses", "found"),
        [
            pytest.param([*QUIET, 1.599], [], id="fewer deviations"),
            pytest.param([*QUIET, 1.601], [21], id="more deviations"),
            pytest.param([*QUIET[1 - MIN_LOSSES :], 9.0], [], id="too few losses"),
            pytest.param([*QUIET[-MIN_LOSSES:], 9.0], [MIN_LOSSES + 1], id="enough losses"),
            pytest.param([*QUIET, 9.0, 1.0, 1.7], [21, 23], id="a spike does not hide the next"),
            pytest.param([*QUIET, *[5.0, 5.2] * 11, 9.0], [21, 43], id="what stays high is one spike, then a level"),
            pytest.param([*[2.0] * 20, 2.0001, 2.13], [22], id="all alike, but for a last digit"),
        ],
    )
    def test_where_they_are(self, losses: list[float], found: list[int]) -> None:
        assert feed(LossSpikes(6.0), losses) == found

    @pytest.mark.parametrize(("window", "found"), [(20, [41]), (40, [])])
    def test_only_the_window_counts(self, window: int, found: list[int]) -> None:
        assert feed(LossSpikes(6.0, window=window), [*[100.0, 50.0] * 10, *self.QUIET, 2.0]) == found

    def test_what_it_says(self) -> None:
        spikes = LossSpikes(6.0)
        feed(spikes, self.QUIET)
        assert str(spikes.update(1234, 2.0)).startswith(
            "step 1,234: the loss is 2, 10.0 standard deviations above 1, the mean of the last 20 logged ones; "
        )

    def test_steps_that_come_again_are_found_again(self) -> None:
        spikes = LossSpikes(6.0)
        assert feed(spikes, [*self.QUIET, 9.0, 1.0]) == [21]
        assert feed(spikes, [9.0, 1.0], first_step=21) == [21]


class TestAlerts:
    def test_they_go_to_the_log_the_file_and_the_trackers(self, tmp_path: Path, warnings: list[str]) -> None:
        config, kept = config_of(tmp_path, "logging.loss_spike_deviations=3"), Kept()
        with Trackers.open(config, 0) as trackers:
            trackers.trackers.append(kept)
            for step in range(1, 21):
                trackers.log(training(step, 1.0 + 0.1 * (step % 2)))
            trackers.log(training(21, 9.0))
            trackers.receive({"alert": {"title": "gradient overflow", "text": "step 22 is skipped", "step": 22}})
        rows = read_rows(tmp_path / "runs" / "small" / "alerts.jsonl")
        assert [(row["step"], row["title"]) for row in rows] == [(21, "loss spike"), (22, "gradient overflow")]
        assert kept.alerts == rows
        assert warnings == [f"train: {row['title']}: {row['text']}" for row in rows]

    def test_full_memory_is_told_once(self) -> None:
        full = FullMemory(0.85)
        shares = [0.85, 0.8501, 0.99]
        said = [full.update(training(step, memory_share=share)) for step, share in enumerate(shares)]
        assert [bool(text) for text in said] == [False, True, False]
        assert full.update(training(3)) is None

    def test_a_resumed_run_forgets_alerts_of_steps_it_never_had(self, tmp_path: Path) -> None:
        config = config_of(tmp_path)
        with Trackers.open(config, 0) as trackers:
            trackers.alert("a", "early", 10)
            trackers.alert("b", "as early", 10)
            trackers.alert("a", "late", 30)
        Trackers.open(config, 20).close()
        rows = read_rows(tmp_path / "runs" / "small" / "alerts.jsonl")
        assert [row["text"] for row in rows] == ["early", "as early"]


ROWS: list[dict[str, Any]] = [
    {"step": 10, "loss": 2.5, "learning_rate": 0.001, "pairs_per_s": 1234.5},
    {"step": 10, "validation_loss": 2.0, "validation_ndcg@10": 0.8},
    {"step": 20, "loss": 0.5, "learning_rate": 0.0005, "pairs_per_s": 2000.0},
    {"step": 20, "validation_loss": 2.2, "validation_ndcg@10": 0.9},
    {"step": 30, "validation_loss": 2.1, "validation_ndcg@10": float("nan")},
]


class TestSummary:
    def test_the_table_has_last_and_best(self) -> None:
        lines = [line.split() for line in final_table(ROWS).splitlines() if line and "---" not in line]
        assert lines == [
            ["training", "step", "20"],
            ["loss", "0.5"],
            ["learning_rate", "0.0005"],
            ["speed", "2,000", "pairs/s"],
            ["validation", "step", "30", "best", "at", "step"],
            ["loss", "2.1", "2", "10"],
            ["ndcg@10", "nan", "0.9", "20"],
        ]

    def test_a_run_without_rows_has_an_empty_table_and_no_picture(self, tmp_path: Path) -> None:
        assert final_table([]) == ""
        plot_history(tmp_path / "none.jsonl", tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()

    def test_panels_that_have_data_are_drawn(self, tmp_path: Path) -> None:
        history = tmp_path / "metrics.jsonl"
        history.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        plot_history(history, tmp_path / "history.png")
        assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
        drawn = {panel.title: sorted(series_of(ROWS, panel)) for panel in PANELS if series_of(ROWS, panel)}
        assert drawn == {
            "loss": ["loss", "validation_loss"],
            "validation scores": ["validation_ndcg@10"],
            "learning rate": ["learning_rate"],
            "pairs per second": ["pairs_per_s"],
        }
        assert sorted(os.listdir(tmp_path)) == ["history.png", "metrics.jsonl"]

    def test_no_metric_is_drawn_in_two_panels(self) -> None:
        names = "loss validation_loss validation_seq2seq_bleu validation_seq2seq_rouge1 seq2seq_perplexity mrr mfu"
        names += " validation_seq2seq_perplexity validation_sts_spearman grad_norm memory_bytes"
        for name in names.split():
            assert sum(bool(re.fullmatch(panel.names, name)) for panel in PANELS) == 1, name


def test_groups_are_by_the_prefix() -> None:
    assert grouped({"step": 1, "loss": 2.0, "validation_loss": 3.0}) == {"train/loss": 2.0, "validation/loss": 3.0}
