"""Reading sources: every record or the reason why it is none, however a file is cut into tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Source
from pipeline.data import sources
from pipeline.data.sources import check_fields, plan_source, read


def all_records(source: Source) -> list[sources.RawRecord]:
    return [record for task in plan_source(source).tasks for record in read(task, source)]


LINES = [
    b'{"id": "a", "title": "one", "body": {"text": "first"}, "year": 1999}',
    b"{broken",
    b"",
    b'{"title": "no body"}',
    b'{"title": 7, "body": {"text": "x"}}',
    b'{"title": "bad \xff byte", "body": {"text": "x"}}',
    b"[1]",
    '{"title": "ünï", "body": {"text": "last"}}'.encode(),
]
MAPPED = {"anchor": "title", "positive": "body.text"}


@pytest.fixture
def json_source(tmp_path: Path) -> Source:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES))
    return Source(name="s", type="json", path=str(tmp_path / "a.jsonl"), fields=MAPPED, metadata=["year"])


def test_json_lines_give_a_record_or_a_reason_each(json_source: Source) -> None:
    found = all_records(json_source)
    assert [record.reason for record in found] == [
        None, "broken_json", "missing_field", "wrong_type", "invalid_utf8", "broken_json", None,
    ]  # fmt: skip
    assert found[0].fields == {"anchor": "one", "positive": "first"}
    assert (found[0].native_id, found[0].metadata) == ("a", {"year": 1999})
    assert found[-1].native_id == f"a.jsonl:{sum(len(line) + 1 for line in LINES[:-1])}"
    assert "no body" not in found[2].excerpt
    assert "title" in found[2].excerpt


@pytest.mark.parametrize("size", [1, 2, 7, 50, 120, 1000])
def test_tasks_of_any_size_read_each_line_once(size: int, json_source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [record.native_id for record in all_records(json_source)]
    monkeypatch.setattr(sources, "TASK_BYTES", size)
    assert len(plan_source(json_source).tasks) >= 1
    assert [record.native_id for record in all_records(json_source)] == whole


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    line = json.dumps({"anchor": "one", "positive": "two", "score": float("nan")})
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\n{line}\n", encoding="utf-8")
    source = Source(name="s", type="json", path=str(tmp_path), metadata=["score"])
    assert [(r.reason, r.metadata) for r in all_records(source)] == [(None, {"score": None})] * 2


def test_line_ends_of_every_kind_in_python(tmp_path: Path) -> None:
    code = 'def f(x):\r    """Add one."""\r    return x + 1\r\n\r\ndef g():\n    "Two."\n    return 2\n'
    (tmp_path / "a.py").write_bytes(code.encode())
    found = all_records(Source(name="p", type="python_packages", path=str(tmp_path)))
    assert [r.fields["positive"] for r in found] == ["def f(x):\n    return x + 1", "def g():\n    return 2"]


def test_a_wrong_field_map_is_refused_naming_the_fields_there(json_source: Source) -> None:
    wrong = json_source.model_copy(update={"fields": {"anchor": "headline", "positive": "body.text"}})
    with pytest.raises(ConfigError, match=r"'headline'; it has id, title, body, year"):
        check_fields(wrong)
    check_fields(json_source)


def test_a_path_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.jsonl", tmp_path, tmp_path / "*.json"):
        with pytest.raises(ConfigError, match="found nothing to read"):
            plan_source(Source(name="s", type="json", path=str(path)))


def test_folders_and_globs_are_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "ignored.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"anchor": name, "positive": name}) + "\n")
    for path, expected in (
        (tmp_path, ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        (tmp_path / "*.jsonl", ["a.jsonl", "b.jsonl"]),
    ):
        found = all_records(Source(name="s", type="json", path=str(path)))
        assert [record.fields["anchor"] for record in found] == expected


def test_max_samples_takes_the_first(json_source: Source) -> None:
    capped = json_source.model_copy(update={"max_samples": 3})
    assert [r.native_id for r in all_records(capped)] == [r.native_id for r in all_records(json_source)][:3]


TEXTS = {
    "plain.txt": ("A title\n\nThe rest\nof it", "A title", "\nThe rest\nof it"),
    "heading.md": ("# Heading\nbody", "Heading", "body"),
    "doc.rst": (
        ".. SPDX-License-Identifier: GPL-2.0\n\n=====\nTitle here\n=====\n\nbody",
        "Title here",
        "=====\n\nbody",
    ),
    "note.txt": ("Title: Shopping\nmilk", "Shopping", "milk"),
}


def test_text_files_are_title_and_rest(tmp_path: Path) -> None:
    for name, (content, _, _) in TEXTS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    found = {r.native_id: r for r in all_records(Source(name="s", type="text", path=str(tmp_path)))}
    for name, (_, title, rest) in TEXTS.items():
        assert found[name].fields == {"anchor": title, "positive": rest}
    assert found["empty.txt"].reason == "empty"
    assert found["bytes.txt"].reason == "invalid_utf8"


def test_python_packages_are_parsed_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    planted = tmp_path / "planted"
    code = f'open({str(planted)!r}, "w")\ndef f(x):\n    """Add one."""\n    return x + 1\n'
    (tmp_path / "pkg" / "good.py").write_text(code)
    (tmp_path / "pkg" / "bad.py").write_text("def f(:\n")
    found = {r.native_id: r for r in all_records(Source(name="p", type="python_packages", path=str(tmp_path)))}
    assert found["pkg/bad.py"].reason == "broken_python"
    record = found["pkg/good.py:2:f"]
    assert record.fields == {"anchor": "Add one.", "positive": "def f(x):\n    return x + 1"}
    assert record.metadata == {"file": "pkg/good.py", "line": 2, "name": "f"}
    assert not planted.exists()


def test_installed_packages_are_found_without_a_path() -> None:
    source = Source(name="p", type="python_packages", max_samples=50)
    assert len([r for r in all_records(source) if r.reason is None]) == 50
