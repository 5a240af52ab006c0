"""Reads Arrow files and streams (Feather v2, IPC), compressed or not.

    for row in arrow_rows(file, "a.arrow", ["anchor"]): ...          # Row('a.arrow:0', {'anchor': …})

Arrow's file format is its stream format between a magic word and a footer, so both are read as streams, and a truncated
file is read up to the cut. Memory: one record batch of the file, and a part of it as Python values. Cost: 1 GB/s.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.data.batches import BATCH_ROWS, column_indices, rows_of_batch
from pipeline.data.fields import Row
from pipeline.data.input_files import check_ratio

ARROW_SUFFIXES = (".arrow", ".arrows", ".ipc", ".feather")
_FILE_MAGIC = b"ARROW1"
_STREAM_MAGIC = b"\xff\xff\xff\xff"  # starts each message, since Arrow 0.15
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # values of Message.header_type in Arrow's Message.fbs


def arrow_rows(file: io.BufferedReader, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of an Arrow file or stream; a position is the row number. Raises UnpackingError."""
    beginning = file.peek()
    if not beginning:
        return
    is_file = beginning.startswith(_FILE_MAGIC)
    if is_file:
        file.read(8)  # the magic word and its padding
    if not file.peek().startswith(_STREAM_MAGIC):
        raise pa.ArrowInvalid("not an Arrow file or stream")
    first = 0
    with pa.ipc.open_stream(_Messages(file)) as stream:
        names = stream.schema.names
        indices = column_indices(columns, names)
        for batch in stream:
            for i in range(0, batch.num_rows, BATCH_ROWS):
                rows = batch.slice(i, BATCH_ROWS)
                yield from rows_of_batch(rows.select(indices), name, first + i, names)
            first += batch.num_rows
        if is_file and not file.read().endswith(_FILE_MAGIC):
            raise pa.ArrowInvalid("the file ends before its footer")


class _Messages(io.RawIOBase):
    """The messages of a stream, each read whole and checked before Arrow unpacks its buffers."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._pending: list[bytes] = []

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if not self._pending:
            self._pending = self._next_message()
        data = self._pending.pop(0) if self._pending else b""
        if size is not None and 0 <= size < len(data):
            self._pending.insert(0, data[size:])
            return data[:size]
        return data  # Arrow asks for a message's parts one by one, so bodies are not copied

    def _next_message(self) -> list[bytes]:
        prefix = self._file.read(8)
        metadata_bytes = int.from_bytes(prefix[4:], "little", signed=True)
        if len(prefix) < 8 or metadata_bytes <= 0:  # the end of the stream, or damage, which Arrow reports
            return [part for part in (prefix[:4], prefix[4:]) if part]
        metadata = self._file.read(metadata_bytes)
        try:
            message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
            body_bytes = message.number(3, "<q")
            body = self._file.read(body_bytes if body_bytes >= 0 else 0)  # read(-1) would read the rest of the file
            check_ratio(_unpacked_bytes(message, body), len(body))
        except (struct.error, ValueError, OverflowError):
            raise pa.ArrowInvalid("a message with damaged metadata") from None
        return [part for part in (prefix[:4], prefix[4:], metadata, body) if part]


def _unpacked_bytes(message: _Table, body: bytes) -> int:
    """Bytes of a message's buffers, or its number of rows if that is more: a column of nulls has rows, but no bytes.

    A compressed buffer begins with its unpacked size, or -1 if it is stored as it is.
    """
    kind, batch = message.number(1, "<B"), message.table(2)
    if kind == _DICTIONARY_BATCH and batch:
        batch = batch.table(1)
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH) or not batch or not batch.table(3):
        return max(len(body), batch.number(0, "<q") if batch else 0)
    buffers = batch.structs(2, "<qq")
    unpacked = sum(max(struct.unpack_from("<q", body, offset)[0], size) for offset, size in buffers if size)
    return max(unpacked, batch.number(0, "<q"))


class _Table:
    """A table of a flatbuffer: the offsets of its fields lie in a table of their own, 0 for a missing one."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - struct.unpack_from("<i", data, at)[0]

    def _field(self, index: int) -> int:
        (size,) = struct.unpack_from("<H", self._data, self._fields)
        place = 4 + 2 * index
        offset = struct.unpack_from("<H", self._data, self._fields + place)[0] if place < size else 0
        return self._at + offset if offset else 0

    def number(self, index: int, format: str) -> int:
        at = self._field(index)
        return int(struct.unpack_from(format, self._data, at)[0]) if at else 0

    def table(self, index: int) -> _Table | None:
        at = self._field(index)
        return _Table(self._data, at + struct.unpack_from("<I", self._data, at)[0]) if at else None

    def structs(self, index: int, format: str) -> Iterator[Any]:
        at = self._field(index)
        if at:
            at += struct.unpack_from("<I", self._data, at)[0]
            (count,) = struct.unpack_from("<I", self._data, at)
            for i in range(count):
                yield struct.unpack_from(format, self._data, at + 4 + i * struct.calcsize(format))
