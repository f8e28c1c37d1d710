"""Counts what a stream reads: row groups and the rows in them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hpdist.data.stream.row_groups import RowGroups


class Counts:
    """What was read, by any number of threads."""

    def __init__(self) -> None:
        self.groups = self.rows = 0
        self._lock = threading.Lock()

    def add(self, rows: int) -> None:
        """Count a row group."""
        with self._lock:
            self.groups += 1
            self.rows += rows


@contextlib.contextmanager
def read_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Count the row groups that are read inside."""
    counts, read = Counts(), RowGroups.read

    def counted(self: RowGroups, *where: Any) -> Any:
        table = read(self, *where)
        counts.add(len(table))
        return table

    with monkeypatch.context() as patch:
        patch.setattr(RowGroups, "read", counted)
        yield counts
