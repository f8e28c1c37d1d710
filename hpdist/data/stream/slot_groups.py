"""Row groups whose rows are given piece by piece in the order of a `SlotPlan`, without a copy."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.spill import Spill
from hpdist.data.stream.threads import Awaited
from hpdist.data.stream.wide import MOST_IN_32_BITS, joined, widened


class SlotGroup:
    """A row group's rows as they are stored."""

    def __init__(self, table: pa.Table, first_id: int, reason: str | None, spill: Spill) -> None:
        self.table = spill.keep(table, self)  # [rows]
        self.bytes = table.nbytes
        self.first_id = first_id
        self.reason = reason
        """Why it could not be read."""


class OpenGroup:
    """A row group that is being read, or was, and the pieces in whose order its rows come."""

    __slots__ = ("__weakref__", "places", "reading", "rows")

    def __init__(self, reading: Awaited[SlotGroup], pieces: tuple[list[int], list[int]]) -> None:
        self.reading = reading
        self.rows, self.places = pieces  # as `SlotPlan.pieces` gives them


@dataclass(frozen=True)
class Parts:
    """Rows at places [at, stop) of the orders of row groups; all are [parts]."""

    groups: Sequence[OpenGroup]
    epoch: Int64Array
    at: Int64Array
    stop: Int64Array


@dataclass(frozen=True)
class Laid:
    """Rows of parts, one behind the other."""

    table: pa.Table  # [rows], a chunk for each piece
    ids: Int64Array  # [rows]
    epochs: Int64Array  # [rows]
    reasons: np.ndarray[Any, Any] | None  # [rows], why each could not be read; None: all were


def laid(parts: Parts) -> Laid:
    """Wait for the rows of parts, and lay them end to end without a copy."""
    rows: list[int] = []
    places: list[int] = []
    ends: list[int] = []
    counts = []
    bounds = zip(parts.groups, parts.at.tolist(), parts.stop.tolist(), strict=True)
    for group, low, high in bounds:
        first = bisect_right(group.places, low) - 1
        last = bisect_left(group.places, high, first)
        rows += group.rows[first:last]
        places += group.places[first:last]
        ends += group.places[first + 1 : last + 1]
        counts.append(last - first)
    owner = np.repeat(np.arange(len(counts)), counts)
    begin = np.maximum(places, parts.at[owner])
    sizes = np.minimum(ends, parts.stop[owner]) - begin
    starts = begin - places + rows
    read = [group.reading.result() for group in parts.groups]
    pieces = zip(owner.tolist(), starts.tolist(), sizes.tolist(), strict=True)
    slices = [read[number].table.slice(start, size) for number, start, size in pieces]
    behind = np.cumsum(sizes)
    table = joined(slices)
    if sum(group.bytes for group in read) > MOST_IN_32_BITS:  # else it is not worth a closer look
        table = widened(table)
    ids = np.asarray([group.first_id for group in read])[owner] + starts
    rows_of_parts = parts.stop - parts.at
    reasons = [group.reason for group in read]
    return Laid(
        table,
        np.repeat(ids - behind + sizes, sizes) + np.arange(behind[-1]),
        np.repeat(parts.epoch, rows_of_parts),
        np.repeat(np.asarray(reasons, object), rows_of_parts) if any(reasons) else None,
    )
