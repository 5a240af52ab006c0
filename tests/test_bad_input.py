"""Bad input is data: what cannot be read is counted with a reason, what can be read beside it is read."""

from __future__ import annotations

import csv
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
from pipeline.data.sources import plan_source
from tests.test_sources import FORMATS, ROWS, all_records, as_arrow, as_csv, as_lines, as_parquet, compressed

OUTCOMES = dict[str | None, int]


def outcomes(kind: str, path: Path, **settings: Any) -> OUTCOMES:
    records = all_records(Source(name="s", type=kind, path=str(path), **settings))
    return dict(Counter(record.reason for record in records))


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lines of more than 1,000 bytes are too long."""
    for module in (input_files, read_json, read_text):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(read_text, "MAX_PYTHON_BYTES", 1000)
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
    ("a.csv", "csv", {}, "unreadable_file", "line_too_long"),
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
    assert outcomes("json", tmp_path) == {None: 3, "line_too_long": 1, "unreadable_file": 1}
    (tmp_path / "a.json").write_text(json.dumps([*ROWS[:3], long, *ROWS[:3]], indent=1))
    assert outcomes("json", tmp_path) == {None: 6, "line_too_long": 1}


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
    utf16.mkdir()  # without a mark
    for kind, name, data in (("json", "a.jsonl", as_lines(ROWS)), ("csv", "b.csv", as_csv(ROWS))):
        (utf16 / name).write_bytes(data.decode().encode("utf-16-le"))
        found = outcomes(kind, utf16)
        assert found
        assert set(found) <= {"invalid_utf8", f"broken_{kind}", "unreadable_file"}


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


WORDS = ["amber", "basil", "cedar", "dune", "ember", "fjord"]


def table_of(separator: str, quoted: dict[int, str], rows: int = 200) -> str:
    """A table of three columns; `quoted` replaces the last cell of some rows."""
    cells = [["key", "anchor", "positive"]]
    cells += [[f"k{i}", WORDS[i % 6], quoted.get(i, f"{WORDS[i % 5]} {i}")] for i in range(rows)]
    return "".join(separator.join(row) + "\n" for row in cells)


OPEN_QUOTES: list[dict[int, str]] = [
    {30: '"never closed'},
    {30: '"opened', 170: '"and again'},
    {30: '"opened', 170: 'closed"'},
    {30: '"opened', 31: 'closed"'},
    {199: '"on the last row'},
    dict.fromkeys(range(200), '"on every row'),
]


@pytest.mark.parametrize("quoted", OPEN_QUOTES)
def test_between_tabs_an_open_quote_is_a_character(quoted: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(table_of("\t", quoted))
    found = all_records(Source(name="s", type="csv", path=str(tmp_path)))
    expected = [line.split("\t")[1:] for line in table_of("\t", quoted).splitlines()[1:]]
    assert [[*record.fields.values()] for record in found] == expected


@pytest.mark.parametrize("quoted", [*OPEN_QUOTES[:3], *OPEN_QUOTES[4:]])
def test_between_commas_an_open_quote_costs_its_own_row(quoted: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table_of(",", quoted))
    found = all_records(Source(name="s", type="csv", path=str(tmp_path)))
    assert len(found) == 200
    damaged = {f"a.csv:{i + 2}" for i, cell in quoted.items() if cell.startswith('"')}
    assert {record.native_id for record in found if record.reason == "broken_csv"} == damaged
    assert {record.reason for record in found} <= {None, "broken_csv"}


def test_quoted_cells_with_lines_and_delimiters_are_whole(tmp_path: Path) -> None:
    """As RFC 4180 says, also for a cell that holds a table of other width, and a quote that takes cells along."""
    inner = "".join(f"{word},{i}\n" for i, word in enumerate(WORDS * 5))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["key", "anchor", "positive"], *([i, 'say ""hi""', inner] for i in range(5))])
    found = all_records(Source(name="s", type="csv", path=str(tmp_path)))
    assert [record.fields["positive"] for record in found] == [inner] * 5
    (tmp_path / "a.csv").write_text('key,anchor,positive\n1,"open,x\n2,a,b\n3,"c",d\n4,e,f\n')
    assert outcomes("csv", tmp_path) == {None: 3, "broken_csv": 1}


def test_a_header_with_an_open_quote_and_quotes_that_match_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text('key,"anchor,positive\n' + "a,b,c\n" * 50)
    (found,) = all_records(Source(name="s", type="csv", path=str(tmp_path)))
    assert (found.native_id, found.reason) == ("a.csv", "unreadable_file")
    assert found.excerpt.startswith("line 1: ")
    monkeypatch.setattr(read_tables, "MAX_LINES_AGAIN", 100)
    (tmp_path / "a.csv").write_text("anchor,positive\n" + 'a","b\n' * 2_000)  # each line closes a quote and opens one
    found = outcomes("csv", tmp_path)
    assert found["unreadable_file"] == 1
    assert found["broken_csv"] < 10


def test_a_row_of_many_cells_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_tables, "MAX_LINE_BYTES", 500)
    row = "some words,some more words\n"
    (tmp_path / "a.csv").write_text(f'anchor,positive\n{row}"never closed,x\n{row * 1000}')
    assert outcomes("csv", tmp_path) == {None: 1001, "broken_csv": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {name: FORMATS[name] for name in ("a.jsonl", "array.json", "pretty_objects.json", "a.csv", "a.tsv")}
    for name, (kind, data) in text.items():
        for suffix, task_bytes in (("", 4 << 20), ("", 100), (".gz", 4 << 20), (".zst", 4 << 20)):
            monkeypatch.setattr(sources, "TASK_BYTES", task_bytes)
            (tmp_path / f"{name}{suffix}").write_bytes(compressed(data.decode().encode(encoding), suffix))
            found = all_records(Source(name="s", type=kind, path=str(tmp_path / f"{name}{suffix}")))
            assert [{"id": record.native_id, **record.fields} for record in found] == ROWS, (name, suffix)
    lines = "Erste Zeile\nzweite Zeile 🦊\n" * 100
    (tmp_path / "a.txt").write_bytes(lines.encode(encoding))
    for record, expected in (("line", lines.splitlines()), ("paragraph", [lines.rstrip("\n")])):
        found = all_records(Source(name="s", type="text", path=str(tmp_path / "a.txt"), record=record))
        assert [each.fields["text"] for each in found] == expected
    wide = '{"anchor": "x", "positive": "y"}\n'.encode("utf-16-le")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe" + wide + b"\x00\xd8" + wide + wide[:-1])  # an unpaired surrogate
    assert outcomes("json", tmp_path / "a.jsonl") == {None: 1, "invalid_utf8": 1, "unreadable_file": 1}


def test_the_loss_behind_a_cut_is_estimated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS))[:50])
    (tmp_path / "c.jsonl").write_bytes(as_lines(ROWS * 100))
    plan = plan_source(Source(name="s", type="json", path=str(tmp_path)))
    assert plan.lost_fraction([]) == 0
    assert plan.lost_fraction({"b.jsonl.gz"}) == 1 / 3  # a file like the others
    assert 0.9 < plan.lost_fraction({"c.jsonl"}) < 1  # nearly all bytes
    assert plan.lost_fraction(plan.sizes) == 1


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


BROKEN = '{"anchor": "a "quoted" word", "positive": "b"}'
ONE, PRETTY = '{"anchor": "a", "positive": "b"}', '{\n  "anchor": "a",\n  "positive": "b"\n'
ONE_VALUE: dict[str, OUTCOMES] = {
    f'[{ONE}, {{"anchor": "a"': {None: 1, "broken_json": 1, "unreadable_file": 1},
    f'[\n{ONE},\n{{"anchor": "a"': {None: 1, "broken_json": 1, "unreadable_file": 1},
    f"[{ONE}, {ONE}": {None: 2, "unreadable_file": 1},
    f"[{ONE}, 7, [], {ONE}]": {None: 2, "broken_json": 2},
    f"[{ONE}] trailing": {None: 1, "unreadable_file": 1},
    f"[{ONE}]\n[{ONE}, {ONE}]\n": {None: 3},
    f"{ONE}{ONE} {ONE}\n{ONE}": {None: 4},
    f"[{ONE}, {BROKEN}, {ONE}]": {None: 1, "broken_json": 1, "unreadable_file": 1},
    f"[\n{ONE},\n{BROKEN},\n{ONE}\n]": {None: 2, "broken_json": 1},
    f"[\r\n  {ONE},\r\n  {BROKEN}\r\n]": {None: 1, "broken_json": 1},
    f"[\n{BROKEN},\n{ONE}\n, {ONE}]": {None: 2, "broken_json": 1},
    f'[\n  {{\n    "anchor": [\n      {ONE},\n      x\n    ]\n  }},\n  {ONE}\n]': {None: 1, "broken_json": 1},
    f"{PRETTY}}}\n{BROKEN}\n{PRETTY}}}": {None: 2, "broken_json": 1},
    "[]": {},
    PRETTY: {"broken_json": 1},
    PRETTY + "}": {None: 1},
    ONE: {None: 1},
    "[" * 100_000: {"broken_json": 1, "unreadable_file": 1},
    "   \n": {},
}


def test_json_files_that_hold_one_value_and_lines_too_deep_to_parse(tmp_path: Path) -> None:
    for data, expected in ONE_VALUE.items():
        for mark in ("", "\ufeff"):
            (tmp_path / "a.json").write_text(mark + data)
            assert outcomes("json", tmp_path) == expected, data[:100]
    (tmp_path / "a.jsonl").write_text('{"a":' * 100_000 + "\n" + '{"anchor": ' + "1" * 10_000 + "}\n")
    assert outcomes("json", tmp_path / "a.jsonl") == {"broken_json": 2}
