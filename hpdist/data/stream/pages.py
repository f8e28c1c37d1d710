"""Page headers of Parquet column chunks: what reading a chunk will take, before any of it is read.

A footer may claim anything, and a few bytes of a page can stand for gigabytes. What a page says is
what the reader makes room for, so that it is added up first. Parquet writes the headers in Thrift's
compact protocol, of which only numbers are of interest here; everything else is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_FIRST_READ = 1 << 10  # bytes that hold most headers whole
_LONGEST = 16 << 20  # bytes of a header with statistics, as Arrow reads them at most
_DEEPEST = 16  # structs in one another
_MOST = 100_000  # pages of a chunk; reading each header takes some microseconds
_KINDS = (5, 7, 8)  # fields, the headers of data and dictionaries, whose first counts values
_DICTIONARY = 2  # of the types of page


class BadPageError(Exception):
    """A page header that no writer makes."""


@dataclass(frozen=True)
class Page:
    """What a page header says."""

    dictionary: bool
    size: int  # bytes, uncompressed
    values: int


def pages(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[Page]:
    """Walk over the page headers of a column chunk, from its first byte to the one behind it.

    `read` gives the bytes from one offset up to another. Raises BadPageError.
    """
    for _ in range(_MOST):
        if start >= end:
            return
        header, length = _header(read, start, end)
        size, stored = header.get(2), header.get(3)
        if not (isinstance(size, int) and isinstance(stored, int) and min(size, stored) >= 0):
            raise BadPageError("a page of it has no size")
        counts = [header[kind] for kind in _KINDS if isinstance(header.get(kind), dict)]
        count = sum(found.get(1) or 0 for found in counts)
        if count < 0:
            raise BadPageError("a page of it has a negative number of values")
        yield Page(header.get(1) == _DICTIONARY, size, count)
        start += length + stored
    raise BadPageError(f"it has more than {_MOST} pages")


def _header(read: Callable[[int, int], bytes], start: int, end: int) -> tuple[dict[int, Any], int]:
    """Read one header: its fields by number, and its length."""
    size = _FIRST_READ
    while True:
        data = read(start, min(end, start + size))
        try:
            reader = _Compact(data)
            return reader.struct(), reader.at
        except IndexError:
            if start + size >= end or size >= _LONGEST:
                raise BadPageError("a page header of it has no end") from None
            size *= 16


class _Compact:
    """Reads Thrift's compact protocol. IndexError: the data ends before what is read does."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read the integers and structs of a struct, by field number."""
        if depth > _DEEPEST:
            raise BadPageError("a page header of it is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            delta, kind = head >> 4, head & 0xF
            number = number + delta if delta else self._integer()
            fields[number] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:  # first, since most are
            return self._integer()
        if kind in (_TRUE, _FALSE):
            return None  # the type says it
        if kind == _BYTE:
            return self._skip(1)
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth)
        raise BadPageError("a page header of it is damaged")

    def _list(self, depth: int) -> None:
        head = self._byte()
        count, kind = head >> 4, head & 0xF
        for _ in range(self._unsigned() if count == 15 else count):
            if kind in (_TRUE, _FALSE):
                self._skip(1)  # in a list they are bytes
            else:
                self._value(kind, depth)

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError

    def _unsigned(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        if byte < 0x80:
            return byte
        value, shift = byte & 0x7F, 7
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise BadPageError("a page header of it is damaged")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
