"""Which rows make a global batch, by arithmetic alone: nothing here reads, and nothing knows ranks.

An epoch permutes the row groups and lays their rows end to end. That line is cut into `lanes` equal
parts, each lane into windows of a few consecutive row groups, and the rows of a window are mixed.
The epoch's sequence takes a row from each lane in turn: its row i is row i // lanes of lane
i % lanes. Epochs follow one another without a gap, so one integer, the position, says where a run
is. A global batch is the next rows of that sequence, sorted by lane, so that a rank, which takes a
run of them, has to read few lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from hpdist.data.stream.permute import Int64Array, permutation

_GROUPS, _ROWS = 0x6E0, 0x80  # the two permutations of one seed must differ
MOST_LANES = 64
ENOUGH_GROUPS = 128  # row groups; 64 rows drawn of as many come from 50 different ones
USUAL_BUDGET = 512 * 2**20  # bytes


class Piece(NamedTuple):
    """Rows `start` to `stop` of one lane in one epoch."""

    epoch: int
    lane: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of one row group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Consecutive rows of a lane that are mixed with one another."""

    epoch: int
    lane: int
    number: int
    start: int  # in the lane
    segments: tuple[Segment, ...]

    @cached_property
    def rows(self) -> int:
        """How many rows it holds."""
        return sum(segment.stop - segment.start for segment in self.segments)


class Plan:
    """The order of one dataset's rows.

    Args:
        group_rows: Rows of each row group, [groups], of which some may be 0.
        seed: Chooses the order.
        lanes: Parts of an epoch that are read side by side.
        groups_per_window: Row groups that are mixed with one another within a lane.
    """

    def __init__(
        self, group_rows: Int64Array, seed: int, lanes: int, groups_per_window: int
    ) -> None:
        self.group_rows = group_rows
        self.seed = seed
        self.lanes = lanes
        self.groups_per_window = groups_per_window
        self.rows = int(group_rows.sum())
        self._epoch = lru_cache(maxsize=3)(self._lay_out)

    def pieces(self, position: int, batch: int, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop) of the global batch of `batch` rows that begins at `position`."""
        spans = list(self._spans(position, batch))
        bounds = np.asarray([(first, last) for _, first, last in spans])  # [spans, 2]
        lanes = np.arange(self.lanes)[:, None, None]
        rows = -((lanes - bounds) // self.lanes)  # ceil((bound - lane) / lanes), [lanes, spans, 2]
        low, high = rows.reshape(-1, 2).T
        end = np.cumsum(high - low)  # in the global batch
        begin = end - (high - low)
        left = low + np.maximum(start - begin, 0)
        right = high - np.maximum(end - stop, 0)
        held = np.flatnonzero(left < right)
        where = zip(held.tolist(), left[held].tolist(), right[held].tolist(), strict=True)
        return [
            Piece(spans[place % len(spans)][0], place // len(spans), first, last)
            for place, first, last in where
        ]

    def _spans(self, position: int, batch: int) -> Iterator[tuple[int, int, int]]:
        """The epochs that a global batch takes rows of, and which rows of their sequences."""
        end = position + batch
        while position < end:
            epoch, first = divmod(position, self.rows)
            last = min(self.rows, first + end - position)
            yield epoch, first, last
            position += last - first

    def lane_rows(self, lane: int) -> int:
        """Rows of a lane in every epoch."""
        return -(-(self.rows - lane) // self.lanes)

    def window_at(self, epoch: int, lane: int, offset: int) -> Window:
        """The window that holds row `offset` of a lane."""
        order, ends = self._epoch(epoch)
        first, last = self._lane_groups(ends, lane)
        group = int(np.searchsorted(ends, self._lane_start(lane) + offset, side="right"))
        number = (group - first) // self.groups_per_window
        return self._window(epoch, lane, number, order, ends, first, last)

    def after(self, window: Window) -> Window:
        """The lane's next window, in the next epoch if need be."""
        end = window.start + window.rows
        if end < self.lane_rows(window.lane):
            return self.window_at(window.epoch, window.lane, end)
        return self.window_at(window.epoch + 1, window.lane, 0)

    def row_order(self, window: Window) -> Int64Array:
        """The order in which a window's rows come, as places in its segments laid end to end."""
        return permutation(window.rows, self.seed, _ROWS, window.epoch, window.lane, window.number)

    def _lay_out(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The order of the row groups in an epoch, and where in its line each of them ends."""
        order = permutation(len(self.group_rows), self.seed, _GROUPS, epoch)
        return order, np.cumsum(self.group_rows[order])

    def _lane_start(self, lane: int) -> int:
        share, rest = divmod(self.rows, self.lanes)
        return lane * share + min(lane, rest)

    def _lane_groups(self, ends: Int64Array, lane: int) -> tuple[int, int]:
        """The first and last place in the order of groups that a lane has rows of."""
        start, stop = self._lane_start(lane), self._lane_start(lane + 1)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return int(first), int(last)

    def _window(
        self,
        epoch: int,
        lane: int,
        number: int,
        order: Int64Array,
        ends: Int64Array,
        first: int,
        last: int,
    ) -> Window:
        lane_start, lane_stop = self._lane_start(lane), self._lane_start(lane + 1)
        low = first + number * self.groups_per_window
        high = min(low + self.groups_per_window - 1, last)
        segments = []
        for place in range(low, high + 1):
            group = int(order[place])
            group_start = int(ends[place]) - int(self.group_rows[group])
            start = max(lane_start, group_start) - group_start
            stop = min(lane_stop, int(ends[place])) - group_start
            if start < stop:
                segments.append(Segment(group, start, stop))
        group_start = int(ends[low]) - int(self.group_rows[order[low]])
        return Window(
            epoch, lane, number, max(lane_start, group_start) - lane_start, tuple(segments)
        )


def choose_lanes(
    batch: int, groups: int, group_bytes: float, budget: int | None
) -> tuple[int, int]:
    """Lanes and row groups per window for a global batch size and a memory budget in bytes.

    The budget covers two windows of every lane, the one in use and the one being read. As many
    lanes as fit come first, since a batch then draws from the most places; whole parts of a global
    batch are preferred, so that every lane gives the same number of rows to each. Windows then fill
    the budget; without one they grow until `ENOUGH_GROUPS` row groups are mixed at a time, within
    `USUAL_BUDGET`. Neither lanes nor windows depend on the number of ranks.
    """
    limit = USUAL_BUDGET if budget is None else budget
    group_bytes = max(group_bytes, 1)
    most = int(min(MOST_LANES, batch, groups, max(1, limit // (2 * group_bytes))))
    divisor = max(lanes for lanes in range(1, most + 1) if batch % lanes == 0)
    lanes = divisor if 2 * divisor > most else most
    fitting = int(limit // (2 * lanes * group_bytes))
    if budget is None:
        fitting = min(fitting, -(-ENOUGH_GROUPS // lanes))
    return lanes, max(1, min(fitting, -(-groups // lanes)))
