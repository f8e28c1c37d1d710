"""Rows that wait for their turn: in memory as far as a budget goes, and in a file beyond it.

The file has no name, so that it is gone with its rows, and with the process however that ends.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import weakref
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.stream.spill_file import SpillFile

_log = logging.getLogger("hpdist.data")


class Spill:
    """Keeps tables within a number of bytes of memory.

    Args:
        limit: Bytes that may be in memory.
        name: Of the dataset, for messages.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._lock = threading.RLock()  # what is collected while it is held, is released
        self._full = False
        self._file: SpillFile | None = None
        self.held = 0
        """Bytes in memory."""
        self.spilled = 0
        """Bytes that were ever written to the file."""

    def keep(self, table: pa.Table, owner: Any) -> pa.Table:
        """Give the table back, or its copy in the file; it counts until `owner` is collected.

        Where the file cannot be written, the table stays in memory, which is said once.
        """
        size = table.nbytes
        with self._lock:
            fits = self._full or self.held + size <= self._limit
            if fits:
                self.held += size
        if not fits:
            try:
                return self._written(table, size)
            except OSError as error:
                with self._lock:
                    first, self._full = not self._full, True
                    self.held += size
                if first:
                    self._warn(error)
        weakref.finalize(owner, self._release, size)
        return table

    def _written(self, table: pa.Table, size: int) -> pa.Table:
        with self._lock:
            if self._file is None:
                self._file = SpillFile()
        (batch,) = table.combine_chunks().to_batches()
        stored = self._file.store(batch.serialize())
        with self._lock:
            self.spilled += size
        return pa.Table.from_batches([pa.ipc.read_record_batch(stored, table.schema)])

    def _warn(self, error: OSError) -> None:
        _log.warning(
            "%s: rows that wait for their turn take more than shuffle_window and cannot be written "
            "to %s (%s): they stay in memory; free space there, name another folder in TMPDIR, or "
            "raise shuffle_window",
            self._name,
            tempfile.gettempdir(),
            error.strerror or error,
        )

    def _release(self, size: int) -> None:
        with self._lock:
            self.held -= size
