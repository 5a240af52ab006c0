"""Sources of type huggingface: the real libraries against a hub on 127.0.0.1, and folders of data sets.

The libraries read HF_ENDPOINT when they are imported, so what asks the hub is a process of its own.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError, Source
from pipeline.data import hub as hub_module
from pipeline.data import input_files
from pipeline.data.sources import check_fields, plan_source, read
from tests.hub_server import Faults, hub
from tests.test_sources import all_records, as_csv, as_lines, as_parquet

ROOT = Path(__file__).parents[1]
OLD, NEW, PARQUET = "b" * 40, "a" * 40, "refs/convert/parquet"
OPENWEBTEXT, PUBMED_QA = "b4325f019c648b1641a1784748667e8b74e5e064", "9001f2853fb87cab8d220904e0de81ac6973b318"

CARD = """---
configs:
{}---
# A data set
"""
CONFIG = """- config_name: {0}
  data_files:
  - split: {1}
    path: {0}/{1}-*
"""


def pairs(first: int, last: int) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "long_answer": f"a{i}", "pubid": i} for i in range(first, last)]


def pubmed_qa(count: int) -> list[dict[str, Any]]:
    context = {"contexts": ["Aims.", "Methods."], "labels": ["A", "B"], "meshes": ["Humans"]}
    return [{**row, "context": context, "final_decision": "yes"} for row in pairs(0, count)]


PUBMED_ROWS = {"artificial": 9, "labeled": 2, "unlabeled": 4}
REPOS = {
    "owner/pairs": {
        OLD: {"data/train-0.parquet": as_parquet(pairs(0, 2))},
        NEW: {
            "README.md": CARD.format(CONFIG.format("one", "train") + CONFIG.format("two", "train")).encode(),
            "one/train-00000-of-00003.parquet": as_parquet(pairs(0, 20)),
            "one/train-00001-of-00003.parquet": as_parquet(pairs(20, 45)),
            "one/train-00002-of-00003.parquet": as_parquet(pairs(45, 50)),
            "two/train-00000-of-00001.parquet": as_parquet(pairs(90, 92)),
        },
    },
    "owner/script": {
        PARQUET: {"default/train/0000.parquet": as_parquet(pairs(0, 3))},
        NEW: {"README.md": b"# Loaded by a script", "script.py": b"raise SystemExit"},
    },
    "owner/broken": {
        NEW: {"a.parquet": as_parquet(pairs(0, 3)), "b.parquet": as_parquet(pairs(3, 6))[:-50] + bytes(50)}
    },
    "Skylion007/openwebtext": {
        OPENWEBTEXT: {
            "README.md": CARD.format(CONFIG.format("plain_text", "train")).encode(),
            "plain_text/train-00000-of-00002.parquet": as_parquet([{"text": f"page {i}"} for i in range(10)]),
            "plain_text/train-00001-of-00002.parquet": as_parquet([{"text": f"page {i}"} for i in range(10, 15)]),
        }
    },
    "qiaojin/PubMedQA": {
        PUBMED_QA: {
            "README.md": CARD.format("".join(CONFIG.format(f"pqa_{name}", "train") for name in PUBMED_ROWS)).encode(),
            **{
                f"pqa_{name}/train-00000-of-00001.parquet": as_parquet(pubmed_qa(count))
                for name, count in PUBMED_ROWS.items()
            },
        }
    },
}

READ = """
import json, sys
from pipeline.config import ConfigError, Source, load
from pipeline.core.outcome import JobError
from pipeline.data.sources import check_fields, plan_source, read

def described(source):
    try:
        plan = plan_source(source)
        check_fields(source)
    except ConfigError as error:
        return {"error": str(error)}
    try:
        records = [[[r.native_id, r.fields, r.metadata, r.reason] for r in read(task, source)] for task in plan.tasks]
    except JobError as error:
        return {"job_error": str(error)}
    sizes = [task.bytes for task in plan.tasks]
    return {"tasks": records, "inputs": plan.inputs, "text_bytes": plan.text_bytes, "bytes": sizes}

for line in sys.stdin:
    asked = json.loads(line)
    found = load(asked["file"]).data.sources if "file" in asked else [Source(name="s", type="huggingface", **asked)]
    print(json.dumps([described(source) for source in found]), flush=True)
"""


class Reader:
    """A process that reads sources and describes what came."""

    def __init__(self, endpoint: str, home: Path) -> None:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command, pipes = [sys.executable, "-c", READ], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)

    def __call__(self, **asked: Any) -> list[dict[str, Any]]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


Online = tuple[Reader, list[str], Faults]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    faults: Faults = {}
    with hub(REPOS, faults) as (endpoint, requests):
        reader = Reader(endpoint, tmp_path_factory.mktemp("hub"))
        yield reader, requests, faults
        reader.process.terminate()
        reader.process.communicate()


MAPPED = {"id": "pubid", "anchor": "question", "positive": "long_answer"}
EXPECTED = [[str(i), {"anchor": f"q{i}", "positive": f"a{i}"}, {}, None] for i in range(50)]


def test_a_data_set_is_streamed_a_shard_a_task(online: Online) -> None:
    (found,) = online[0](path="owner/pairs", config="one", fields=MAPPED)
    assert found["tasks"] == [EXPECTED[:20], EXPECTED[20:45], EXPECTED[45:]]
    size = sum(len(data) for name, data in REPOS["owner/pairs"][NEW].items() if name.startswith("one/"))
    assert found["inputs"] == [[f"owner/pairs@{NEW}:one:train", size, 0]]
    assert found["text_bytes"] == 3 * size
    assert sum(found["bytes"]) == pytest.approx(size, abs=3)
    assert any("one/train-00002" in request for request in online[1])
    assert not any("two/train" in request and "GET" in request for request in online[1])


def test_a_revision_is_what_it_says(online: Online) -> None:
    (found,) = online[0](path="owner/pairs", revision=OLD, fields=MAPPED)
    assert found["tasks"] == [EXPECTED[:2]]
    assert found["inputs"][0][0] == f"owner/pairs@{OLD}::train"
    (converted,) = online[0](path="owner/script", revision=PARQUET, fields=MAPPED)
    assert converted["tasks"] == [EXPECTED[:3]]


def test_max_samples_are_the_first_in_one_task(online: Online) -> None:
    (found,) = online[0](path="owner/pairs", config="one", fields={"text": "question"}, max_samples=22)
    assert found["tasks"] == [[[f"train:{int(i >= 20)}:{i % 20}", {"text": f"q{i}"}, {}, None] for i in range(22)]]


def test_a_broken_shard_is_a_record(online: Online) -> None:
    (found,) = online[0](path="owner/broken", fields=MAPPED)
    assert [[record[3] for record in task] for task in found["tasks"]] == [[None] * 3, ["unreadable_file"]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"path": "owner/pairs", "config": "three"}, "'three' not found. Available: ['one', 'two']; give"),
    ({"path": "owner/pairs"}, "Please pick one among the available configs: ['one', 'two']; give"),
    ({"path": "owner/pairs", "config": "one", "split": "test"}, "Bad split: test. Available splits: ['train'];"),
    ({"path": "owner/pairs", "revision": "v9"}, "found no revision v9; give an existing commit, tag or branch"),
    ({"path": "owner/nothing"}, "found no such data set on the hub, or a private one without HF_TOKEN"),
    ({"path": "owner/script"}, "`revision: refs/convert/parquet`, the hub's own Parquet copy"),
    (
        {"path": "owner/pairs", "config": "one", "fields": {"text": "body"}},
        "available ones: question, long_answer,",
    ),
    ({"path": "no name"}, "data.sources s: no name: found Repo id must"),
    ({"path": "./nothing"}, "data.sources s: ./nothing: found no such folder; give"),
]


def test_what_is_not_there_is_refused(online: Online) -> None:
    for asked, message in REFUSED:
        (found,) = online[0](**{"fields": MAPPED, **asked})
        assert found["error"].startswith("data.sources s: ")
        assert message in found["error"]
        assert "\n" not in found["error"]


def test_presets_name_data_as_the_hub_has_it(online: Online) -> None:
    (pages,) = online[0](file="configs/openwebtext.yaml")
    assert [record[1] for record in pages["tasks"][0]] == [{"text": f"page {i}"} for i in range(15)]
    artificial, unlabeled = online[0](file="configs/pubmed_qa.yaml")
    assert (artificial["tasks"], unlabeled["tasks"]) == ([EXPECTED[:9]], [EXPECTED[:4]])
    contexts, _ = online[0](file="configs/pubmed_qa_contexts.yaml")
    assert contexts["tasks"][0][0] == ["0", {"text": "Aims.\n\nMethods."}, {"context.meshes": ["Humans"]}, None]


def test_a_hub_out_of_reach_is_refused(tmp_path: Path) -> None:
    reader = Reader("http://127.0.0.1:1", tmp_path)
    (found,) = reader(path="owner/pairs")
    reader.process.communicate()
    assert (
        "found the hub unreachable ([Errno 111] Connection refused); give the path of a local folder" in found["error"]
    )


def test_a_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Parquet or JSON lines, at a relative path or not; once changed, it is read afresh."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("set", "lines", "none"):
        (tmp_path / name).mkdir()
    for name, rows in (("train-0", pairs(0, 7)), ("train-1", pairs(7, 12)), ("test-0", pairs(20, 22))):
        (tmp_path / "set" / f"{name}.parquet").write_bytes(as_parquet(rows))
    source = Source(name="s", type="huggingface", path="set", fields=MAPPED)
    check_fields(source)
    plan = plan_source(source)
    assert [name for name, _, _ in plan.inputs] == ["test-0.parquet", "train-0.parquet", "train-1.parquet"]
    monkeypatch.chdir("/")
    found = [[record.native_id for record in read(task, source)] for task in plan.tasks]
    assert found == [[str(i) for i in range(7)], [str(i) for i in range(7, 12)]]
    source = source.model_copy(update={"path": str(tmp_path / "set")})
    assert [r.fields["anchor"] for r in all_records(source.model_copy(update={"split": "test"}))] == ["q20", "q21"]
    (tmp_path / "set" / "train-2.parquet").write_bytes(as_parquet(pairs(30, 33)))
    assert len(all_records(source)) == 15
    assert plan_source(source).inputs != plan.inputs
    (tmp_path / "lines" / "train.jsonl").write_bytes(as_lines(pairs(0, 5)))
    lines = source.model_copy(update={"path": str(tmp_path / "lines")})
    assert [record.native_id for record in all_records(lines)] == list("01234")
    drifted = tmp_path / "drifted"
    drifted.mkdir()
    for name, rating in (("train-a", 4), ("train-b", "unrated")):
        rows = [{**row, "rating": rating} for row in pairs(0, 5)]
        (drifted / f"{name}.parquet").write_bytes(as_parquet(rows))
    drift = source.model_copy(update={"path": str(drifted)})
    assert [(r.native_id, r.reason) for r in all_records(drift)] == [(str(i), None) for i in range(5)] * 2
    assert plan_source(drift).lost_fraction({"train-b.parquet"}) >= 0.5
    with pytest.raises(ConfigError, match=r"data.sources s: found nothing to read"):
        plan_source(source.model_copy(update={"path": str(tmp_path / "none")}))


@pytest.mark.parametrize(
    "pattern",
    ["../out/*.jsonl", "{root}/out/s.jsonl", "http://127.0.0.1:9/s.jsonl", "zip://s.jsonl::http://127.0.0.1:9/s.zip"],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_names_files_of_its_folder_only(
    pattern: str, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("out", "set"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.jsonl").write_bytes(as_lines(pairs(0, 5)))
    source = Source(name="s", type="huggingface", path=str(tmp_path / "set"), fields=MAPPED)
    fence = "---\n" if card == "README.md" else ""
    files = [{"split": "train", "path": [pattern.format(root=tmp_path)]}]
    content = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
    (tmp_path / "set" / card).write_text(f"{fence}{content}\n{fence}")
    with pytest.raises(ConfigError, match=r"data\.sources s: .*found .*(outside the data set|in its card)"):
        plan_source(source)


def test_a_link_out_of_a_folder_needs_the_sources_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    (tmp_path / "out.jsonl").write_bytes(as_lines(pairs(0, 5)))
    (tmp_path / "set" / "a.jsonl").write_bytes(as_lines(pairs(5, 7)))
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "out.jsonl")
    source = Source(name="s", type="huggingface", path=str(tmp_path / "set"), fields=MAPPED)
    with pytest.raises(ConfigError, match="outside the data set"):
        plan_source(source)
    assert len(all_records(source.model_copy(update={"follow_symlinks": True}))) == 7


def folder_of(folder: Path, card: str = "", **files: bytes) -> Source:
    folder.mkdir()
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    (folder / "README.md").write_text(card or "# A data set")
    return Source(
        name="s", type="huggingface", path=str(folder), fields={"anchor": "question", "positive": "long_answer"}
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl__gz", "csv__gz"])
def test_files_that_stand_for_gigabytes_are_rejected(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON and CSV have our readers' limits: of a line, and of what a file unpacks to."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    packed = gzip.compress if kind.endswith("gz") else bytes
    rows = [*pairs(0, 2), {"question": "q2", "long_answer": "x" * 17_000_000}, *pairs(3, 5)]
    data = as_csv(rows) if "csv" in kind else as_lines(rows)
    source = folder_of(tmp_path / "set", **{f"train__{kind}": packed(data)})
    found = all_records(source)
    assert [r.fields["anchor"] for r in found if r.reason is None] == ["q0", "q1", "q3", "q4"]
    assert [r.reason for r in found if r.reason] == ["line_too_long"]
    if kind.endswith("gz"):
        monkeypatch.setattr(hub_module, "unpacked", partial(input_files.unpacked, free_bytes=1_000_000))
        assert [r.reason for r in all_records(source)][-1] == "unpacks_too_much"


def test_options_of_a_card_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Separators, and options that only `datasets` has."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    card = CARD.format("- config_name: default\n  data_files: train.csv\n  sep: ';'\n")
    source = folder_of(tmp_path / "semicolons", card, train__csv=b"question;long_answer\nq,0;a0\n")
    assert [r.fields for r in all_records(source)] == [{"anchor": "q,0", "positive": "a0"}]
    card = CARD.format("- config_name: default\n  data_files: train.csv\n  skiprows: 1\n")
    source = folder_of(tmp_path / "skipped", card, train__csv=b"a report\nquestion,long_answer\nq0,a0\n")
    assert [r.fields for r in all_records(source)] == [{"anchor": "q0", "positive": "a0"}]


SHARD = "one/train-00001"
FAILING = [
    ([500], None),  # and 200 after it
    ([0], None),
    ([503, 0, 500], None),
    ([404] * 50, "404"),
    ([401] * 50, "401"),
]


@pytest.mark.parametrize(("due", "status"), FAILING, ids=["500", "reset", "several", "404", "401"])
def test_a_download_that_fails_is_tried_again_or_fails_the_job(
    due: list[int], status: str | None, online: Online
) -> None:
    """A failing hub loses no rows: the job goes on, or stops with advice to run it again."""
    reader, _, faults = online
    faults[SHARD] = [*due]
    (found,) = reader(path="owner/pairs", config="one", fields=MAPPED)
    if status is None:
        assert not faults[SHARD]
        assert found["tasks"] == [EXPECTED[:20], EXPECTED[20:45], EXPECTED[45:]]
    else:
        assert found["job_error"].startswith("source s: cannot fetch shard 1: ")
        assert status in found["job_error"]
        assert found["job_error"].endswith("; retry")
    faults.clear()
