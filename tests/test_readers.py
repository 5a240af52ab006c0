"""Properties of the readers: any bytes give records or reasons, and what was written is read."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import Source
from pipeline.data.fields import RawRecord
from pipeline.data.input_files import without_compression
from pipeline.data.sources import ReadTask, read
from pipeline.data.titles import read_note
from tests.test_sources import ROWS, as_arrow, as_csv, as_lines, as_parquet, compressed, write_new

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
TABLE = pa.table(  # flat, nested and as a dictionary
    {
        "anchor": [f"title {i}" for i in range(20)],
        "positive": pa.array([f"text {i // 3}" for i in range(20)]).dictionary_encode(),
        "items": [[{"a": str(i), "b": [i] * 3}] * (i % 3) for i in range(20)],
    }
)


def parquet(**options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(TABLE, file, row_group_size=8, **options)
    return file.getvalue()


def arrow(writer: Callable[..., Any], compression: str | None = None) -> bytes:
    file = io.BytesIO()
    with writer(file, TABLE.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as sink:
        sink.write_table(TABLE, max_chunksize=8)
    return file.getvalue()


BINARY = {  # names of files → valid content
    "a.parquet": parquet(),
    "b.parquet": parquet(compression="zstd", data_page_version="2.0", write_page_checksum=True),
    "c.parquet": parquet(compression="none", use_dictionary=False, column_encoding={"anchor": "DELTA_BYTE_ARRAY"}),
    "a.arrow": arrow(pa.ipc.new_file),
    "b.arrow": arrow(pa.ipc.new_stream),
    "c.arrow": arrow(pa.ipc.new_file, "lz4"),
    "d.arrow": arrow(pa.ipc.new_stream, "zstd"),
}
BINARY |= {
    f"{name}{suffix}": compressed(BINARY[name], suffix)
    for name in ("a.parquet", "b.arrow")
    for suffix in (".gz", ".zst")
}
MAX_POOL_BYTES = 64 << 20  # of Arrow while it reads files of a few kB, whatever they claim
PACKED = {name: compressed(data, ".gz") for name, (_, data) in SAMPLES.items()}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\x85\u2028\u2029"), max_size=30)
TABLES = st.lists(st.tuples(TEXT, TEXT), max_size=4)


def read_bytes(folder: Path, name: str, data: bytes) -> list[RawRecord]:
    """The records of a small file, which planning makes one task."""
    write_new(folder / name, data)
    kind = PurePath(without_compression(name)).suffix
    source = Source(name="s", path=str(folder / name), **SAMPLES[f"a{kind}"][0])
    return list(read(ReadTask(str(folder), (name,)), source))


def check(records: list[RawRecord]) -> None:
    for record in records:
        assert bool(record.fields) != bool(record.reason)
    json.dumps([record.metadata for record in records], allow_nan=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


# Each example is tried in all formats, because making one takes longer than reading it.


@pytest.mark.slow
@settings(max_examples=1000)
@given(data=st.binary(max_size=200), mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]))
def test_any_bytes_give_records_or_reasons(folder: Path, data: bytes, mark: bytes) -> None:
    for name in SAMPLES:
        check(read_bytes(folder, name, mark + data))


@pytest.mark.slow
@settings(max_examples=1000)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1, max_size=4))
def test_a_damaged_file_gives_records_or_reasons(folder: Path, changes: list[tuple[float, bytes]]) -> None:
    for name, (_, data) in SAMPLES.items():
        for place, replacement in changes:
            at = int(place * len(data))
            data = data[:at] + replacement + data[at + 1 :]
        check(read_bytes(folder, name, data))


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """Arrow's memory pool during the test, which counts from 0."""
    default = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(default)
    pa.set_memory_pool(counting)
    yield counting
    pa.set_memory_pool(default)


# A flip: where, counted from the end in two of three cases, because footers are there; and the bit.
FLIPS = st.lists(st.tuples(st.floats(-2, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=FLIPS, share=st.just(1.0) | st.floats(0.1, 1))
def test_flipped_bits_give_records_or_reasons(
    folder: Path, pool: pa.MemoryPool, flips: list[tuple[float, int]], share: float
) -> None:
    """Of all kinds of binary files, as they are and packed. A process that dies fails the tests of this file."""
    for name, content in BINARY.items():
        data = bytearray(content)
        for place, bit in flips:
            at = int(place * len(data)) if place > 0 else -1 - int(-place / 2 * min(len(data) - 1, 1500))
            data[at] ^= 1 << bit
        check(read_bytes(folder, name, bytes(data[: int(share * len(data))])))
        assert pool.max_memory() < MAX_POOL_BYTES, name


@pytest.mark.slow
@settings(max_examples=1000)
@given(share=st.floats(0.01, 1, exclude_max=True))
def test_a_cut_file_never_loses_rows_in_silence(folder: Path, share: float) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.arrow"):
        data = PACKED[name]
        found = read_bytes(folder, f"{name}.gz", data[: max(1, int(share * len(data)))])
        check(found)
        assert any(record.reason == "unreadable_file" for record in found), name


def written(name: str, rows: list[dict[str, Any]], encoding: str) -> bytes:
    if name == "a.csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["anchor", "positive"], *([row["anchor"], row["positive"]] for row in rows)])
        return file.getvalue().encode(encoding)
    if name == "a.json":
        return json.dumps(rows, ensure_ascii=False).encode(encoding)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


@pytest.mark.slow
@settings(max_examples=1000)
@given(table=TABLES)
def test_what_was_written_is_read(folder: Path, table: list[tuple[str, str]]) -> None:
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in table]
    for name, encoding in itertools.product(("a.jsonl", "a.json", "a.csv"), ("utf-8", "utf-8-sig", "utf-16", "utf-32")):
        found = read_bytes(folder, name, written(name, rows, encoding))
        assert [record.fields for record in found] == rows, (name, encoding)
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
