"""The report: what it says of a run, finished or not; hostile texts; and that a browser draws it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config, ConfigError, load
from pipeline.core.job_record import command, read_job_records
from pipeline.core.outcome import JobError
from pipeline.data.manifest import REJECTED_SCHEMA, Manifest, SourceCount
from pipeline.evaluation.examples import choose
from pipeline.evaluation.job import artifact_of
from pipeline.report.charts import bm25_of_validation, training_charts
from pipeline.report.facts import EXAMPLES_PER_REASON, collect
from pipeline.report.job import compare, write_report
from pipeline.report.page import clean, duration, number, one_line
from tests.conftest import run_here
from tests.test_verdict import config_of

EVIL = "</script><script>document.title='hacked'</script><img src=x onerror=alert(2)>"
ACTS = "\x1b[2J\u202egnp.exe\u2066\x07"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tags(HTMLParser):
    """What a browser would see: tags with attributes, scripts by type, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._script: str | None = None
        self.feed(html)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._script = (dict(attrs).get("type") or "code") if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.words += data.split()
        else:
            self.scripts.append((self._script, data))


def config_in(folder: Path, run: str = "r") -> Config:
    settings = {"storage": {"root": str(folder), "run": run}}
    (folder / "c.yaml").write_text(json.dumps(settings))
    return load(folder / "c.yaml", environ={})


def make_run(folder: Path, name: str = "r", word: str = "kite", loss: float = 2.0) -> Config:
    """A run's files as the jobs write them; `word` is in every text."""
    config = config_in(folder, name)
    run, prepared = folder / "runs" / name, folder / "prepared" / "k"
    (prepared / "rejected").mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True)
    length = dict.fromkeys(("mean", "p50", "p95", "max", "whole_mean", "tokens", "rows"), 9.0)
    manifest = Manifest(
        "f00d",
        [SourceCount(word[:100], 10, 5, {"too_short": 4, word[:60]: 1})],
        {"train": 4, "validation": 1},
        [],
        {"text": {**length, "truncation_rate": 0.48, "unknown_rate": 0.0}},
        [],
        {},
        histograms={"text": {"longest": 60, "texts": [1] * 60}},
    )
    rows = [["i", word[:100], f"{word}:1", "too_short", f"{word} excerpt", None, None] for _ in range(9)]
    table = pa.Table.from_pylist([dict(zip(REJECTED_SCHEMA.names, row, strict=True)) for row in rows], REJECTED_SCHEMA)
    pq.write_table(table, prepared / "rejected" / "0.parquet")
    (prepared / "manifest.json").write_text(json.dumps(asdict(manifest)))
    described = {"data_fingerprint": "f00d", "prepared": "prepared/k", "settings": {}, "steps": 20, "git_sha": "abc123"}
    (run / "run.json").write_text(json.dumps({**described, "versions": {"torch": word[:40]}, "python": "3.11"}))
    metrics = [{"step": step, "loss": loss / step, "learning_rate": 0.1, "grad_norm": math.nan} for step in (1, 10, 20)]
    metrics += [{"step": 20, "validation_ndcg@10": 0.5, "validation_loss": math.inf}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run / "alerts.jsonl").write_text(json.dumps({"step": 3, "title": "loss spike", "text": f"{word} spiked"}) + "\n")
    key = {"model": "m"}
    system = {"ndcg@10": 0.75, "mrr@10": 0.7}
    scores = {
        f"beir {word[:50]}": {"queries": 2, "documents": 9, "model": system, "bm25": {"ndcg@10": 0.5, "mrr@10": 0.4}}
    }
    comparison = {"verdict": "better", "sentence": f"On {word[:50]} the model is better than BM25.", "other": "bm25"}
    evaluated = {"of": key, "scores": scores, "comparisons": [comparison], "not_beaten": []}
    (run / "evaluation.json").write_text(json.dumps(evaluated))
    document = {"id": word, "text": f"{word} text", "score": 0.5, "right": False}
    example = {
        "kind": "worst",
        "query": f"{word}?",
        "model": 0.0,
        "bm25": 1.0,
        "expected": [document],
        "found": [document],
    }
    scored = artifact_of(run, key).folder
    scored.mkdir(parents=True)
    (scored / "examples.json").write_text(json.dumps({f"beir {word[:50]}": [example]}))
    (run / "jobs").mkdir()
    job = {"command": f"python jobs/run.py {word[:200]}", "began": "2026-12-01T06:42:00+00:00", "seconds": 312.4}
    job |= {"stages": {"train": 210.0}, "status": "ok", "hardware": {"processor": "EPYC", "memory_bytes": 2**34}}
    (run / "jobs" / "1.json").write_text(json.dumps(job))
    return config


def page_of(config: Config) -> str:
    return Path(write_report(config).paths["report"]).read_text("utf-8")


def data_of(page: Tags) -> list[Any]:
    return [json.loads(text) for kind, text in page.scripts if kind == "application/json"]


def test_what_it_says(tmp_path: Path) -> None:
    page = Tags(page_of(make_run(tmp_path)))
    for part in (
        "better On kite the model is better than BM25.",
        "48% of the texts in text are longer than tokenizer.max_length=",
        "kite spiked",
        "rejected as too_short: 4 records",
        "beir kite (2 queries, 9 documents) model 0.7500 0.7000",
        "kite? NDCG@10 0.000, BM25 1.000",
        "python jobs/run.py kite ok 5 min train 4 min EPYC, 16 GiB",
        "commit abc123",
        "There is no map of the vectors: python jobs/map.py draws one",
        "root: " + str(tmp_path),
    ):
        assert " ".join(part.split()) in page.text
    assert page.text.count("kite excerpt") == EXAMPLES_PER_REASON
    (funnel, *_) = (each for each in data_of(page) if "data" in each and each["data"][0]["type"] == "bar")
    assert (funnel["data"][0]["y"], funnel["data"][0]["x"]) == (["in", "too_short", "kite", "kept"], [10, 4, 1, 5])
    titles = [chart["title"] for chart in training_charts([collect(config_in(tmp_path))])]
    assert titles == ["loss", "validation scores", "learning rate"]  # the gradient norms are NaN


def test_it_follows_from_the_run_s_files(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    report = tmp_path / "runs" / "r" / "report.html"
    page_of(config)
    before = report.stat()
    page_of(config)
    assert report.stat() == before
    with (tmp_path / "runs" / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 0.5}\n')
    page_of(config)
    assert report.stat().st_mtime_ns > before.st_mtime_ns
    assert len(list((tmp_path / "runs" / "r" / "reports").iterdir())) == 1  # earlier ones are removed
    report.unlink()
    page_of(config)
    assert report.is_file()


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (
            ("run.json", "metrics.jsonl", "evaluation.json"),
            "The run is not trained yet: python jobs/train.py trains it.",
        ),
        (("evaluation.json",), "The model has no scores yet: python jobs/evaluate.py scores it."),
        (("metrics.jsonl", "evaluation.json"), "The run is at step 0 of 20; the same command continues it."),
    ],
)
def test_a_run_that_is_not_finished(tmp_path: Path, missing: tuple[str, ...], sentence: str) -> None:
    config = make_run(tmp_path)
    for name in missing:
        (tmp_path / "runs" / "r" / name).unlink()
    assert sentence in Tags(page_of(config)).text


def test_texts_alone_have_no_verdict(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    (tmp_path / "runs" / "r" / "evaluation.json").write_text('{"of": {}, "scores": {}, "comparisons": []}')
    text = Tags(page_of(config)).text
    assert "There is no verdict" in text
    assert "There are no examples of queries" in text


def test_no_such_run(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    with pytest.raises(JobError, match=r"holds no run to report on; the runs of .* are: one"):
        write_report(config_in(tmp_path, "two"))
    for name in ("../one", "a b", "/etc"):
        with pytest.raises(ConfigError, match="allowed are names of runs"):
            compare(config_in(tmp_path), [name])


@pytest.mark.parametrize("word", [EVIL, ACTS, f"{EVIL}{ACTS}" * 10_000])
def test_no_text_runs_or_moves_the_cursor(tmp_path: Path, word: str) -> None:
    (tmp_path / "tame").mkdir()
    (tmp_path / "wild").mkdir()
    tame, wild = page_of(make_run(tmp_path / "tame")), page_of(make_run(tmp_path / "wild", word=word))
    assert Tags(wild).tags == Tags(tame).tags
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", wild.replace(Tags(wild).scripts[-2][1], "")
    )
    assert len(wild) < len(tame) + 300_000
    shown = Tags(wild).text
    assert "\\x1b[2J\\u202e" in shown or "</script><script>" in shown
    for each in data_of(Tags(wild)):
        strings = re.findall(r"[\x00-\x1f\u202a-\u202e\u2066-\u2069]", json.dumps(each, ensure_ascii=False))
        assert not strings


def test_only_our_scripts_may_run_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = Tags(page_of(make_run(tmp_path)))
    policy = next(value or "" for name, value in page.attributes if name == "content" and "script-src" in str(value))
    code = [text for kind, text in page.scripts if kind == "code"][-2:]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert policy.split("script-src ")[1] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy.startswith("default-src 'none'")
    assert not [value for name, value in page.attributes if name in ("src", "href") and not str(value).startswith("#")]


def test_several_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    config = make_run(tmp_path, "two", loss=4.0)
    for name, rate in (("one", 0.1), ("two", 0.2)):
        settings = {"training": {"learning_rate": rate, "seed": 3}}
        (tmp_path / "runs" / name / "config.resolved.yaml").write_text(json.dumps(settings))
    path = compare(config, ["one", "two", "one"]).paths["report"]
    assert path == str(tmp_path / "reports" / "one-two.html")
    page = Tags(Path(path).read_text("utf-8"))
    assert "training.learning_rate 0.1 0.2" in page.text
    assert "training.seed" not in page.text
    assert "beir kite (2 queries, 9 documents) model ndcg@10 0.7500 0.7500" in page.text
    names = [line.get("name") for each in data_of(page) if "data" in each for line in each["data"]]
    assert {"one: loss", "two: loss", "one: ndcg@10"} <= set(names)
    assert compare(config, ["one"]).paths["report"] == str(tmp_path / "runs" / "one" / "report.html")


def browse(page: Path, *flags: str) -> tuple[str, str]:
    """The DOM after a browser has run the page, and what it logged to the console."""
    assert CHROMIUM
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=20000"]
    options += ["--enable-logging=stderr", "--dump-dom", *offline, *flags]
    with tempfile.TemporaryDirectory() as profile:
        command_line = [CHROMIUM, f"--user-data-dir={profile}", *options, page.as_uri()]
        done = subprocess.run(command_line, capture_output=True, text=True, timeout=500)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)])
def test_a_browser_draws_every_chart(tmp_path: Path, flags: tuple[str, ...]) -> None:
    config = make_run(tmp_path, word=EVIL)
    page = Path(write_report(config).paths["report"])
    dom, console = browse(page, *flags)
    assert console == ""
    assert 'data-drawn="yes"' in dom
    assert "<title>r</title>" in dom
    charts = Tags(page.read_text("utf-8")).attributes.count(("class", "chart"))
    assert charts == 6
    assert len(re.findall(r'class="chart[^"]* js-plotly-plot"', dom)) == charts


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    code, last, _, err = run_here(capsys, "run", "--config", str(config))
    assert code == 0, err
    page = Tags(Path(last["paths"]["report"]).read_text("utf-8"))
    assert "There is no map of the vectors" in page.text
    assert re.search(r"(better|worse|not clearly different) On held-out the model is", page.text)
    assert "held-out: random queries" in page.text
    assert "1 node, 2 CPUs" in page.text
    (job,) = read_job_records(tmp_path / "store" / "runs" / "r")
    assert set(job["stages"]) == {"prepare", "train", "evaluate", "embed"}
    facts = collect(load(config, environ={}))
    assert facts.manifest
    texts = facts.manifest.histograms["positive"]["texts"]
    assert sum(texts) == facts.manifest.lengths["positive"]["rows"]
    bm25 = bm25_of_validation(facts)
    assert bm25["recall@1"] > 0.9  # anchor and positive share two rare words
    names = [line.get("name") for each in data_of(page) if "data" in each for line in each["data"]]
    assert {"loss", "ndcg@10", "BM25's ndcg@10"} <= set(names)

    code, last, _, err = run_here(capsys, "report", "--config", str(config))
    assert (code, "report:" in err) == (0, True)
    code, _, _, err = run_here(capsys, "report", "--config", str(config), "r", "none")
    assert code == 1
    assert "the runs of" in err
    assert len(read_job_records(tmp_path / "store" / "runs" / "r")) == 1  # nothing more was done


def test_which_queries_are_examples() -> None:
    model = {f"q{i}": i / 20 for i in range(20)} | {"tie": 0.95}
    bm25 = dict.fromkeys(model, 0.5) | {"tie": 0.0}
    chosen = choose({"model": model, "bm25": bm25}, 3)
    assert [query for query, kind in chosen.items() if kind == "best"] == ["tie", "q19", "q18"]
    assert [query for query, kind in chosen.items() if kind == "worst"] == ["q0", "q1", "q2"]
    assert len([query for query, kind in chosen.items() if kind == "random"]) == 3
    assert choose({"model": {"a": 1.0}}) == {"a": "random"}
    assert choose({"model": {}}) == {}


def test_a_command_as_you_would_type_it() -> None:
    assert command(["/home/me/project/jobs/run.py", "data.sources=[{name: a}]"]) == (
        "python jobs/run.py 'data.sources=[{name: a}]'"
    )
    assert command(["/opt/bin/tep", "run"]) == "tep run"
    assert "secret" not in command(["jobs/run.py", "storage.root=s3://key:secret@bucket/x"])


def test_texts_and_numbers() -> None:
    assert one_line("a\n b\tc" + "d" * 100, 8) == "a b cdd…"
    assert clean({"a\u202e": [math.nan, 1, "\x1b"]}) == {"a\\u202e": [None, 1, "\\x1b"]}
    assert [number(each) for each in (1234, 0.123456, 12_345.6, None, math.nan)] == [
        "1,234",
        "0.1235",
        "12,346",
        "–",
        "–",
    ]
    assert [duration(each) for each in (3.2, 90, 7_500)] == ["3 s", "2 min", "2 h 5 min"]
