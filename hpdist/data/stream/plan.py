"""Which rows make a global batch, by arithmetic alone: nothing here reads, and nothing knows ranks.

An epoch permutes the row groups and lays their rows end to end. That line is cut into `lanes` equal
parts, each lane into windows of a few consecutive row groups, and the rows of a window are mixed.
The sequence of all epochs takes a row from each lane in turn: the row at position p is the next one
of lane p % lanes. It has no gap between epochs, so one integer, the position, says where a run is.
A global batch is the next rows of that sequence, sorted by lane, so that a rank, which takes a run
of them, reads few lanes; where `lanes` divides the batch, always the same ones.

This is the order of small datasets and batches, and of runs that began with it; many ranks have
that of `hpdist.data.stream.slot_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from hpdist.data.stream.permute import Int64Array, permutation

_GROUPS, _ROWS = 0x6E0, 0x80  # the two permutations of one seed must differ
MOST_LANES = 64
USUAL_LANES = 16
LANE_ROWS = 28  # of a large batch, from each lane: more lanes for more ranks to share
ENOUGH_GROUPS = 128  # row groups; 64 rows drawn of as many come from 50 different ones
USUAL_GROUPS = 8  # in a window: one costs the same time whatever it holds
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
        lanes, end = self.lanes, position + batch
        lane = start // (batch // lanes + 1)  # no lane gives more, so it begins before `start`
        begin = self._below(end, lane) - self._below(position, lane)  # of the lane in the batch
        found = []
        while lane < lanes and begin < stop:
            low, high = self._before(position, lane), self._before(end, lane)
            left, right = low + max(start - begin, 0), min(high, low + stop - begin)
            while left < right:  # of a small dataset, in several epochs
                epoch = (lane + left * lanes) // self.rows
                origin = self._before(epoch * self.rows, lane)
                last = min(right, self._before((epoch + 1) * self.rows, lane))
                found.append(Piece(epoch, lane, left - origin, last - origin))
                left = last
            begin += high - low
            lane += 1
        return found

    def _before(self, position: int, lane: int) -> int:
        """How many positions before this one belong to a lane."""
        return -((lane - position) // self.lanes)

    def _below(self, position: int, lane: int) -> int:
        """How many positions before this one belong to lanes before this one."""
        turns, rest = divmod(position, self.lanes)
        return turns * lane + min(rest, lane)

    def lane_rows(self, epoch: int, lane: int) -> int:
        """Rows of a lane in an epoch: lanes take turns at the one that some have more."""
        return self._lane_start(epoch, lane + 1) - self._lane_start(epoch, lane)

    def window_at(self, epoch: int, lane: int, offset: int) -> Window:
        """The window that holds row `offset` of a lane."""
        order, ends = self._epoch(epoch)
        start = self._lane_start(epoch, lane)
        stop = self._lane_start(epoch, lane + 1)
        first, last = _group_at(ends, start), _group_at(ends, stop - 1)
        number = (_group_at(ends, start + offset) - first) // self.groups_per_window
        low = first + number * self.groups_per_window
        high = min(low + self.groups_per_window - 1, last)
        segments = []
        for place in range(low, high + 1):
            group = int(order[place])
            group_start = int(ends[place]) - int(self.group_rows[group])
            begin = max(start, group_start) - group_start
            end = min(stop, int(ends[place])) - group_start
            if begin < end:
                segments.append(Segment(group, begin, end))
        group_start = int(ends[low]) - int(self.group_rows[order[low]])
        return Window(epoch, lane, number, max(start, group_start) - start, tuple(segments))

    def after(self, window: Window) -> Window:
        """The lane's next window, in a later epoch if need be."""
        epoch, lane = window.epoch, window.lane
        end = window.start + window.rows
        while end == self.lane_rows(epoch, lane):  # of few rows, a lane may have none in an epoch
            epoch, end = epoch + 1, 0
        return self.window_at(epoch, lane, end)

    def row_order(self, window: Window) -> Int64Array:
        """The order in which a window's rows come, as places in its segments laid end to end."""
        return permutation(window.rows, self.seed, _ROWS, window.epoch, window.lane, window.number)

    def _lay_out(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The order of the row groups in an epoch, and where in its line each of them ends."""
        order = permutation(len(self.group_rows), self.seed, _GROUPS, epoch)
        return order, np.cumsum(self.group_rows[order], dtype=np.int64)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where in the epoch's line a lane begins."""
        share, rest = divmod(self.rows, self.lanes)
        first = epoch * self.rows % self.lanes  # it and the lanes after it have a row more
        wrapped = max(0, first + rest - self.lanes)
        return lane * share + min(lane, wrapped) + min(max(lane - first, 0), rest - wrapped)


def _group_at(ends: Int64Array, row: int) -> int:
    """Which of the groups that end there holds a row of the line."""
    return int(np.searchsorted(ends, row, side="right"))


def choose_lanes(
    batch: int, groups: int, group_bytes: float, budget: int | None
) -> tuple[int, int]:
    """Lanes and row groups per window for a global batch size and a memory budget in bytes.

    The budget covers two windows of every lane, the one in use and the one being read. Lanes come
    first, since a batch then draws from more places, and more of them for a large batch, which many
    ranks share; whole parts of a global batch are preferred, so that every lane gives the same
    number of rows to each. Windows then fill the budget; without one they grow to `USUAL_GROUPS`,
    or until `ENOUGH_GROUPS` row groups are mixed at a time, within `USUAL_BUDGET`. Neither lanes
    nor windows depend on the number of ranks.
    """
    limit = USUAL_BUDGET if budget is None else budget
    group_bytes = max(group_bytes, 1)
    wanted = min(MOST_LANES, max(USUAL_LANES, batch // LANE_ROWS))
    most = int(min(wanted, batch, groups, max(1, limit // (2 * group_bytes))))
    divisor = max(lanes for lanes in range(1, most + 1) if batch % lanes == 0)
    lanes = divisor if 2 * divisor > most else most
    fitting = int(limit // (2 * lanes * group_bytes))
    if budget is None:
        fitting = min(fitting, max(USUAL_GROUPS, -(-ENOUGH_GROUPS // lanes)))
    return lanes, max(1, min(fitting, -(-groups // lanes)))
