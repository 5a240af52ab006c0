"""Checks a Parquet file's pages against its footer while they are read, because batches are sized by the footer.

    pages = Pages(file)
    parquet = pq.ParquetFile(pages)
    pages.expect(columns_of_a_row_group)       # from the footer
    parquet.iter_batches(…)                    # raises ArrowInvalid at a page that the footer does not account for

A footer may say that a column takes 1 kB, while its pages unpack to gigabytes. Each page begins with a header that says
what it unpacks to; it is read here before pyarrow sees it. Cost: none that shows
beside decoding.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

SLACK, SLACK_BYTES = 2, 1 << 20  # for writers that count inexactly. Ours
MAX_HEADER_BYTES = 16 << 20  # as pyarrow has it; a header holds a page's least and greatest value
MAX_DEPTH = 8  # of structs in a header; the format has three
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7  # values of PageType and Encoding in Parquet's parquet.thrift
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12  # types of the compact protocol

Header = dict[tuple[int, int], int]
"""The integers of a page header, by the number of the struct's field that they are in, 0 for none, and by their own."""


@dataclass
class _Chunk:
    """What the footer says of a column in a row group, and how far its pages have been read."""

    start: int
    stop: int
    unpacked_bytes: int
    values: int
    has_deltas: bool
    next_header: int = 0
    begun: bytes = b""
    """The first bytes of the next header, if the rest of it has not been read yet."""

    def check(self, header: Header, is_first: bool) -> None:
        """Subtract a page. Raises ArrowInvalid if the footer did not account for it."""
        kind, unpacked_bytes, packed_bytes = (header.get((0, key), 0) for key in (1, 2, 3))
        values, encoding = header.get((5, 1), header.get((8, 1), 0)), header.get((5, 2), header.get((8, 4)))
        self.unpacked_bytes -= unpacked_bytes
        self.values -= values
        if min(unpacked_bytes, packed_bytes, values) < 0:
            raise pa.ArrowInvalid(f"a page of a negative size at byte {self.next_header}")
        if self.unpacked_bytes < 0 or self.values < 0:
            raise pa.ArrowInvalid(f"the page at byte {self.next_header} holds more than the footer says")
        has_new_deltas = encoding == _DELTA_BYTE_ARRAY and not self.has_deltas
        if has_new_deltas or (kind == _DICTIONARY_PAGE and not is_first):
            raise pa.ArrowInvalid(f"the page at byte {self.next_header} has another encoding than the footer says")


class Pages(io.RawIOBase):
    """A Parquet file whose pages are checked as they are read. `closed_to_reads` lets every read raise ClosedError."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._chunks: list[_Chunk] = []
        self.closed_to_reads = False

    def expect(self, columns: Iterable[Any]) -> None:
        """Check the pages of these columns, pyarrow's ColumnChunkMetaData, and forget those of before."""
        self._chunks = [
            _Chunk(
                start := first_page(column),
                start + column.total_compressed_size,
                SLACK * column.total_uncompressed_size + SLACK_BYTES,
                SLACK * column.num_values,
                "DELTA_BYTE_ARRAY" in column.encodings,
                next_header=start,
            )
            for column in columns
        ]

    def read(self, size: int | None = -1) -> bytes:
        if self.closed_to_reads:
            raise ClosedError
        start = self._file.tell()
        data = self._file.read(-1 if size is None else size)
        for chunk in self._chunks:
            self._follow(chunk, start, data)
        return data

    def _follow(self, chunk: _Chunk, start: int, data: bytes) -> None:
        """Check the headers of a chunk's pages that begin, or end, in `data`, which lies at `start`."""
        while start <= (wanted := chunk.next_header + len(chunk.begun)) < min(start + len(data), chunk.stop):
            begun = memoryview(data)[wanted - start :]
            if chunk.begun:
                begun = memoryview(chunk.begun + begun)
            try:
                header, length = _read_header(begun)
            except IndexError:  # the rest is in the next read
                if len(begun) > MAX_HEADER_BYTES:
                    raise pa.ArrowInvalid(f"a page header without end at byte {chunk.next_header}") from None
                chunk.begun = bytes(begun)
                return
            chunk.check(header, is_first=chunk.next_header == chunk.start)
            chunk.next_header += length + header.get((0, 3), 0)
            chunk.begun = b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class ClosedError(Exception):
    """A read of pages that are closed to reads."""


def first_page(column: Any) -> int:
    """Where a column's pages begin: at its dictionary, if it has one."""
    return min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)


def _read_header(data: memoryview, at: int = 0, inside: int = 0) -> tuple[Header, int]:
    """A page header, a struct in Thrift's compact protocol, and where it ends.

    Raises IndexError if it goes on behind the data, ArrowInvalid for what no page header has.
    """
    header: Header = {}
    number = 0
    while kind := data[at] & 15:
        number += data[at] >> 4
        if data[at] < 16:
            number, at = _read_integer(data, at + 1)
        else:
            at += 1
        if kind in _INTEGERS:
            header[inside, number], at = _read_integer(data, at)
        elif kind == _BINARY:
            size, at = _read_varint(data, at)
            at += size
        elif kind == _STRUCT and not inside:
            below, at = _read_header(data, at, number)
            header |= below
        elif kind == _STRUCT and inside > -MAX_DEPTH:  # statistics: of no use here
            _, at = _read_header(data, at, min(inside, 0) - 1)
        elif kind not in _BOOLEANS:
            raise pa.ArrowInvalid("a damaged page header")
    return header, at + 1


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] >= 0x80 and shift < 63:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | (data[at] & 0x7F) << shift, at + 1


def _read_integer(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at
