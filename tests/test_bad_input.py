"""Bad input is data: what cannot be read is counted with a reason, what can be read beside it is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Source
from pipeline.data import input_files, read_json, read_tables, read_text, sources
from pipeline.data.fields import RAW_EXCERPT_CHARS
from tests.test_sources import ROWS, all_records, as_arrow, as_csv, as_lines, as_parquet, compressed

OUTCOMES = dict[str | None, int]


def outcomes(kind: str, path: Path, **settings: Any) -> OUTCOMES:
    records = all_records(Source(name="s", type=kind, path=str(path), **settings))
    return dict(Counter(record.reason for record in records))


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lines of more than 1,000 bytes are too long."""
    for module in (input_files, read_json, read_text):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    return 1000


@pytest.fixture(scope="module")
def many() -> list[dict[str, str]]:
    """Rows that compress badly, so that a cut through the bytes is one through the rows."""
    digests = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(20_000)]
    return [{"id": f"r{i}", "anchor": f"{i * i}", "positive": digest} for i, digest in enumerate(digests)]


@pytest.mark.parametrize(
    ("kind", "name", "encode"),
    [
        ("json", "a.jsonl", as_lines),
        ("json", "a.json", lambda rows: json.dumps(rows).encode()),
        ("csv", "a.csv", as_csv),
        ("text", "a.txt", as_lines),
        ("arrow", "a.arrow", lambda rows: as_arrow(rows, pa.ipc.new_stream)),
    ],
)
def test_a_truncated_file_gives_what_lies_before_the_cut(
    kind: str, name: str, encode: Callable[[Any], bytes], many: list[dict[str, str]], tmp_path: Path
) -> None:
    plain, settings = encode(many), {"record": "line"} if kind == "text" else {}
    for suffix in (".gz", ".zst"):
        data, file = compressed(plain, suffix), tmp_path / f"{name}{suffix}"
        file.write_bytes(data[: len(data) * 2 // 3])
        found = all_records(Source(name="s", type=kind, path=str(file), **settings))
        assert 0.6 * len(many) < len(found) < 0.7 * len(many)
        assert {record.reason for record in found[:-1]} == {None}
        assert found[-1].reason == "unreadable_file"
        assert "ended before" in found[-1].excerpt or "Truncated" in found[-1].excerpt


def test_gzip_loses_nothing_before_the_cut(tmp_path: Path) -> None:
    data = gzip.compress(as_lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-4])  # of the checksum
    assert outcomes("json", tmp_path) == {None: len(ROWS), "unreadable_file": 1}


ZEROS: list[tuple[str, str, dict[str, str], str | None, str | None]] = [
    # file, type and settings; the reason of 100,000 zeros, and the one where a line of so many is too long
    ("a.jsonl", "json", {}, "broken_json", "line_too_long"),
    ("a.json", "json", {}, "broken_json", None),
    ("a.csv", "csv", {}, "broken_csv", "line_too_long"),
    ("a.parquet", "parquet", {}, "unreadable_file", None),
    ("a.arrow", "arrow", {}, "unreadable_file", None),
    ("a.jsonl.gz", "json", {}, "unreadable_file", None),
    ("a.csv.zst", "csv", {}, "unreadable_file", None),
    ("a.txt", "text", {"record": "line"}, None, "line_too_long"),  # characters that the rules over text refuse
    ("b.txt", "text", {"record": "paragraph"}, None, "paragraph_too_long"),
    ("c.txt", "text", {}, None, "file_too_long"),
    ("a.py", "python_packages", {}, "broken_python", "file_too_long"),
]


def test_a_file_of_zeros_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, *_ in ZEROS:
        (tmp_path / name).write_bytes(bytes(100_000))
    for task_bytes in (4 << 20, 1000):
        monkeypatch.setattr(sources, "TASK_BYTES", task_bytes)
        for name, kind, settings, reason, _ in ZEROS:
            assert outcomes(kind, tmp_path / name, **settings) == {reason: 1}, (name, task_bytes)


def test_a_file_of_zeros_longer_than_a_line_may_be(short_lines: int, tmp_path: Path) -> None:
    for name, kind, settings, _, reason in ZEROS:
        if reason:
            (tmp_path / name).write_bytes(bytes(100_000))
            assert outcomes(kind, tmp_path / name, **settings) == {reason: 1}, name


def test_a_line_that_is_too_long_is_passed_over(
    short_lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = json.dumps({"anchor": "x" * 5_000, "positive": "y"}).encode() + b"\n"
    good = as_lines(ROWS[:3])
    for suffix, task_bytes in itertools.product(("", ".gz"), (4 << 20, 700)):
        monkeypatch.setattr(sources, "TASK_BYTES", task_bytes)
        file = tmp_path / f"a.jsonl{suffix}"
        file.write_bytes(compressed(good + long + good + long[:-1], suffix))
        found = all_records(Source(name="s", type="json", path=str(file)))
        assert [record.reason for record in found] == ([None] * 3 + ["line_too_long"]) * 2
        assert all(len(record.excerpt) <= RAW_EXCERPT_CHARS for record in found)


def test_lines_and_paragraphs_of_text_that_are_too_long(short_lines: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n" + b"x" * 3_000 + b"\n\n" + b"short\n" * 500 + b"\nlast\n")
    assert outcomes("text", tmp_path, record="line") == {None: 502, "line_too_long": 1}
    assert outcomes("text", tmp_path, record="paragraph") == {None: 1, "paragraph_too_long": 2}
    assert outcomes("text", tmp_path) == {"file_too_long": 1}


def test_a_long_row_of_csv_and_a_long_value_of_an_array(
    short_lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_json, "BUFFER_BYTES", 100)
    long = {"id": "x", "anchor": "x" * 100_000, "positive": "y"}
    (tmp_path / "a.csv").write_bytes(as_csv([*ROWS[:3], long, *ROWS[:3]]))
    assert outcomes("csv", tmp_path)["line_too_long"] == 1
    (tmp_path / "a.json").write_text(json.dumps([*ROWS[:3], long, *ROWS[:3]]))
    assert outcomes("json", tmp_path) == {None: 3, "line_too_long": 1}


def read_apart(kind: str, path: Path) -> tuple[OUTCOMES, int]:
    """The outcomes, and the KiB by which the peak memory of a process grew that did nothing but read.

    The kernel's VmHWM is of that process alone: ru_maxrss starts at what its parent held.
    """
    code = f"""
import json
from collections import Counter
from pipeline.config import Source
from pipeline.data import input_files, read_json
from pipeline.data.sources import plan_source, read

def peak_kb():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

read_json.MAX_LINE_BYTES = input_files.MAX_LINE_BYTES = 16 << 20
source = Source(name="s", type={kind!r}, path={str(path)!r})
before = peak_kb()
reasons = Counter(record.reason for task in plan_source(source).tasks for record in read(task, source))
print(json.dumps([list(reasons.items()), peak_kb() - before]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reasons, grown_kb = json.loads(result.stdout)
    return dict(reasons), grown_kb


def test_a_line_of_100_mb_is_not_held(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(as_lines(ROWS[:1]) + b'{"anchor": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + as_lines(ROWS[1:]))
    reasons, grown_kb = read_apart("json", tmp_path)
    assert reasons == {None: len(ROWS), "line_too_long": 1}
    assert grown_kb < 45_000  # MAX_LINE_BYTES, twice while it is put together, and change


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    texts = [f"{i} " + "words " * 200 for i in range(50_000)]
    table = pa.table({"anchor": texts, "positive": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1 << 20, compression="none", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size > 100_000_000
    reasons, grown_kb = read_apart("parquet", tmp_path)
    assert reasons == {None: len(texts)}
    assert grown_kb < 60_000


def test_wrong_encodings(tmp_path: Path) -> None:
    latin, utf16 = tmp_path / "latin", tmp_path / "utf16"
    latin.mkdir()
    (latin / "a.jsonl").write_bytes('{"anchor": "caf\xe9", "positive": "x"}\n'.encode("latin-1") * 3 + as_lines(ROWS))
    assert outcomes("json", latin) == {None: len(ROWS), "invalid_utf8": 3}
    (latin / "b.csv").write_bytes(as_csv(ROWS) + "x,caf\xe9,z\r\n".encode("latin-1"))
    assert outcomes("csv", latin) == {None: len(ROWS), "invalid_utf8": 1}
    (latin / "c.txt").write_bytes("caf\xe9\n\nall right".encode("latin-1"))
    assert outcomes("text", latin, record="paragraph") == {None: 1, "invalid_utf8": 1}
    assert outcomes("text", latin) == {"invalid_utf8": 1}
    utf16.mkdir()
    for kind, name, data in (("json", "a.jsonl", as_lines(ROWS)), ("csv", "b.csv", as_csv(ROWS))):
        (utf16 / name).write_bytes(data.decode().encode("utf-16"))
        found = outcomes(kind, utf16)
        assert found
        assert set(found) <= {"invalid_utf8", f"broken_{kind}"}


def test_csv_rows_with_too_many_or_too_few_cells_and_a_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('anchor,positive\na,b\na\na,b,c\n\n"a\n1",b\n"a"x,b\na,b\n')
    found = all_records(Source(name="s", type="csv", path=str(tmp_path)))
    reasons = [None, "wrong_cell_count", "wrong_cell_count", None, "broken_csv", None]
    assert [record.reason for record in found] == reasons
    assert [record.native_id for record in found] == [f"a.csv:{line}" for line in (2, 3, 4, 6, 8, 9)]
    assert found[1].excerpt == "1 cells for 2 columns: a"
    assert found[3].fields["anchor"] == "a\n1"
    (tmp_path / "a.csv").write_text("anchor;positive\na;b\n")
    assert outcomes("csv", tmp_path, delimiter=";") == {None: 1}


def test_a_quote_that_is_never_closed_takes_a_bounded_part_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_tables, "MAX_CELL_CHARS", 500)
    row = "some words,some more words\n"
    (tmp_path / "a.csv").write_text(f'anchor,positive\n{row}"never closed,x\n{row * 1000}')
    found = outcomes("csv", tmp_path)
    assert found["broken_csv"] == 1
    assert found[None] >= 980
    (tmp_path / "a.csv").write_text(f'anchor,positive\n{row}a,"never closed\n')
    assert outcomes("csv", tmp_path) == {None: 1, "broken_csv": 1}


def test_a_parquet_file_that_cannot_be_opened_is_one_record(tmp_path: Path) -> None:
    whole = as_parquet(ROWS)
    (tmp_path / "a.parquet").write_bytes(whole)
    for data in (b"", whole[:-200], whole[:300], b"PAR1" * 10, bytes(1000)):
        (tmp_path / "b.parquet").write_bytes(data)
        assert outcomes("parquet", tmp_path) == {None: len(ROWS), "unreadable_file": 1}
        assert outcomes("parquet", tmp_path / "b.parquet") == {"unreadable_file": 1}


def test_each_row_of_a_broken_row_group_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(as_parquet(ROWS, row_group_size=15))
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(2)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xa5" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(data)
    source = Source(name="s", type="parquet", path=str(tmp_path), fields={"id": "no", "text": "positive"})
    for task_bytes in (4 << 20, 1):
        monkeypatch.setattr(sources, "TASK_BYTES", task_bytes)
        found = all_records(source)
        assert [record.reason for record in found] == [None] * 15 + ["unreadable_row_group"] * 15 + [None] * 10
        assert [record.native_id for record in found] == [f"a.parquet:{i}" for i in range(40)]


def test_an_arrow_file_that_is_cut_gives_what_lies_before_the_cut(tmp_path: Path) -> None:
    for cut in (-200, -1, 1500, 9, 3):
        (tmp_path / "a.arrow").write_bytes(as_arrow(ROWS, pa.ipc.new_file)[:cut])
        found = outcomes("arrow", tmp_path)
        assert found["unreadable_file"] == 1
        assert set(found) <= {None, "unreadable_file"}
        assert cut > 0 or found[None] == len(ROWS)


def test_values_that_are_no_text(tmp_path: Path) -> None:
    undecodable = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"\xff\xfe", b"fine"]).buffers())
    bytes_ = pa.array([b"bytes \xc3\xa9", b"x", b"\xff"], pa.binary())
    table = pa.table({"anchor": undecodable, "positive": bytes_, "number": [1.5, 2.5, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = all_records(Source(name="s", type="parquet", path=str(tmp_path)))
    assert [record.reason for record in found] == [None, "invalid_utf8", "invalid_utf8"]
    assert found[0].fields == {"anchor": "fine", "positive": "bytes é"}
    assert outcomes("parquet", tmp_path, fields={"text": "number"}) == {"wrong_type": 2, "null_field": 1}
    mixed: list[tuple[Any, str | None]] = [
        ("x", None), (1, "wrong_type"), (True, "wrong_type"), (None, "null_field"), ({"a": "b"}, "wrong_type"),
        (["x", "y"], None), (["x", 2], "wrong_type"), ([None], "null_field"),
    ]  # fmt: skip
    rows = [{"anchor": "a", "positive": value} for value, _ in mixed]
    (tmp_path / "a.jsonl").write_bytes(as_lines([*rows, {"anchor": "a"}]))
    found = all_records(Source(name="s", type="json", path=str(tmp_path)))
    assert [record.reason for record in found] == [*(reason for _, reason in mixed), "missing_field"]
    assert found[5].fields["positive"] == "x\n\ny"
    assert found[8].excerpt == "no field 'positive'; the row has anchor"


def test_lone_surrogates_are_json_and_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"anchor": "\\ud800 x", "positive": "\\ud83d\\ude00"}\n')
    (found,) = all_records(Source(name="s", type="json", path=str(tmp_path)))
    assert found.fields == {"anchor": "\ud800 x", "positive": "\U0001f600"}


ONE, PRETTY = '{"anchor": "a", "positive": "b"}', '{\n  "anchor": "a",\n  "positive": "b"\n'
ONE_VALUE: dict[str, OUTCOMES] = {
    f'[{ONE}, {{"anchor": "a"': {None: 1, "broken_json": 1},
    f"[{ONE}, 7, [], {ONE}]": {None: 2, "broken_json": 2},
    f"[{ONE}] trailing": {None: 1, "broken_json": 1},
    "[]": {},
    PRETTY: {"broken_json": 1},
    PRETTY + "}": {None: 1},
    ONE: {None: 1},
    "[" * 100_000: {"broken_json": 1},
    "   \n": {},
}


def test_json_files_that_hold_one_value_and_lines_too_deep_to_parse(tmp_path: Path) -> None:
    for data, expected in ONE_VALUE.items():
        for mark in ("", "\ufeff"):
            (tmp_path / "a.json").write_text(mark + data)
            assert outcomes("json", tmp_path) == expected, data[:100]
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n" + '{"anchor": ' + "1" * 10_000 + "}\n")
    assert outcomes("json", tmp_path / "a.jsonl") == {"broken_json": 2}
