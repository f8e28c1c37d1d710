"""A file without a name, whose ranges are written, mapped, and used again once nobody reads them.

A file for each row group would cost more than its rows: to make one takes half a millisecond.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]

_EXTENT = 32 << 20  # bytes by which the file grows; each of its maps takes a file descriptor
_ALIGNED = 64  # bytes, as Arrow's own buffers are


class _Range(NamedTuple):
    """Bytes `begin` to `end` of an extent."""

    extent: int
    begin: int
    end: int


class SpillFile:
    """Keeps bytes in a temporary file, for several threads. Raises OSError where there is none."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it is kept
        self._lock = threading.Lock()
        self._size = 0
        self._extents: list[tuple[int, memoryview]] = []  # where each begins, and its map
        self._free: list[_Range] = []  # in order, none beside another
        self._returned: deque[_Range] = deque()  # not in `_free` yet: who returns takes no lock

    def store(self, data: pa.Buffer) -> pa.Buffer:
        """Write bytes, and give them as they lie in the file.

        Their range is used again once nothing holds the buffer, nor an array that is made of it.
        Raises OSError where they cannot be written.
        """
        where = self._take(-(-data.size // _ALIGNED) * _ALIGNED)
        start, mapped = self._extents[where.extent]
        try:
            self._write(memoryview(data), start + where.begin)
        except OSError:
            self._returned.append(where)
            raise
        held = mapped[where.begin : where.begin + data.size]
        weakref.finalize(held, self._returned.append, where).atexit = False
        return pa.py_buffer(held)

    def _write(self, data: Any, at: int) -> None:
        while data:  # not through the map, where a full disk would end the process
            written = os.pwrite(self._file.fileno(), data, at)
            data, at = data[written:], at + written

    def _take(self, size: int) -> _Range:
        """The first range that is free, if need be of a new extent."""
        with self._lock:
            self._collect()
            for number, (extent, begin, end) in enumerate(self._free):
                if end - begin >= size:
                    rest = [_Range(extent, begin + size, end)] if end - begin > size else []
                    self._free[number : number + 1] = rest
                    return _Range(extent, begin, begin + size)
            length = max(
                _EXTENT, -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            )
            extent = self._grow(length)
            if length > size:
                self._free.append(_Range(extent, size, length))
            return _Range(extent, 0, size)

    def _grow(self, length: int) -> int:
        """Add an extent, which takes no room on the disk until it is written."""
        number = self._file.fileno()
        os.ftruncate(number, self._size + length)
        mapped = mmap.mmap(number, length, prot=mmap.PROT_READ, offset=self._size)
        self._extents.append((self._size, memoryview(mapped)))
        self._size += length
        return len(self._extents) - 1

    def _collect(self) -> None:
        """Put the ranges that came back among the free ones, joined with their neighbours."""
        if not self._returned:
            return
        while self._returned:
            self._free.append(self._returned.popleft())
        joined: list[_Range] = []
        for found in sorted(self._free):
            last = joined[-1] if joined else None
            if last is not None and (last.extent, last.end) == found[:2]:
                joined[-1] = _Range(last.extent, last.begin, found.end)
            else:
                joined.append(found)
        self._free = joined
