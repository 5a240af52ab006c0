"""Parquet files whose footer lies about their pages. Oracle: the file before its footer was changed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Source
from pipeline.data import read_tables
from pipeline.data.read_tables import row_group_bytes
from pipeline.data.sources import _UNREADABLE, ReadTask, read

MB = 1 << 20
PAGE = {"compression": "zstd", "use_dictionary": False, "data_page_size": 1 << 30}


def written(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def varint(number: int, length: int = 0) -> bytes:
    """A positive number in Thrift's compact protocol, with leading zeros up to `length` bytes."""
    number, found = 2 * number, bytearray()
    while number >= 0x80 or len(found) + 1 < length:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def with_footer(data: bytes, old: int, new: int) -> bytes:
    """The file with a number of its footer replaced wherever it is there, at the same length."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer, found = data[start:], varint(old)
    assert found in footer
    return data[:start] + footer.replace(found, varint(new, len(found)))


def outcomes(folder: Path, data: bytes) -> tuple[list[str | None], str, int]:
    """The reasons, the first excerpt and the most bytes that Arrow held."""
    (folder / "a.parquet").write_bytes(data)
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        source = Source(name="s", type="parquet", path=str(folder / "a.parquet"), fields={"text": "text"})
        records = list(read(ReadTask(str(folder), ("a.parquet",)), source))
    finally:
        pa.set_memory_pool(default)
    excerpt = next((record.excerpt for record in records if record.reason), "")
    return [record.reason for record in records], excerpt, pool.max_memory()


def test_a_footer_that_says_too_few_bytes(tmp_path: Path) -> None:
    data = written(pa.table({"text": ["x" * MB] * 40}), **PAGE)
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    assert column.total_uncompressed_size > 40 * MB > 1000 * column.total_compressed_size
    lie = with_footer(data, column.total_uncompressed_size, 2_000)
    reasons, excerpt, held = outcomes(tmp_path, lie)
    assert reasons == ["unreadable_row_group"] * 40
    assert excerpt == "row group 0: the page at byte 4 holds more than the footer says"
    assert held < 10 * MB
    reasons, *_ = outcomes(tmp_path, data)
    assert reasons == [None] * 40


def test_a_footer_that_says_too_few_values(tmp_path: Path) -> None:
    lists = pa.LargeListArray.from_arrays(pa.array([0, 10 * MB], pa.int64()), pa.nulls(10 * MB, pa.string()))
    data = written(pa.table({"text": lists}), **PAGE)
    reasons, excerpt, held = outcomes(tmp_path, with_footer(data, 10 * MB, 1))
    assert reasons == ["unreadable_row_group"]
    assert excerpt.endswith("holds more than the footer says")
    assert held < 10 * MB


@pytest.mark.parametrize("rows", [101, 5_000, 1 << 30, (1 << 34) - 1])
def test_a_footer_that_says_another_number_of_rows(rows: int, tmp_path: Path) -> None:
    data = written(pa.table({"text": [f"text {i}" for i in range(100)]}), compression="none")
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:-8].replace(varint(100), varint(rows))
    lie = data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    reasons, *_ = outcomes(tmp_path, lie)
    assert 1 <= len(reasons) <= 5_000
    assert any(reasons)


def test_a_row_group_of_a_negative_number_of_rows(tmp_path: Path) -> None:
    data = written(pa.table({"text": [f"text {i}" for i in range(100)]}))
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    lie = data[:start] + data[start:].replace(varint(100), bytes([varint(100)[0] - 1, varint(100)[1]]))
    reasons, *_ = outcomes(tmp_path, lie)
    assert reasons == ["unreadable_file"]


def test_every_page_of_ordinary_files_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of all sizes and short reads, so that headers lie across the ends of reads."""
    monkeypatch.setattr(read_tables, "BUFFER_BYTES", 777)
    table = pa.table({"text": [f"{i} " + "word " * (i % 97) for i in range(3_000)], "id": range(3_000)})
    for options in ({"data_page_size": 300}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {}):
        for compression in ("none", "zstd", "snappy"):
            data = written(table, compression=compression, row_group_size=700, **options)
            assert outcomes(tmp_path, data)[0] == [None] * 3_000, options


@pytest.mark.slow
def test_damaged_statistics_are_a_reason_and_end_no_process(tmp_path: Path) -> None:
    """Each bit of the footer, one at a time; some of them make pyarrow abort when it is asked about the column."""
    data = written(pa.table({"text": ["a", None]}))
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    end = start + data[start:].index(b"ARROW:schema")  # behind it is the schema in base64
    for bit in range(8 * start, 8 * end):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        outcomes(tmp_path, bytes(damaged))
        with open(tmp_path / "a.parquet", "rb") as file, contextlib.suppress(*_UNREADABLE):
            row_group_bytes(file)
