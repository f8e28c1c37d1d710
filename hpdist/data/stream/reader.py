"""What a stream reads from: rows by their place in an endless sequence of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.stream.permute import Int64Array
from hpdist.data.structures import Arrays


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored, in the order of the global batch."""

    table: pa.Table | None  # [rows], the columns asked for; nulls where nothing could be read
    ids: Int64Array  # [rows], stable for ever
    epochs: Int64Array  # [rows], the epoch that each row belongs to
    unread: Mapping[int, str] = field(default_factory=dict)
    """Why, by line, of the rows that could not be read."""
    labels: Arrays | None = None  # [rows, *], of labelled rows
    parts: tuple[tuple[int, Rows], ...] = ()
    """Which of several mixed datasets it is and its rows, in place of `table`."""

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Several runs of one dataset's rows, one behind the other; only ids are copied."""
        if len(parts) == 1:
            return parts[0]
        table = pa.concat_tables([part.table for part in parts])
        return Rows.paired_column(parts, table)

    @staticmethod
    def mixed(parts: list[tuple[int, Rows]]) -> Rows:
        """Runs of rows of several datasets, which need not have the same columns."""
        return Rows.paired_column([rows for _, rows in parts], None, tuple(parts))

    @staticmethod
    def paired_column(
        runs: list[Rows], table: pa.Table | None, parts: tuple[tuple[int, Rows], ...] = ()
    ) -> Rows:
        """Put ids, epochs and reasons of runs one behind the other, under a table of all."""
        unread: dict[int, str] = {}
        at = 0
        for run in runs:
            if run.unread:
                unread |= {at + line: reason for line, reason in run.unread.items()}
            at += len(run)
        ids = np.concatenate([run.ids for run in runs])
        epochs = np.concatenate([run.epochs for run in runs])
        return Rows(table, ids, epochs, unread, parts=parts)


class Reader(Protocol):
    """Gives the rows of global batches. One thread uses it; nothing in it knows ranks."""

    @property
    def rows(self) -> int | None:
        """Rows of an epoch; None where that is known only at its end."""
        ...

    def order(self) -> dict[str, Any]:
        """What the order of the rows depends on, as JSON: it must be the same on resuming."""
        ...

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch of `batch` rows that begins at `position`.

        Raises DataError where the source fails as a whole; rows that cannot be read are `unread`.
        """
        ...

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Begin to read ahead what that call of `read` will need; returns at once."""
        ...

    def resume_point(self, position: int) -> dict[str, Any] | None:
        """What is needed to go on at `position`, besides it; None where nothing is."""
        ...

    def describe(self, row: int) -> str:
        """Where a row lies, for messages: file, row group and row."""
        ...

    def close(self) -> None:
        """Stop reading ahead and let go of files."""
        ...
