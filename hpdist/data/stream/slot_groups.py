"""A row group's rows, given piece by piece in the order of a `SlotPlan`, without a copy."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.spill import Spill


@dataclass(frozen=True)
class Pieces:
    """Rows that follow one another in their row groups, piece by piece."""

    tables: list[pa.Table] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of each piece's first row
    sizes: list[int] = field(default_factory=list)

    def all_ids(self) -> Int64Array:
        """The id of every row, [rows]."""
        sizes = np.asarray(self.sizes)
        before = np.asarray(self.ids) - np.cumsum(sizes) + sizes
        return np.repeat(before, sizes) + np.arange(sizes.sum())


class SlotGroup:
    """A row group's rows as they are stored, and the pieces in whose order they come."""

    def __init__(
        self,
        table: pa.Table,
        first: int,
        pieces: tuple[Int64Array, Int64Array],
        reason: str | None,
        spill: Spill,
    ) -> None:
        self._table = spill.keep(table, self)  # [rows]
        self._first = first  # the id of its first row
        self._rows, self._places = (found.tolist() for found in pieces)
        self.reason = reason
        """Why it could not be read."""

    def lay(self, at: int, stop: int, pieces: Pieces) -> None:
        """Add the rows at places [at, stop) of the order."""
        number = bisect_right(self._places, at) - 1
        while at < stop:
            start, end = self._places[number], self._places[number + 1]
            row = self._rows[number] + at - start
            size = min(end, stop) - at
            pieces.tables.append(self._table.slice(row, size))
            pieces.ids.append(self._first + row)
            pieces.sizes.append(size)
            at += size
            number += 1
