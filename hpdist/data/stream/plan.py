"""Which rows make a global batch, by arithmetic alone: nothing here reads, and nothing knows ranks.

An epoch permutes the row groups and lays their rows end to end. That line is cut into `lanes` equal
parts, each lane into windows of a few consecutive row groups, and the rows of a window are mixed.
The sequence of all epochs takes a row from each lane in turn: the row at position p is the next one
of lane p % lanes. It has no gap between epochs, so one integer, the position, says where a run is.
A global batch is the next rows of that sequence, sorted by lane, so that a rank, which takes a run
of them, reads few lanes; where `lanes` divides the batch, always the same ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
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
        spans = list(self._spans(position, batch))
        if len(spans) == 1:
            return self._pieces_of_one(spans[0][0], position, batch, start, stop)
        epochs = [epoch for epoch, _, _ in spans]
        bounds = np.asarray([(first, last) for _, first, last in spans])  # [spans, 2]
        origins = np.asarray(epochs)[:, None] * self.rows
        lanes = np.arange(self.lanes)[:, None, None]
        rows = self._before(bounds, lanes) - self._before(origins, lanes)  # [lanes, spans, 2]
        low, high = rows.reshape(-1, 2).T
        end = np.cumsum(high - low)  # in the global batch
        begin = end - (high - low)
        left = low + np.maximum(start - begin, 0)
        right = high - np.maximum(end - stop, 0)
        held = np.flatnonzero(left < right)
        where = zip(held.tolist(), left[held].tolist(), right[held].tolist(), strict=True)
        return [
            Piece(epochs[place % len(spans)], place // len(spans), first, last)
            for place, first, last in where
        ]

    def _pieces_of_one(
        self, epoch: int, position: int, batch: int, start: int, stop: int
    ) -> list[Piece]:
        """The same within one epoch, lane by lane: few lanes are sooner done than NumPy is called.

        Every lane gives `share` rows, and the `rest` lanes from that of `position` on one more.
        """
        lanes, origin = self.lanes, epoch * self.rows
        share, rest = divmod(batch, lanes)
        first = position % lanes
        wrapped = max(0, first + rest - lanes)  # of the lanes with one more, those from 0 on
        lane = max(0, (start - rest) // (share + 1)) if share else 0
        found = []
        while lane < lanes:
            begin = lane * share + min(lane, wrapped) + min(max(lane - first, 0), rest - wrapped)
            if begin >= stop:
                break
            rows = share + (lane < wrapped or first <= lane < first + rest - wrapped)
            left, right = max(start - begin, 0), min(stop - begin, rows)
            if left < right:
                low = (lane - origin) // lanes - (lane - position) // lanes
                found.append(Piece(epoch, lane, low + left, low + right))
            lane += 1
        return found

    def _before(self, positions: Int64Array, lanes: Int64Array) -> Int64Array:
        """How many positions before each of these belong to each lane."""
        counts: Int64Array = -((lanes - positions) // self.lanes)  # ceil((position - lane) / lanes)
        return counts

    def _spans(self, position: int, batch: int) -> Iterator[tuple[int, int, int]]:
        """The epochs that a global batch takes rows of, and from where to where."""
        end = position + batch
        while position < end:
            epoch = position // self.rows
            last = min((epoch + 1) * self.rows, end)
            yield epoch, position, last
            position = last

    def lane_rows(self, epoch: int, lane: int) -> int:
        """Rows of a lane in an epoch: lanes take turns at the one that some have more."""
        return self._lane_start(epoch, lane + 1) - self._lane_start(epoch, lane)

    def window_at(self, epoch: int, lane: int, offset: int) -> Window:
        """The window that holds row `offset` of a lane."""
        order, ends = self._epoch(epoch)
        start = self._lane_start(epoch, lane)
        stop = self._lane_start(epoch, lane + 1)
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        number = (bisect_right(ends, start + offset) - first) // self.groups_per_window
        low = first + number * self.groups_per_window
        high = min(low + self.groups_per_window - 1, last)
        segments = []
        for place in range(low, high + 1):
            group = int(order[place])
            group_start = ends[place] - int(self.group_rows[group])
            begin = max(start, group_start) - group_start
            end = min(stop, ends[place]) - group_start
            if begin < end:
                segments.append(Segment(group, begin, end))
        group_start = ends[low] - int(self.group_rows[order[low]])
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

    def _lay_out(self, epoch: int) -> tuple[Int64Array, list[int]]:
        """The order of the row groups in an epoch, and where in its line each of them ends."""
        order = permutation(len(self.group_rows), self.seed, _GROUPS, epoch)
        return order, np.cumsum(self.group_rows[order]).tolist()

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where in the epoch's line a lane begins."""
        share, rest = divmod(self.rows, self.lanes)
        first = epoch * self.rows % self.lanes  # it and the lanes after it have a row more
        wrapped = max(0, first + rest - self.lanes)
        return lane * share + min(lane, wrapped) + min(max(lane - first, 0), rest - wrapped)


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
