"""Properties of the readers: any bytes give records or reasons, and what was written is read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Source
from pipeline.data.fields import RawRecord
from pipeline.data.titles import read_note
from tests.test_sources import ROWS, all_records, as_arrow, as_csv, as_lines, as_parquet, compressed

SAMPLES = {  # kind of file → settings of its source, and a valid file
    "a.jsonl": ({"type": "json"}, as_lines(ROWS[:5])),
    "a.json": ({"type": "json"}, json.dumps(ROWS[:5], indent=1).encode()),
    "a.csv": ({"type": "csv"}, as_csv(ROWS[:5])),
    "a.tsv": ({"type": "csv"}, as_csv(ROWS[:5], "\t")),
    "a.txt": ({"type": "text", "record": "paragraph"}, as_lines(ROWS[:5])),
    "a.md": ({"type": "text"}, b"---\ntitle: x\n---\n# Heading\nbody\n"),
    "a.parquet": ({"type": "parquet"}, as_parquet(ROWS[:5], 2)),
    "a.arrow": ({"type": "arrow"}, as_arrow(ROWS[:5], pa.ipc.new_file)),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\x85\u2028\u2029"), max_size=30)
TABLES = st.lists(st.tuples(TEXT, TEXT), max_size=8)


def read_bytes(folder: Path, name: str, data: bytes) -> list[RawRecord]:
    (folder / name).write_bytes(data)
    return all_records(Source(name="s", path=str(folder / name), **SAMPLES[name.partition(".gz")[0]][0]))


def check(records: list[RawRecord]) -> None:
    for record in records:
        assert bool(record.fields) != bool(record.reason)
    json.dumps([record.metadata for record in records], allow_nan=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=1000)
@given(data=st.binary(max_size=200), mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]))
def test_any_bytes_give_records_or_reasons(name: str, folder: Path, data: bytes, mark: bytes) -> None:
    check(read_bytes(folder, name, mark + data))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=1000)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1, max_size=4))
def test_a_damaged_file_gives_records_or_reasons(name: str, folder: Path, changes: list[tuple[float, bytes]]) -> None:
    data = SAMPLES[name][1]
    for place, replacement in changes:
        at = int(place * len(data))
        data = data[:at] + replacement + data[at + 1 :]
    check(read_bytes(folder, name, data))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet.gz", "a.arrow.gz"])
@settings(max_examples=1000)
@given(share=st.floats(0.01, 1, exclude_max=True))
def test_a_cut_file_never_loses_rows_in_silence(name: str, folder: Path, share: float) -> None:
    data = compressed(SAMPLES[name.removesuffix(".gz")][1], ".gz")
    found = read_bytes(folder, name, data[: max(1, int(share * len(data)))])
    check(found)
    assert any(record.reason == "unreadable_file" for record in found)


def written(name: str, rows: list[dict[str, Any]], encoding: str) -> bytes:
    if name == "a.csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["anchor", "positive"], *([row["anchor"], row["positive"]] for row in rows)])
        return file.getvalue().encode(encoding)
    if name == "a.json":
        return json.dumps(rows, ensure_ascii=False).encode(encoding)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@settings(max_examples=1000)
@given(table=TABLES)
def test_what_was_written_is_read(name: str, encoding: str, folder: Path, table: list[tuple[str, str]]) -> None:
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in table]
    found = read_bytes(folder, name, written(name, rows, encoding))
    assert [record.fields for record in found] == rows


@pytest.mark.slow
@settings(max_examples=1000)
@given(table=TABLES)
def test_tables_of_columns_are_read(folder: Path, table: list[tuple[str, str]]) -> None:
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in table]
    if rows:
        assert [record.fields for record in read_bytes(folder, "a.parquet", as_parquet(rows))] == rows
        assert [record.fields for record in read_bytes(folder, "a.arrow", as_arrow(rows, pa.ipc.new_stream))] == rows


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.text(max_size=200), st.sampled_from(["", "---\n", "+++\n", "<!--", "..\n", ":", "#+", "title: "]))
def test_any_note_has_its_parts(text: str, beginning: str) -> None:
    for suffix in ("md", "org", "rst", "adoc", "txt"):
        note = read_note(beginning + text, f"a.{suffix}")
        assert (beginning + text).endswith(note.text)
        assert note.line >= 1
        assert "\n" not in note.title
