"""Turns Arrow batches into rows of Python values, within a limit of bytes however far their columns expand.

    batch = pa.record_batch({"text": pa.array(["one long text"] * 1024).dictionary_encode()})
    for part in split_batch(batch): to_rows(part)      # [{'text': 'one long text'}, …]; equal texts are one object

A file of 1 kB can stand for gigabytes: a dictionary or a run stores a value once for any number of rows, and lists may
have more items than there are bytes. Repeated values are shared, so they cost 8 bytes each, and a batch that would take
more than BATCH_BYTES is converted in halves. Cost: that of `RecordBatch.to_pylist`, and 0.1 ms a batch for counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.object_store import cause
from pipeline.data.fields import Row, broken

BATCH_ROWS = 1024
BATCH_BYTES = 16 << 20  # of Arrow data per conversion; Python takes up to four times that. Ours, measured
MAX_ROW_BYTES = 4 * BATCH_BYTES
POINTER_BYTES = 8  # of a reference to a value


def column_indices(columns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Indices of the columns that hold these fields; the nested field `a.b` is in column `a`."""
    return [i for i, name in enumerate(names) if any(path == name or path.startswith(f"{name}.") for path in columns)]


def rows_of_batch(batch: pa.RecordBatch, name: str, first: int, names: Sequence[str]) -> Iterator[Row]:
    """A batch's rows. An unreadable value breaks only its own row, and a row of more than 64 MB is `too_long`."""
    try:
        batch.validate(full=True)  # damaged offsets in an Arrow file could point anywhere in memory
        parts = split_batch(batch)
    except _UNREADABLE:
        parts = (batch.slice(i, 1) for i in range(batch.num_rows))
    for part in parts:
        try:
            rows = to_rows(part) if part.num_rows > 1 else None
        except _UNREADABLE:
            rows = None
        for i in range(part.num_rows):
            position = f"{name}:{first + i}"
            yield Row(position, rows[i], names) if rows else _single_row(part.slice(i, 1), position, names)
        first += part.num_rows


_UNREADABLE = (ValueError, OverflowError, pa.ArrowException)  # times that Python cannot represent raise the first two


def _single_row(row: pa.RecordBatch, position: str, names: Sequence[str]) -> Row:
    try:
        row.validate(full=True)
        if python_bytes(row) > MAX_ROW_BYTES:
            return broken(position, "too_long", f"a row of more than {MAX_ROW_BYTES:,} bytes")
        return Row(position, to_rows(row)[0], names)
    except _UNREADABLE as error:
        return broken(position, "invalid_utf8" if "UTF8" in str(error) else "unreadable_value", cause(error))


def split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of a valid batch that take at most BATCH_BYTES each, except single rows."""
    if batch.num_rows == 1 or python_bytes(batch) <= BATCH_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from split_batch(batch.slice(0, half))
    yield from split_batch(batch.slice(half))


def to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """A batch's rows, as `to_pylist` gives them, but repeated values are one object."""
    if any(map(_repeats, batch.schema.types)):
        return _records(batch.schema.names, batch.columns, batch.num_rows)
    return batch.to_pylist()  # type: ignore[no-any-return]


def python_bytes(data: pa.RecordBatch | pa.Array) -> int:
    """Bytes of the distinct values, and of a reference to each value. Never expands the data to count them."""
    if isinstance(data, pa.RecordBatch):
        return sum(map(python_bytes, data.columns))
    kind, references = data.type, POINTER_BYTES * len(data)
    if pa.types.is_dictionary(kind):
        return references + python_bytes(_distinct(data)[0])
    if pa.types.is_run_end_encoded(kind):
        return references + python_bytes(_runs(data)[0])
    if pa.types.is_struct(kind):
        return references + sum(python_bytes(data.field(i)) for i in range(kind.num_fields))
    if _is_list(kind):
        items, starts, stops = _items(data)
        # A list view may repeat its items.
        return references + POINTER_BYTES * int((stops - starts).sum()) + python_bytes(items)
    return references + data.nbytes


def to_python(data: pa.Array) -> list[Any]:
    """The values of an array as `to_pylist` gives them, but repeated values are one object."""
    kind = data.type
    if not _repeats(kind):
        return data.to_pylist()  # type: ignore[no-any-return]
    if pa.types.is_dictionary(kind):
        distinct, indices = _distinct(data)
        values = [*to_python(distinct), None]
        return [values[i] for i in indices]
    if pa.types.is_run_end_encoded(kind):
        runs, lengths = _runs(data)
        return [value for value, count in zip(to_python(runs), lengths, strict=True) for _ in range(count)]
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return _with_nulls(data, _records(names, [data.field(i) for i in range(kind.num_fields)], len(data)))
    if _is_list(kind):
        items, starts, stops = _items(data)
        values = to_python(items)
        if pa.types.is_map(kind):
            values = [tuple(entry.values()) for entry in values]
        return _with_nulls(data, [values[i:j] for i, j in zip(starts.tolist(), stops.tolist(), strict=True)])
    raise TypeError(f"cannot read {kind}")


@cache
def _repeats(kind: pa.DataType) -> bool:
    """Whether one stored value may stand for several of an array's values."""
    types = pa.types
    checks = (types.is_dictionary, types.is_run_end_encoded, types.is_list_view, types.is_large_list_view)
    return any(check(kind) for check in checks) or any(_repeats(kind.field(i).type) for i in range(kind.num_fields))


def _records(names: list[str], columns: list[pa.Array], rows: int) -> list[dict[str, Any]]:
    values = [(name, to_python(column)) for name, column in zip(names, columns, strict=True)]
    return [{name: column[i] for name, column in values} for i in range(rows)]


def _with_nulls(data: pa.Array, values: list[Any]) -> list[Any]:
    if not data.null_count:
        return values
    return [value if valid else None for value, valid in zip(values, data.is_valid().to_pylist(), strict=True)]


@cache
def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    is_kind = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_map)
    return any(check(kind) for check in is_kind) or types.is_large_list_view(kind)


def _distinct(data: pa.DictionaryArray) -> tuple[pa.Array, list[int]]:
    """The values that occur, and each row's index into them; -1 for a null."""
    indices = data.indices
    used = indices.unique().drop_null()
    found = pc.fill_null(pc.index_in(indices, used), -1)
    return data.dictionary.take(used), found.to_pylist()


def _runs(data: pa.RunEndEncodedArray) -> tuple[pa.Array, list[int]]:
    """The values of the runs that a slice has, and how many of its rows each has."""
    first, count = data.find_physical_offset(), data.find_physical_length()
    ends = data.run_ends.slice(first, count).to_numpy().astype(np.int64) - data.offset
    ends = np.minimum(ends, len(data))
    return data.values.slice(first, count), np.diff(ends, prepend=0).tolist()


def _items(data: pa.Array) -> tuple[pa.Array, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The items that the lists of an array have, and where each list begins and ends in them."""
    if pa.types.is_fixed_size_list(data.type):
        size = data.type.list_size
        starts = (np.arange(len(data), dtype=np.int64) + data.offset) * size
        stops = starts + size
    elif pa.types.is_list_view(data.type) or pa.types.is_large_list_view(data.type):
        starts = data.offsets.to_numpy().astype(np.int64)
        stops = starts + data.sizes.to_numpy().astype(np.int64)
    else:
        offsets = data.offsets.to_numpy().astype(np.int64)
        starts, stops = offsets[:-1], offsets[1:]
    filled = stops > starts
    first, end = (int(starts[filled].min()), int(stops[filled].max())) if filled.any() else (0, 0)
    return (
        data.values.slice(first, end - first),
        np.where(filled, starts - first, 0),
        np.where(filled, stops - first, 0),
    )
