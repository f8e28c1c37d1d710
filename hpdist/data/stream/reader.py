"""What a stream reads from: rows by their place in an endless sequence of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.stream.permute import Int64Array


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored, in the order of the global batch."""

    table: pa.Table  # [rows], the columns that were asked for; nulls where nothing could be read
    ids: Int64Array  # [rows], stable for ever
    epochs: Int64Array  # [rows], the epoch that each row belongs to
    unread: Mapping[int, str] = field(default_factory=dict)
    """Why, by line, of the rows that could not be read."""
    labels: Int64Array | None = None  # [rows], of labelled rows

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Several runs of rows, one behind the other; nothing is copied but the ids."""
        if len(parts) == 1:
            return parts[0]
        unread: dict[int, str] = {}
        at = 0
        for part in parts:
            unread |= {at + line: reason for line, reason in part.unread.items()}
            at += len(part)
        labels = [part.labels for part in parts if part.labels is not None]
        return Rows(
            pa.concat_tables([part.table for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.epochs for part in parts]),
            unread,
            np.concatenate(labels) if labels else None,
        )


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
