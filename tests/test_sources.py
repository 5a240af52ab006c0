"""Reading sources: every record or the reason why it is none, however a source is cut into tasks."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError, Source
from pipeline.core.outcome import JobError
from pipeline.data import sources
from pipeline.data.fields import RawRecord
from pipeline.data.sources import check_fields, plan_source, read


def all_records(source: Source) -> list[RawRecord]:
    return [record for task in plan_source(source).tasks for record in read(task, source)]


def write_new(path: Path, data: bytes) -> None:
    """Write a file that may exist. Some file systems wait for the disk when a file is cut to zero and written again."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return bytes(pa.compress(data, "zstd", asbytes=True))
    return data


ROWS = [{"id": f"r{i}", "anchor": f"title {i} é", "positive": f"line one of {i}\nline two, {i}"} for i in range(40)]


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join(f'"{cell}"' for cell in row) + "\r\n" for row in cells).encode()


def as_parquet(rows: list[dict[str, Any]], row_group_size: int = 7) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file.getvalue()


def as_arrow(rows: list[dict[str, Any]], writer: Callable[..., Any]) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with writer(file, table.schema) as sink:
        sink.write_table(table, max_chunksize=7)
    return file.getvalue()


def as_feather(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


FORMATS = {
    "a.jsonl": ("json", as_lines(ROWS)),
    "lines.json": ("json", as_lines(ROWS)),
    "array.json": ("json", json.dumps(ROWS, ensure_ascii=False).encode()),
    "pretty_array.json": ("json", json.dumps(ROWS, ensure_ascii=False, indent=2).encode()),
    "pretty_objects.json": ("json", "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS).encode()),
    "a.csv": ("csv", as_csv(ROWS)),
    "a.tsv": ("csv", as_csv(ROWS, "\t")),
    "a.parquet": ("parquet", as_parquet(ROWS)),
    "a.arrow": ("arrow", as_arrow(ROWS, pa.ipc.new_file)),
    "stream.arrow": ("arrow", as_arrow(ROWS, pa.ipc.new_stream)),
    "a.feather": ("arrow", as_feather(ROWS)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records_and_refuses_a_wrong_field_map(name: str, tmp_path: Path) -> None:
    kind, data = FORMATS[name]
    for suffix in ("", ".gz", ".zst"):
        folder = tmp_path / f"plain{suffix}"
        folder.mkdir()
        (folder / f"{name}{suffix}").write_bytes(compressed(data, suffix))
        for path in (folder, folder / f"{name}{suffix}"):
            source = Source(name="s", type=kind, path=str(path))
            found = all_records(source)
            assert [record.reason for record in found] == [None] * len(ROWS)
            assert [{"id": record.native_id, **record.fields} for record in found] == ROWS
            check_fields(source)
    wrong = Source(name="s", type=kind, path=str(tmp_path), fields={"anchor": "headline", "positive": "body"})
    refusal = r"sources s: found no field 'headline', 'body' .* ones: id, anchor, positive$"
    with pytest.raises(ConfigError, match=refusal):
        check_fields(wrong)


TEXT = b"\xef\xbb\xbfFirst line\nsecond line\n\n\n  \nThird \xc3\xa9\r\n\nlast"
LINES_OF_TEXT = [("a.txt:0", "First line"), ("a.txt:14", "second line"), ("a.txt:31", "Third é"), ("a.txt:42", "last")]
BY_RECORD: dict[str, list[tuple[str, dict[str, str], int | None]]] = {
    "file": [("a.txt", {"anchor": "First line", "positive": "second line\n\n\n  \nThird é\n\nlast"}, 1)],
    "paragraph": [
        ("a.txt:0", {"text": "First line\nsecond line"}, 1),
        ("a.txt:31", {"text": "Third é"}, 6),
        ("a.txt:42", {"text": "last"}, 8),
    ],
    "line": [(position, {"text": text}, None) for position, text in LINES_OF_TEXT],
}


@pytest.mark.parametrize("record", BY_RECORD)
def test_text_is_a_record_a_file_a_paragraph_or_a_line(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix, size in (("", 100_000), (".gz", 100_000), (".zst", 100_000), *(("", size) for size in (1, 3, 10, 33))):
        (tmp_path / f"a.txt{suffix}").write_bytes(compressed(TEXT, suffix))
        source = Source(name="s", type="text", path=str(tmp_path / f"a.txt{suffix}"), record=record)
        monkeypatch.setattr(sources, "TASK_BYTES", size)
        found = [(r.native_id.replace(suffix, ""), r.fields, r.metadata.get("line")) for r in all_records(source)]
        assert found == BY_RECORD[record], (suffix, size)
        assert {raw.metadata["file"] for raw in all_records(source)} == {f"a.txt{suffix}"}


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "a.parquet", "a.csv", "array.json"])
def test_tasks_of_any_size_read_each_row_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, data = FORMATS[name]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(data)
    source = Source(name="s", type=kind, path=str(tmp_path), fields={"id": "no", "anchor": "anchor", "positive": "id"})
    whole = [record.native_id for record in all_records(source)]
    assert len(whole) == len(set(whole)) == 2 * len(ROWS)
    for size in (1, 2, 7, 50, 120, 1000, 100_000):
        monkeypatch.setattr(sources, "TASK_BYTES", size)
        plan = plan_source(source)
        assert sum(task.bytes for task in plan.tasks) == pytest.approx(sum(size for _, size, _ in plan.inputs), rel=0.6)
        assert [record.native_id for record in all_records(source)] == whole, size
        assert len(plan.tasks) >= 12 or size > 1 or name not in ("a.jsonl", "a.parquet")


def test_a_source_has_a_bounded_number_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 1)
    monkeypatch.setattr(sources, "MAX_TASKS", 10)
    for i in range(50):
        (tmp_path / f"{i:02}.jsonl").write_bytes(as_lines(ROWS[:3]))
    (tmp_path / "large.jsonl").write_bytes(as_lines(ROWS * 10))
    tasks = plan_source(Source(name="s", type="json", path=str(tmp_path))).tasks
    assert 5 <= len(tasks) <= 20
    assert sum(task.bytes for task in tasks) == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_what_identifies_the_input_does_not_depend_on_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/sub").mkdir(parents=True)
    (tmp_path / "here/sub/a.jsonl").write_bytes(as_lines(ROWS))
    (tmp_path / "here/b.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS)))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    plans = [plan_source(Source(name="s", type="json", path=str(tmp_path / name))) for name in ("here", "there")]
    assert plans[0].inputs == plans[1].inputs
    assert [name for name, _, _ in plans[0].inputs] == ["b.jsonl.gz", "sub/a.jsonl"]
    assert pickle.loads(pickle.dumps(plans[0].tasks)) == plans[0].tasks
    sizes = {name: size for name, size, _ in plans[0].inputs}
    assert plans[0].text_bytes == 4 * sizes["b.jsonl.gz"] + sizes["sub/a.jsonl"]
    by_pattern = plan_source(Source(name="s", type="json", path=str(tmp_path / "*/b.jsonl.gz")))
    assert by_pattern.inputs[0][0] == "here/b.jsonl.gz"
    monkeypatch.chdir(tmp_path / "here")
    relative = Source(name="s", type="json", path="sub/a.jsonl")
    task = plan_source(relative).tasks[0]
    monkeypatch.chdir("/")  # as it is for another process
    assert len(list(read(task, relative))) == len(ROWS)


LINES = [
    b'{"id": "a", "title": "one", "body": {"text": "first"}, "year": 1999}',
    b"{broken",
    b"",
    b'{"title": "no body"}',
    b'{"title": 7, "body": {"text": "x"}}',
    b'{"title": "bad \xff byte", "body": {"text": "x"}}',
    b"[1]",
    b'{"title": null, "body": {"text": "x"}}',
    '{"title": "ünï", "body": {"text": "last"}}'.encode(),
]
MAPPED = {"anchor": "title", "positive": "body.text"}


@pytest.fixture
def json_source(tmp_path: Path) -> Source:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES))
    return Source(name="s", type="json", path=str(tmp_path / "a.jsonl"), fields=MAPPED, metadata=["year"])


def test_json_lines_give_a_record_or_a_reason_each(json_source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ["broken_json", "missing_field", "wrong_type", "invalid_utf8", "broken_json", "null_field"]
    for size in (1, 30, 100_000):
        monkeypatch.setattr(sources, "TASK_BYTES", size)
        found = all_records(json_source)
        assert [record.reason for record in found] == [None, *reasons, None]
        assert found[0].fields == {"anchor": "one", "positive": "first"}
        assert (found[0].native_id, found[0].metadata) == ("a", {"year": 1999})
        assert found[-1].native_id == f"a.jsonl:{sum(len(line) + 1 for line in LINES[:-1])}"
        assert "no body" not in found[2].excerpt
        assert "title" in found[2].excerpt


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    line = json.dumps({"anchor": "one", "positive": "two", "score": float("nan")})
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\n{line}\n", encoding="utf-8")
    source = Source(name="s", type="json", path=str(tmp_path), metadata=["score"])
    assert [(r.reason, r.metadata) for r in all_records(source)] == [(None, {"score": None})] * 2
    (tmp_path / "a.jsonl").write_text("\ufeff")
    assert all_records(source) == []


def test_folders_and_globs_are_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.ndjson.gz", "ignored.csv", ".hidden/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        line = json.dumps({"anchor": name, "positive": name}).encode() + b"\n"
        (tmp_path / name).write_bytes(compressed(line, Path(name).suffix))
    (tmp_path / "sub/circle").symlink_to(tmp_path)
    for path, expected in (
        (tmp_path, ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.ndjson.gz"]),
        (tmp_path / "*.jsonl", ["a.jsonl", "b.jsonl"]),
        (tmp_path / "s*/*.jsonl", ["sub/c.jsonl"]),
        (tmp_path / "[ab].jsonl", ["a.jsonl", "b.jsonl"]),
    ):
        found = all_records(Source(name="s", type="json", path=str(path)))
        assert [record.fields["anchor"] for record in found] == expected


def test_a_path_that_exists_is_taken_literally(tmp_path: Path) -> None:
    for name in ("[2024]/a.jsonl", "two words/[b] ü?.jsonl", "st*r/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json.dumps({"anchor": name, "positive": name}).encode())
    for path in ("[2024]/a.jsonl", "[2024]", "[2024]/", "[2024]/*.jsonl", "two words/[b] ü?.jsonl", "st*r/?.jsonl"):
        (record,) = all_records(Source(name="s", type="json", path=f"{tmp_path}/{path}"))
        assert record.fields["anchor"].startswith(path.partition("/")[0])


def test_max_samples_takes_the_first(json_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 10)
    capped = json_source.model_copy(update={"max_samples": 3})
    assert len(plan_source(capped).tasks) == 1
    assert [r.native_id for r in all_records(capped)] == [r.native_id for r in all_records(json_source)][:3]
    (tmp_path / "a.parquet").write_bytes(FORMATS["a.parquet"][1])
    parquet = Source(name="s", type="parquet", path=str(tmp_path), max_samples=9)
    assert [r.native_id for r in all_records(parquet)] == [f"r{i}" for i in range(9)]


def test_wrong_fields_are_refused_naming_those_there(json_source: Source, tmp_path: Path) -> None:
    check_fields(json_source)
    wrong = json_source.model_copy(update={"fields": {"anchor": "title", "positive": "body.txt"}})
    with pytest.raises(ConfigError, match=r"'body\.txt' .* ones: id, title, body\.text, year$"):
        check_fields(wrong)
    (tmp_path / "a.txt").write_text("Title\nbody")
    source = Source(name="s", type="text", path=str(tmp_path), record="line", fields={"text": "text"})
    check_fields(source)
    for key in ("title", "code"):  # which a line never has
        with pytest.raises(ConfigError, match="available ones: text, file"):
            check_fields(source.model_copy(update={"fields": {"text": key}}))


def test_an_ambiguous_header_is_refused(tmp_path: Path) -> None:
    source = Source(name="s", type="csv", path=str(tmp_path))
    for table, refused in (
        ("id,id,anchor,positive\na,b,c,d\n", "'id'"),
        ("anchor,,positive\na,b,c\n", "without a name"),
    ):
        (tmp_path / "a.csv").write_text(table)
        with pytest.raises(ConfigError, match=refused):
            check_fields(source)
    (tmp_path / "a.csv").write_text(",anchor,positive\n0,a,b\n")  # a table with its index
    check_fields(source)


def test_a_path_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    nothing = r"data.sources s: found nothing to read at .*; give a file, a folder"
    for path in (tmp_path / "nothing.jsonl", tmp_path, tmp_path / "*.json", tmp_path / "no/*/[a].json"):
        with pytest.raises(ConfigError, match=nothing):
            plan_source(Source(name="s", type="json", path=str(path)))
    with pytest.raises(ConfigError, match=r"found http:// at http://x; give .* local disk, s3://, gs:// or az://"):
        plan_source(Source(name="s", type="json", path="http://x"))


def test_an_empty_source_has_no_fields_to_check(tmp_path: Path) -> None:
    for kind, name in (("json", "a.jsonl"), ("csv", "a.csv"), ("json", "b.json.gz"), ("arrow", "a.arrow")):
        (tmp_path / name).write_bytes(b"")
        source = Source(name="s", type=kind, path=str(tmp_path / name))
        assert all_records(source) == []
        assert len(plan_source(source).tasks) == 1
        check_fields(source)


def test_a_file_that_cannot_be_opened_stops_the_job(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS))
    source = Source(name="s", type="json", path=str(tmp_path))
    task = plan_source(source).tasks[0]
    os.unlink(tmp_path / "a.jsonl")
    with pytest.raises(JobError, match=r"^source s: cannot read a.jsonl: No such file or directory; run"):
        list(read(task, source))


RST = ".. SPDX-License-Identifier: GPL-2.0\n\n=====\nTitle here\n=====\n\nbody"
TEXTS = {  # name → content, title and rest
    "plain.txt": ("A title\n\nThe rest\nof it", "A title", "\nThe rest\nof it"),
    "heading.md": ("# Heading\nbody", "Heading", "body"),
    "doc.rst": (RST, "Title here", "\nbody"),
    "note.txt": ("Title: Shopping\nmilk", "Shopping", "milk"),
}


def test_text_files_are_title_and_rest(tmp_path: Path) -> None:
    for name, (content, _, _) in TEXTS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xff\x00")
    found = {r.native_id: r for r in all_records(Source(name="s", type="text", path=str(tmp_path)))}
    for name, (_, title, rest) in TEXTS.items():
        assert found[name].fields == {"anchor": title, "positive": rest}
    assert found["empty.txt"].reason == "empty"
    assert found["bytes.txt"].reason == "invalid_utf8"
    mapped = {"anchor": "title", "positive": "text"}  # `text` is the whole file
    (whole,) = all_records(Source(name="s", type="text", path=str(tmp_path / "heading.md"), fields=mapped))
    assert whole.fields == {"anchor": "Heading", "positive": "# Heading\nbody"}


def test_sections_of_texts_are_pairs(tmp_path: Path) -> None:
    """A row a section, at its heading's line; text without a heading and headings without text are counted."""
    (tmp_path / "a.md").write_text("Lost.\n\n# Owls\n\nThey hoot.\n\n## Food\n\n## Nests\n\nIn trees.\n")
    (tmp_path / "b.txt").write_text("No heading at all.\n")
    (tmp_path / "c.rst").write_bytes(b"Owls\n====\n\n\xff\n")
    (tmp_path / "d.rst").write_bytes(gzip.compress(b"Kites\n=====\n\nThey soar.\n"))
    (tmp_path / "d.rst").rename(tmp_path / "d.rst.gz")
    source = Source(name="s", type="text", path=str(tmp_path), pairs="heading")
    check_fields(source)
    found = {record.native_id: record for record in all_records(source)}
    assert {key: record.reason for key, record in found.items() if record.reason} == {
        "a.md:1": "no_heading",
        "a.md:7": "empty_section",
        "b.txt:1": "no_heading",
        "c.rst": "invalid_utf8",
    }
    assert {key: record.fields for key, record in found.items() if not record.reason} == {
        "a.md:3": {"anchor": "Owls", "positive": "They hoot."},
        "a.md:9": {"anchor": "Owls > Nests", "positive": "In trees."},
        "d.rst.gz:1": {"anchor": "Kites", "positive": "They soar."},
    }
    assert found["a.md:9"].metadata == {"file": "a.md", "line": 9}
    alone = Source(name="s", type="text", path=str(tmp_path), pairs="heading", fields={"text": "positive"})
    assert {"text": "In trees."} in [record.fields for record in all_records(alone)]


def test_neighbouring_paragraphs_are_pairs(tmp_path: Path) -> None:
    """Each paragraph that is long enough is the positive of one row, against a split at blank lines."""
    chance = random.Random(0)
    expected: list[tuple[str, dict[str, str]]] = []
    short = alone = 0
    for number in range(20):
        texts = [" ".join(["word"] * chance.choice([3, 9, 10, 11, 30])) + f" {i}" for i in range(chance.randrange(7))]
        (tmp_path / f"{number:02}.txt").write_text("\n\n".join(texts) + "\n")
        long = [text for text in texts if len(text) >= 50]
        short += len(texts) - len(long)
        alone += len(long) == 1
        for i, text in enumerate(long if len(long) > 1 else []):
            expected.append((f"{number:02}.txt", {"anchor": long[i - 1] if i else long[1], "positive": text}))
    source = Source(name="s", type="text", path=str(tmp_path), pairs="neighbours")
    check_fields(source)
    records = all_records(source)
    kept = [record for record in records if record.reason is None]

    def key(pair: tuple[str, dict[str, str]]) -> str:
        return f"{pair[0]} {pair[1]['positive']}"

    made = [(str(record.metadata["file"]), record.fields) for record in kept]
    assert sorted(made, key=key) == sorted(expected, key=key)  # type: ignore[arg-type]
    reasons = Counter(record.reason for record in records if record.reason)
    assert reasons == {"short_paragraph": short, "no_neighbour": alone}
    for record in kept:
        name, _, offset = record.native_id.rpartition(":")
        content = (tmp_path / name).read_text()
        assert content[int(offset) :].startswith(str(record.fields["positive"]))
        assert content.split("\n")[int(record.metadata["line"]) - 1] == record.fields["positive"]


def test_python_packages_are_parsed_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pkg").mkdir()
    planted = tmp_path / "planted"
    code = f'open({str(planted)!r}, "w")\ndef f(x):\n    """Add one."""\n    return x + 1\n'
    (tmp_path / "pkg" / "good.py").write_text(code)
    (tmp_path / "pkg" / "bad.py").write_text("def f(:\n")
    every_line_end = b'def f(x):\r    """Add one."""\r    return x + 1\r\n\r\ndef g():\n    "Two."\n    return 2\n'
    (tmp_path / "ends.py").write_bytes(every_line_end)
    found = {r.native_id: r for r in all_records(Source(name="p", type="python_packages", path=str(tmp_path)))}
    assert found["pkg/bad.py"].reason == "broken_python"
    record = found["pkg/good.py:2:f"]
    assert record.fields == {"anchor": "Add one.", "positive": "def f(x):\n    return x + 1"}
    assert record.metadata == {"file": "pkg/good.py", "line": 2, "name": "f"}
    assert not planted.exists()
    ends = [r.fields["positive"] for name, r in found.items() if name.startswith("ends.py")]
    assert ends == ["def f(x):\n    return x + 1", "def g():\n    return 2"]
    monkeypatch.setattr(sysconfig, "get_path", {"purelib": str(tmp_path)}.get)
    installed = all_records(Source(name="p", type="python_packages"))  # without a path
    assert {r.native_id: r for r in installed} == found


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*.jsonl"])
def test_links_out_of_a_folder_are_skipped_and_counted(
    pattern: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("in/a.jsonl", "in/sub/b.jsonl", "out/secret.jsonl", "out/other.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "in" / "inside.jsonl").symlink_to("sub/b.jsonl")
    (tmp_path / "in" / "link.jsonl").symlink_to(tmp_path / "out" / "secret.jsonl")
    (tmp_path / "in" / "up.jsonl").symlink_to("../out/other.jsonl")
    (tmp_path / "way").symlink_to("in")  # the path itself may be a link
    source = Source(name="s", type="json", path=f"{tmp_path}/way{pattern}", fields={"text": "text"})

    def texts(of: Source) -> set[str]:
        return {str(record.fields["text"]) for record in all_records(of)}

    assert not any("out" in text for text in texts(source))
    assert {"in/a.jsonl", "in/sub/b.jsonl"} >= texts(source) >= {"in/a.jsonl"}
    assert "source s: skipped 2 files that links lead to outside of" in caplog.text
    assert {"out/secret.jsonl", "out/other.jsonl"} <= texts(source.model_copy(update={"follow_symlinks": True}))


def test_a_folder_that_a_glob_reaches_by_a_link_is_skipped(tmp_path: Path) -> None:
    for name in ("in/a/a.jsonl", "out/secret.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "in" / "b").symlink_to(tmp_path / "out")
    source = Source(name="s", type="json", path=f"{tmp_path}/in/*/*.jsonl", fields={"text": "text"})
    assert [name for name, _, _ in plan_source(source).inputs] == ["a/a.jsonl"]


def test_a_path_that_is_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "in" / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    source = Source(name="s", type="json", path=str(tmp_path / "in" / "link.jsonl"), fields={"text": "text"})
    assert len(all_records(source)) == 1
