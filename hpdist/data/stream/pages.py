"""Page headers of Parquet column chunks: what reading a chunk will take, before any of it is read.

A footer may claim anything, and a few bytes of a page can stand for gigabytes. What a page says is
what the reader makes room for, so that it is added up first. Parquet writes the headers in Thrift's
compact protocol, of which only numbers are of interest here; everything else is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_FIRST_READ = 4 << 10  # bytes that hold most headers whole, with statistics of long values
_LONGEST = 16 << 20  # bytes of a header with statistics, as Arrow reads them at most
_DEEPEST = 16  # structs in one another
_MOST = 100_000  # pages of a chunk; reading each header takes some microseconds
_KINDS = (5, 7, 8)  # fields, the headers of data and dictionaries, whose first counts values
_DICTIONARY = 2  # of the types of page

_Fields: TypeAlias = dict[int, Any]
"""Integers and structs of a struct, by field number; None for what is passed over."""


class BadPageError(Exception):
    """A page header that no writer makes."""


class Page(NamedTuple):
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
        counts = [found.get(1) for found in map(header.get, _KINDS) if isinstance(found, dict)]
        count = sum(found for found in counts if isinstance(found, int))
        if count < 0:
            raise BadPageError("a page of it has a negative number of values")
        yield Page(header.get(1) == _DICTIONARY, size, count)
        start += length + stored
    raise BadPageError(f"it has more than {_MOST} pages")


def _header(read: Callable[[int, int], bytes], start: int, end: int) -> tuple[_Fields, int]:
    """Read one header: its fields by number, and its length."""
    size = _FIRST_READ
    while True:
        data = read(start, min(end, start + size))
        try:
            return _struct(data, 0, 0)
        except IndexError:
            if start + size >= end or size >= _LONGEST:
                raise BadPageError("a page header of it has no end") from None
            size *= 16


# The functions below read one value of `data` at a place, and give it and the place behind it.
# IndexError: the data ends before the value does.


def _struct(data: bytes, at: int, depth: int) -> tuple[_Fields, int]:
    """Read the integers and structs of a struct, by field number."""
    _check_depth(depth)
    fields: _Fields = {}
    number = 0
    while head := data[at]:  # until a stop
        at += 1
        kind = head & 0xF
        if head > kind:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        if kind in _INTEGERS:  # first, since most are
            fields[number], at = _integer(data, at)
        elif kind == _STRUCT:
            fields[number], at = _struct(data, at, depth + 1)
        else:
            fields[number], at = None, _behind(data, at, kind, depth)
    return fields, at + 1


def _behind(data: bytes, at: int, kind: int, depth: int) -> int:
    """The place behind a value that is passed over."""
    if kind in (_TRUE, _FALSE):
        return at  # the type says it
    if kind == _BINARY:
        count, at = _unsigned(data, at)
        return _skipped(data, at + count)
    if kind in (_BYTE, _DOUBLE):
        return _skipped(data, at + (1 if kind == _BYTE else 8))
    if kind in (_LIST, _SET):
        return _behind_list(data, at, depth + 1)
    raise BadPageError("a page header of it is damaged")


def _behind_list(data: bytes, at: int, depth: int) -> int:
    _check_depth(depth)
    count, kind = data[at] >> 4, data[at] & 0xF
    at += 1
    if count == 15:
        count, at = _unsigned(data, at)
    for _ in range(count):
        if kind in (_TRUE, _FALSE):
            at = _skipped(data, at + 1)  # in a list they are bytes
        elif kind in _INTEGERS:
            at = _unsigned(data, at)[1]
        elif kind == _STRUCT:
            at = _struct(data, at, depth + 1)[1]
        else:
            at = _behind(data, at, kind, depth)
    return at


def _check_depth(depth: int) -> None:
    if depth > _DEEPEST:
        raise BadPageError("a page header of it is nested too deep")


def _skipped(data: bytes, at: int) -> int:
    if at > len(data):
        raise IndexError
    return at


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
        if shift > 63:
            raise BadPageError("a page header of it is damaged")
