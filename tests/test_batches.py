"""Batches as rows: the values of pyarrow's `to_pylist`, in memory that does not grow with repetition."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batches import BATCH_BYTES, python_bytes, split_batch, to_python, to_rows

MB = 1 << 20
MAX_GROWTH_MB = 512  # of a process that reads; each file stands for 0.2 GB to 2 GB
LONG = "слово " * (2 * MB // 11)

WORDS = pa.array(["a", "b", None, "a"] * 5).dictionary_encode()
ARRAYS = {
    "dictionary": WORDS,
    "list": pa.ListArray.from_arrays([0, 2, 2, 5, 20], WORDS),
    "large list": pa.LargeListArray.from_arrays([0, 2, 2, 5, 20], WORDS),
    "list view": pa.ListViewArray.from_arrays([3, 0, 2, 3], [2, 3, 0, 9], WORDS),
    "fixed list": pa.FixedSizeListArray.from_arrays(WORDS, 4),
    "struct": pa.StructArray.from_arrays([WORDS[:4]], ["a"], mask=pa.array([False, True, False, False])),
    "map": pa.MapArray.from_arrays([0, 1, 1, 3], pa.array(["a", "b", "c"]), WORDS[:3]),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([2, 5, 9], pa.int32()), pa.array(["x", None, "y"])),
    "text lists with nulls": pa.array([["a"], None, [None, "b"], []]),
    "numbers": pa.array([1, None, 3]),
    "nulls": pa.nulls(5),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_values_are_those_of_pyarrow(name: str) -> None:
    array = ARRAYS[name]
    for part in (array, array[1:], array[1:-1], array[2:3], array[:0]):
        assert to_python(part) == part.to_pylist()
        assert python_bytes(part) >= 8 * len(part)


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    st.lists(st.none() | st.lists(st.none() | st.sampled_from(["", "a", "éß", "😀" * 9])), max_size=12),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_lists_of_dictionaries_are_those_of_pyarrow(rows: list[Any], start: int, size: int) -> None:
    array = pa.array(rows, pa.list_(pa.dictionary(pa.int8(), pa.string()))).slice(start, size)
    assert to_python(array) == array.to_pylist()
    table = pa.table({"a": array, "n": range(len(array))}).combine_chunks()
    for batch in table.to_batches():
        assert [row for part in split_batch(batch) for row in to_rows(part)] == batch.to_pylist()


def test_repeated_values_are_one_object() -> None:
    batch = pa.record_batch({"text": pa.array([LONG] * 1024).dictionary_encode()})
    rows = [row["text"] for part in split_batch(batch) for row in to_rows(part)]
    assert len(set(map(id, rows))) == 1
    assert rows[0] == LONG


def test_parts_take_a_limited_number_of_bytes() -> None:
    batch = pa.record_batch({"text": ["x" * MB] * 40 + ["y" * (BATCH_BYTES + 1)] + ["z"] * 3})
    parts = list(split_batch(batch))
    assert pa.Table.from_batches(parts) == pa.Table.from_batches([batch])
    assert all(
        part.num_rows == 1 or (part.get_total_buffer_size() and python_bytes(part) <= BATCH_BYTES) for part in parts
    )


def parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **{"compression": "zstd"} | options)
    return file.getvalue()


def arrow(table: pa.Table, compression: str | None = None) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return file.getvalue()


def repeated(rows: int) -> pa.Table:
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int32()).fill_null(0), pa.array([LONG]))})


def chars(rows: int, each: int) -> pa.Table:
    return pa.table({"text": pa.array(["x" * each] * rows)})


def nulls_in_lists(rows: int, each: int) -> pa.Table:
    offsets = pa.array(range(0, rows * each + 1, each), pa.int64())
    return pa.table({"text": pa.LargeListArray.from_arrays(offsets, pa.nulls(rows * each, pa.string()))})


BOMBS: dict[str, Callable[[], tuple[bytes, dict[str | None, int]]]] = {
    "dictionary.parquet": lambda: (parquet(repeated(1024)), {None: 1024}),
    "snappy.pq": lambda: (parquet(repeated(1024), compression="snappy"), {None: 1024}),
    "plain.parquet": lambda: (parquet(chars(400, MB), use_dictionary=False), {"unpacks_too_much": 1}),
    "prefixes.parquet": lambda: (
        parquet(chars(400, 2 * MB), use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
        {None: 400},
    ),
    "lists.parquet": lambda: (parquet(nulls_in_lists(4, 40 * MB)), {"unpacks_too_much": 1}),
    "dictionary.arrow": lambda: (arrow(repeated(1024)), {None: 1024}),
    "buffers.arrow": lambda: (arrow(chars(400, MB), "zstd"), {"unpacks_too_much": 1}),
    "buffers.feather": lambda: (arrow(chars(400, MB), "lz4"), {"unpacks_too_much": 1}),
    "packed.arrow.gz": lambda: (gzip.compress(arrow(chars(200, MB)), 1), {"unpacks_too_much": 1}),
    "packed.parquet.gz": lambda: (
        gzip.compress(parquet(chars(200, MB), use_dictionary=False, compression="none"), 1),
        {"unpacks_too_much": 1},
    ),
    "cells.csv.gz": lambda: (
        gzip.compress(b"text,b\n" + b",".join([b'"' + b"word and\n" * MB + b'"'] * 30) + b"\nx,y\n", 1),
        {"line_too_long": 1, None: 1},
    ),
    "values.json": lambda: (
        b'[\n{"text": "a"},\n{"text": [' + b"[]," * (20 * MB) + b"[]]}\n]",
        {None: 1, "line_too_long": 1},
    ),
}
READ = """
import json, sys
from collections import Counter
from pipeline.config import Source
from pipeline.data.sources import plan_source, read
source = Source(name="s", type=sys.argv[1], path=sys.argv[2], fields={"text": "text"})
peak_kb = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak_kb()
reasons = Counter(record.reason for task in plan_source(source).tasks for record in read(task, source))
print(json.dumps([list(reasons.items()), (peak_kb() - before) // 1024]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded_whatever_a_file_stands_for(name: str, tmp_path: Path) -> None:
    data, expected = BOMBS[name]()
    (tmp_path / name).write_bytes(data)
    suffix = name.split(".")[1]
    kind = {"pq": "parquet", "feather": "arrow"}.get(suffix, suffix)
    command = [sys.executable, "-c", READ, kind, str(tmp_path / name)]
    reasons, grown_mb = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert dict(reasons) == expected
    assert grown_mb < MAX_GROWTH_MB
