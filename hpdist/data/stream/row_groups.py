"""Reads row groups of Parquet files: a footer is parsed once, and local files stay open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.files.open import (
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    is_remote,
    open_file,
    stat,
)
from hpdist.data.stream.bounded import read_within
from hpdist.data.stream.footers import MAGIC
from hpdist.data.stream.index import DataFile

_FOOTERS = 32 << 20  # bytes of footers, as they are stored, that are kept parsed
_OPEN = 64  # files: opening one takes as long as reading a small row group


@dataclass
class _Known:
    """A file's parsed footer, and those who read it that are idle."""

    metadata: pq.FileMetaData
    idle: list[_Open] = field(default_factory=list)


@dataclass(frozen=True)
class _Open:
    """A file that can be read."""

    parquet: pq.ParquetFile
    source: Any  # what it reads from
    name: str = ""  # of this machine's files


class RowGroups:
    """Row groups of files, for several threads at once.

    Args:
        columns: Which of them are read.
        retry: How long a server may fail.
        stop: Ends every wait.
        budget: Bytes that a row group may take in memory, whatever it takes in the file.
        setting: What sets the budget, for messages.
    """

    def __init__(
        self,
        columns: Sequence[str],
        retry: Retry,
        stop: threading.Event,
        budget: int,
        setting: str = "shuffle_window",
    ) -> None:
        self._columns = list(columns)
        self._budget = budget
        self._setting = setting
        self._retry = retry
        self._stop = stop
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()  # the least recently used one first
        self._parsing: dict[str, threading.Lock] = {}
        self._bytes = self._idle = 0  # of all that is known

    def read(self, file: DataFile, number: int) -> pa.Table:
        """Read a row group.

        Raises FileChangedError, FileLostError, what reading a remote file raises, TooLargeError
        where it would take more memory than the budget and its size in the file allow, and what
        Arrow does where the file is damaged.
        """
        if is_remote(file.path):
            with open_file(file.path, file.version, self._retry, self._stop) as source:
                return self._read(_Open(self._parquet(file, source), source), number)
        opened = self._take(file) or self._open(file)
        table = self._read(opened, number)
        self._give(file, opened)
        return table

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._known.clear()
            self._bytes = self._idle = 0

    def _read(self, opened: _Open, number: int) -> pa.Table:
        return read_within(
            opened.parquet, opened.source, number, self._columns, self._budget, self._setting
        )

    def _take(self, file: DataFile) -> _Open | None:
        """A local file that is open and idle, if it still is what the path names."""
        with self._lock:
            known = self._known.get(file.path)
            if known is None or not known.idle:
                return None
            self._idle -= 1
            opened = known.idle.pop()
        return opened if _unchanged(opened.name, file.version) else None

    def _give(self, file: DataFile, opened: _Open) -> None:
        with self._lock:
            known = self._known.get(file.path)
            if known is not None and self._idle < _OPEN:
                known.idle.append(opened)
                self._idle += 1

    def _open(self, file: DataFile) -> _Open:
        opened: Any = open_file(file.path, file.version, self._retry, self._stop)
        with opened:
            source = pa.OSFile(opened.name)  # reads natively, without Python's lock
        self._check_length(file, source)
        return _Open(self._parquet(file, source), source, opened.name)

    def _check_length(self, file: DataFile, source: Any) -> None:
        """Tell a file that was cut off, which is lost as a whole, from one that was rewritten."""
        size = source.size()
        if size >= file.version.size:
            return
        source.seek(max(0, size - len(MAGIC)))
        if source.read() == MAGIC:
            found = stat(file.path, self._retry, self._stop)
            raise FileChangedError(file.path, file.version, found)
        raise FileLostError(file.path, f"the file was cut off: {size} bytes of {file.version.size}")

    def _parquet(self, file: DataFile, source: Any) -> pq.ParquetFile:
        metadata = self._metadata(file.path, source)
        return pq.ParquetFile(
            source, metadata=metadata, page_checksum_verification=True, pre_buffer=False
        )

    def _metadata(self, path: str, source: Any) -> pq.FileMetaData:
        """A file's footer, read from `source` if need be, by one thread for all."""
        found, parsing = self._find(path)
        if found is not None:
            return found
        with parsing:
            found, _ = self._find(path)
            if found is None:
                found = pq.read_metadata(source)
                self._keep(path, found)
        return found

    def _find(self, path: str) -> tuple[pq.FileMetaData | None, threading.Lock]:
        with self._lock:
            parsing = self._parsing.setdefault(path, threading.Lock())
            if path not in self._known:
                return None, parsing
            self._known.move_to_end(path)
            return self._known[path].metadata, parsing

    def _keep(self, path: str, found: pq.FileMetaData) -> None:
        with self._lock:
            self._known[path] = _Known(found)
            self._bytes += found.serialized_size
            while self._bytes > _FOOTERS and len(self._known) > 1:
                _, forgotten = self._known.popitem(last=False)
                self._bytes -= forgotten.metadata.serialized_size
                self._idle -= len(forgotten.idle)


def _unchanged(name: str, version: FileVersion) -> bool:
    """Whether a local file is as it was; if not, or if that cannot be told, opening it says why."""
    try:
        found = os.stat(name)
    except OSError:
        return False
    return not version.differs(FileVersion.of_local(found))
