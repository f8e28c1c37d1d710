"""The rows that every step consumed, as Parquet: `audit/rank-00000.parquet/part-….parquet`.

    pyarrow.parquet.read_table("runs/digits/audit/rank-00000.parquet")

A part is written with each checkpoint, so steps repeated after a resume are there once.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.batch import UnlabeledBatch
from hpdist.errors import CheckpointError
from hpdist.messages.redaction import redacted_text

_SCHEMA = pa.schema(
    {
        "attempt": pa.int64(),
        "applied": pa.bool_(),
        "epoch": pa.int64(),
        "id": pa.int64(),
        "valid": pa.bool_(),
        "reason": pa.string(),
    }
)


class Audit:
    """Collects the rows of one rank's steps.

    Args:
        folder: The run's `audit` folder.
        rank: The rank of the rows.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._own = folder / f"rank-{rank:05d}.parquet"
        self._lock = threading.Lock()
        self._tables: list[tuple[int, pa.Table]] = []  # with their attempts

    def add(self, attempt: int, applied: bool, batch: UnlabeledBatch) -> None:
        """Record the rows of an attempted step."""
        rows = len(batch)
        valid = np.ones(rows, bool) if batch.valid is None else batch.valid.numpy()
        epochs = np.zeros(rows, np.int64) if batch.epochs is None else batch.epochs.numpy()
        reasons = {bad.id: redacted_text(bad.reason) for bad in batch.bad}
        assert batch.ids is not None  # a stream's rows have them
        ids = batch.ids.cpu().numpy()
        columns = [
            pa.array(np.full(rows, attempt)),
            pa.array(np.full(rows, applied)),
            pa.array(epochs),
            pa.array(ids),
            pa.array(valid),
            pa.array([reasons.get(int(i)) for i in ids] if reasons else [None] * rows, pa.string()),
        ]
        with self._lock:
            self._tables.append((attempt, pa.table(columns, schema=_SCHEMA)))

    def take(self) -> Callable[[], None]:
        """Return a call that writes what was collected, and raises CheckpointError if it fails.

        It may be called on another thread, or never: unwritten rows come with the next one.
        """
        with self._lock:
            last = self._tables[-1][0] if self._tables else 0
        return lambda: self._write(last)

    def _write(self, last: int) -> None:
        with self._lock:
            tables = [(attempt, table) for attempt, table in self._tables if attempt <= last]
        if not tables:
            return
        name = f"part-{tables[0][0]:010d}-{tables[-1][0]:010d}.parquet"
        temporary = self._own / f".{name}.tmp"
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.concat_tables([table for _, table in tables]), temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self._own / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"the audit in {self._own} cannot be written: {error}") from error
        with self._lock:
            self._tables = self._tables[len(tables) :]

    def drop_after(self, attempt: int) -> None:
        """Remove records of later attempts by any rank; called on one rank, before a flush."""
        for part in self._folder.glob("rank-*.parquet/part-*.parquet"):
            found = re.fullmatch(r"part-(\d+)-(\d+)\.parquet", part.name)
            if found is not None and int(found[1]) > attempt:
                part.unlink()
        if attempt == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
