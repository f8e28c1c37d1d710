"""Reads byte ranges of files: local ones, on a web server, on the Hub or in an object store.

    version = stat("hf://datasets/user/name@1f0a…/train.parquet", Retry())
    with open_file(path, version, Retry()) as file:
        rows = pyarrow.parquet.ParquetFile(file).read_row_group(0)

What may pass by itself is waited for and tried again, from the byte that came last: a server that
does not answer, is overloaded, hangs up, falls silent or sends too little. What will not pass is
raised at once: `FileLostError`, `FileChangedError`. No query string, password or token of a path
reaches a message or a log.
"""

from __future__ import annotations

import io
import os
import threading
from typing import Any

from hpdist.data.files.retry import (
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    UnreachableError,
    is_remote,
    with_retries,
)
from hpdist.data.files.source import Local, Source
from hpdist.data.files.transport import source_of
from hpdist.messages.redaction import redacted

__all__ = [
    "FileChangedError",
    "FileLostError",
    "FileVersion",
    "RemoteFile",
    "Retry",
    "UnreachableError",
    "is_remote",
    "open_file",
    "read_range",
    "redacted",
    "stat",
]

_TAIL = 64 << 10  # bytes that pyarrow reads first, from the end of a Parquet file
_AHEAD = 64 << 10  # bytes that a smaller read fetches


def stat(path: str, retry: Retry, stop: threading.Event | None = None) -> FileVersion:
    """Ask for a file's size and tag.

    Raises FileLostError, UnreachableError, DataError where no size is named or the file system is
    not installed, and InterruptedError when `stop` is set.
    """
    source = source_of(path, None)
    return with_retries(path, retry, stop, lambda: source.stat(retry, stop))


def read_range(
    path: str,
    start: int,
    stop_at: int,
    retry: Retry,
    expected: FileVersion | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """Read the bytes from `start` up to, not including, `stop_at`: all of them.

    Raises what `stat` raises, FileLostError where the file ends before, DataError where the server
    serves no ranges of a large file, and FileChangedError where it is not the `expected` one or
    becomes another during the read.
    """
    if not 0 <= start <= stop_at:
        raise ValueError(f"no range: {start} to {stop_at}")
    return _read(source_of(path, expected), start, stop_at, retry, stop)


def open_file(
    path: str, version: FileVersion, retry: Retry, stop: threading.Event | None = None
) -> io.BufferedReader | RemoteFile:
    """Open a file to read and to seek in, as pyarrow does.

    A local file that is smaller than it was is opened all the same: it is damaged, which Parquet
    finds out. Any other file that is not of this version raises FileChangedError, here or when it
    is read.
    """
    if is_remote(path):
        return RemoteFile(path, version, retry, stop)
    found = stat(path, retry, stop)
    if found.size >= version.size and version.differs(found):
        raise FileChangedError(path, version, found)
    source = Local(path, version)
    return with_retries(path, retry, stop, source.open)


class RemoteFile(io.RawIOBase):
    """A remote file to seek in: one request gets its last 64 KiB, one every other read.

    A read of less than 64 KiB gets as much, for the next ones. Not for several threads at once.
    """

    def __init__(
        self, path: str, version: FileVersion, retry: Retry, stop: threading.Event | None = None
    ) -> None:
        super().__init__()
        self.size = version.size
        self._source = source_of(path, version)
        self._retry = retry
        self._stop = stop
        self._at = 0
        self._tail = (max(0, self.size - _TAIL), b"")
        self._ahead = (0, b"")
        self._held: list[tuple[int, bytes]] = []

    def hold(self, start: int, end: int) -> None:
        """Fetch a range, which every later read has part in; further ones are held beside it."""
        self._held.append((start, self._bytes(start, min(end, self.size))))

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether one can seek in it: yes."""
        return True

    def tell(self) -> int:
        """Tell the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there is room for."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read the rest."""
        return self.read()

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes, fewer only at the end."""
        if self.closed:
            raise ValueError("the file is closed")
        end = self.size if size is None or size < 0 else min(self._at + size, self.size)
        data = self._bytes(self._at, end) if self._at < end else b""
        self._at += len(data)
        return data

    def close(self) -> None:
        """Forget what was read."""
        self._tail = self._ahead = (0, b"")
        self._held = []
        super().close()

    def _bytes(self, start: int, end: int) -> bytes:
        for at, held in (self._tail, self._ahead, *self._held):
            if at <= start and end <= at + len(held):
                return held[start - at : end - at]
        at, held = self._tail
        if start >= at and not held:
            self._tail = (at, self._fetch(at, self.size))
        elif end - start < _AHEAD:
            self._ahead = (start, self._fetch(start, start + _AHEAD))
        else:
            return self._fetch(start, end)
        return self._bytes(start, end)

    def _fetch(self, start: int, end: int) -> bytes:
        return _read(self._source, start, end, self._retry, self._stop)


def _read(
    source: Source, start: int, end: int, retry: Retry, stop: threading.Event | None
) -> bytes:
    out = io.BytesIO()

    def attempt() -> None:
        if start + out.tell() < end:
            source.read(start + out.tell(), end, out, retry, stop)

    with_retries(source.path, retry, stop, attempt, out.tell)
    return out.getvalue()
