"""What the record batches of an Arrow file take in memory, before any of them is decompressed.

Each buffer of a compressed batch begins with the number of bytes that it becomes, for which Arrow
makes room. What says where the batches and their buffers lie are FlatBuffers, of which a few fields
are of interest here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from hpdist.data.files.unpacked import check_unpacked

_MAGIC = b"ARROW1"  # a file begins and ends with it, a stream does not
_CONTINUED = b"\xff\xff\xff\xff"
_DICTIONARY, _BATCH = 2, 3  # types of message that hold buffers
_BUFFERS, _COMPRESSION = 2, 3  # fields of a record batch
_LONGEST = 64 << 20  # bytes of a message's metadata


def check_batches(source: Any, most: int) -> None:
    """Hold the batches of an Arrow file or stream, `source`, together to a limit.

    Raises UnpackedError where they are too large, and ValueError where the file is damaged.
    """
    size, total = source.size(), 0
    try:
        for at, length, body in _places(source, size):
            for held in _buffer_sizes(source, at, length, body):
                total += held
                check_unpacked(total, size, most)
    except (struct.error, IndexError, OverflowError, OSError) as error:  # OSError: beyond its end
        raise ValueError(f"its batches cannot be found: {error}") from error


def _places(source: Any, size: int) -> Iterator[tuple[int, int, int]]:
    """Where each message's metadata begins, how long it is, and where its body begins."""
    if bytes(source.read_at(len(_MAGIC), 0)) == _MAGIC:
        length = struct.unpack("<i", source.read_at(4, size - 10))[0]
        footer = _Table.root(_read(source, size - 10 - length, length))
        for field in (2, 3):  # dictionaries and record batches
            for place in footer.structs(field, 24):
                at, metadata = struct.unpack("<qi", place[:12])
                yield from _place(source, at, at + metadata)
        return
    at = 0
    while at + 8 <= size:
        found = list(_place(source, at, None))
        if not found:
            return
        yield from found
        start, length, body = found[0]
        at = body + _Table.root(_read(source, start, length)).number(3, "<q")


def _place(source: Any, at: int, body: int | None) -> Iterator[tuple[int, int, int]]:
    head = bytes(source.read_at(8, at))
    start = at + 8 if head[:4] == _CONTINUED else at + 4  # old files have no mark
    length = struct.unpack("<i", head[4:8] if start == at + 8 else head[:4])[0]
    if length:
        yield start, length, start + length if body is None else body


def _buffer_sizes(source: Any, at: int, length: int, body: int) -> Iterator[int]:
    """What each buffer of a message becomes, in bytes."""
    message = _Table.root(_read(source, at, length))
    kind = message.number(1, "<B")
    if kind not in (_DICTIONARY, _BATCH):
        return
    batch = message.table(2)
    if kind == _DICTIONARY:
        batch = batch.table(1)
    compressed = batch.has(_COMPRESSION)
    for place in batch.structs(_BUFFERS, 16):
        offset, stored = struct.unpack("<qq", place)
        claimed = -1
        if compressed and stored >= 8:
            claimed = struct.unpack("<q", source.read_at(8, body + offset))[0]
        yield max(stored, claimed)


def _read(source: Any, at: int, length: int) -> bytes:
    if not 0 < length <= _LONGEST or at < 0:
        raise IndexError(f"{length} bytes at {at} are no metadata")
    return bytes(source.read_at(length, at))


class _Table:
    """A table of a FlatBuffer: fields by number, at places that its own list says."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._fields = at - self._unpack("<i", at)

    @staticmethod
    def root(data: bytes) -> _Table:
        """The outermost table of a buffer."""
        return _Table(data, struct.unpack_from("<I", data)[0])

    def has(self, field: int) -> bool:
        """Whether a field is there."""
        return self._place(field) is not None

    def number(self, field: int, kind: str) -> int:
        """A number; 0 where it is left out."""
        place = self._place(field)
        return 0 if place is None else self._unpack(kind, place)

    def table(self, field: int) -> _Table:
        """A table that this one holds. Raises IndexError where it does not."""
        place = self._place(field)
        if place is None:
            raise IndexError(f"field {field} is missing")
        return _Table(self._data, place + self._unpack("<I", place))

    def structs(self, field: int, size: int) -> Iterator[bytes]:
        """The structs of so many bytes that a list holds."""
        place = self._place(field)
        if place is None:
            return
        start = place + self._unpack("<I", place)
        for number in range(self._unpack("<I", start)):
            at = start + 4 + number * size
            found = self._data[at : at + size]
            if len(found) < size:
                raise IndexError("a list ends early")
            yield found

    def _place(self, field: int) -> int | None:
        at = 4 + 2 * field
        if at >= self._unpack("<H", self._fields):
            return None
        offset = self._unpack("<H", self._fields + at)
        return self._at + offset if offset else None

    def _unpack(self, kind: str, at: int) -> int:
        if at < 0:
            raise IndexError("a place lies before the beginning")
        return int(struct.unpack_from(kind, self._data, at)[0])
