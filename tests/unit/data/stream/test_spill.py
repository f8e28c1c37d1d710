"""A budget of memory, and the file behind it, whose ranges are used again."""

from __future__ import annotations

import gc
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hpdist.data.stream.spill import Spill
from hpdist.data.stream.spill_file import SpillFile


class _Owner:
    """Who holds a table."""


def numbers(seed: int, rows: int) -> pa.Table:
    """Rows of uneven length, nested, some of them null."""
    drawn = np.random.default_rng(seed)
    values = [None if n == 0 else bytes([n % 256]) * n for n in drawn.integers(0, 300, rows)]
    lists = [list(range(n)) for n in drawn.integers(0, 5, rows)]
    return pa.table({"a": pa.array(values), "b": pa.array([{"c": found} for found in lists])})


def test_tables_stay_what_they_are_while_others_come_and_go() -> None:
    spill, chosen = Spill(0, "data"), random.Random(0)
    kept: list[tuple[pa.Table, pa.Table]] = []
    most = 0
    for seed in range(300):
        table = numbers(seed, chosen.randint(1, 60))
        first = chosen.randrange(len(table))
        stored = spill.keep(table, _Owner()).slice(first)  # its owner is gone, a slice of it stays
        kept.append((table.slice(first), stored))
        if len(kept) > 10:
            del kept[chosen.randrange(len(kept))]
        most = max(most, sum(whole.nbytes for whole, _ in kept))
        del table, stored
        if seed % 30 == 0:
            assert all(whole.equals(found) for whole, found in kept)
    assert all(whole.equals(found) for whole, found in kept)
    assert spill.spilled > 20 * most  # bytes that went through the file, and those that lay there
    assert spill.held == 0


def test_ranges_are_joined_so_that_the_file_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpdist.data.stream.spill_file._EXTENT", 1 << 16)
    file = SpillFile()
    for size in (1, 5_000, 60_000, 200, 200_000, 65_536):
        for _ in range(20):
            held: list[Any] = [file.store(pa.py_buffer(bytes([n]) * size)) for n in range(3)]
            assert [buffer.to_pybytes() for buffer in held] == [bytes([n]) * size for n in range(3)]
            del held
    gc.collect()
    assert file._size <= 3 * (200_704 + 65_536)  # three of the largest, and what came before


def test_rows_stay_in_memory_where_the_file_cannot_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spill, table, owner = Spill(0, "data"), numbers(0, 50), _Owner()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        found = [spill.keep(table, owner) for _ in range(3)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(kept is table for kept in found)
    assert spill.held == 3 * table.nbytes
    assert caplog.text.count("they stay in memory") == 1
    del owner
    gc.collect()
    assert spill.held == 0
