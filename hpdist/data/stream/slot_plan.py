"""An order for many ranks: each slot of a global batch reads row groups that are its alone.

The row at position p of the endless sequence is the next one of lane p % `lanes`, as in
`hpdist.data.stream.plan`; but there are as many lanes as a global batch has rows, or a multiple or
a whole part of that, so that a rank, which takes a run of slots, reads what it uses and hardly
more, whatever the number of ranks. The rows of a row group are permuted, and a lane gives them one
by one. They are permuted in pieces of a few rows, so that a reader copies no row for it: what a
batch mixes are lanes, and rows of one piece come in as many batches.

An epoch's line of row groups is cut into equal lanes. Every other lane is read from its end, so
that the two lanes which share a cut row group read it at the same time: at the beginning of the
epoch or at its end. Only at the border of two ranks is it read twice.

The line is never laid out. The row groups are dealt to classes, as cards are to players; an epoch
permutes the classes, and the groups in a class. So a place in the line is found from the rows of
the classes, which are few, and those of one class's groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hpdist.data.stream.permute import Int64Array, chosen, shuffled
from hpdist.data.stream.plan import ENOUGH_GROUPS, MOST_LANES, USUAL_BUDGET

_CLASSES, _MEMBERS, _ROWS, _PIECES = 0x5C0, 0x5C1, 0x5C2, 0x5C3  # what one seed chooses differs
_MEMBERS_OF_A_CLASS = 256  # a place in the line costs a permutation of as many
_KEPT = 4096  # classes whose order is kept; each takes 4 KB
_PIECE = 32  # rows; to lay a piece out costs a tenth of what its rows cost
_GROUPS_OF_A_LANE = 10  # so that opening every lane reads at most a tenth of an epoch
_OPEN = 8  # times the memory budget that the open row groups of all lanes may take on one rank


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a lane that lie in one row group: turns `first` to `stop` of the lane."""

    epoch: int
    group: int
    first: int
    stop: int
    start: int
    """The place of its first row in the group's permuted rows."""


class SlotPlan:
    """The order of one dataset's rows.

    Args:
        group_rows: Rows of each row group, [groups], of any integer type; some may be 0.
        seed: Chooses the order.
        lanes: Parts of an epoch that are read side by side.
    """

    def __init__(self, group_rows: np.ndarray[Any, Any], seed: int, lanes: int) -> None:
        self.group_rows = group_rows
        self.seed = seed
        self.lanes = lanes
        self._classes = max(1, -(-len(group_rows) // _MEMBERS_OF_A_CLASS))
        self._totals = _class_totals(group_rows, self._classes)
        self.rows = int(self._totals.sum())
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._class = lru_cache(maxsize=_KEPT)(self._lay_out_class)

    def places(
        self, position: int, batch: int, start: int, stop: int
    ) -> tuple[Int64Array, Int64Array]:
        """Lanes and turns of rows [start, stop) of the global batch at `position`, both [rows].

        The batch is the next `batch` rows of the sequence, sorted by lane; a lane's turn counts its
        rows from the beginning of the first epoch.
        """
        turns, rest = divmod(batch, self.lanes)
        low = start // (turns + 1) if rest else start // turns  # no lane gives more rows
        high = min(self.lanes, stop // turns + 1) if turns else self.lanes
        lanes = np.arange(low, high)
        end = position + batch
        begin = self._below(end, lanes) - self._below(position, lanes)  # of a lane in the batch
        slots = np.arange(start, stop)
        at = np.searchsorted(begin, slots, side="right") - 1
        return lanes[at], self._before(position, lanes)[at] + slots - begin[at]

    def run_at(self, lane: int, turn: int) -> Run:
        """The run of a lane that holds its row of this turn."""
        epoch = (lane + turn * self.lanes) // self.rows
        origin = -((lane - epoch * self.rows) // self.lanes)  # the epoch's first turn of the lane
        begin, end = self._lane_start(epoch, lane), self._lane_start(epoch, lane + 1)
        backward = lane % 2 == 1
        line = end - 1 - (turn - origin) if backward else begin + turn - origin
        group, group_start = self._group_at(epoch, line)
        low = max(begin, group_start)
        high = min(end, group_start + int(self.group_rows[group]))
        first = origin + (end - high if backward else low - begin)
        return Run(epoch, group, first, first + high - low, low - group_start)

    def pieces(self, epoch: int, group: int) -> tuple[Int64Array, Int64Array]:
        """How a row group's rows are permuted, in pieces of rows that follow one another.

        The row at which each piece begins, and the place in the order at which it does, and the
        place behind the last one: [pieces] and [pieces + 1]. Where pieces begin differs from epoch
        to epoch.
        """
        rows = int(self.group_rows[group])
        first = 1 + chosen(_PIECE, self.seed, _PIECES, epoch, group)
        cuts = np.asarray([0, *range(first, rows, _PIECE), rows])
        order = shuffled(len(cuts) - 1, self.seed, _ROWS, epoch, group)
        places = np.zeros(len(cuts), np.int64)
        np.cumsum(np.diff(cuts)[order], out=places[1:])
        return cuts[order], places

    def _before(self, position: int, lanes: Int64Array) -> Int64Array:
        """How many positions before this one belong to each lane."""
        return -((lanes - position) // self.lanes)

    def _below(self, position: int, lanes: Int64Array) -> Int64Array:
        """How many positions before this one belong to lanes before each."""
        turns, rest = divmod(position, self.lanes)
        return turns * lanes + np.minimum(rest, lanes)

    def _group_at(self, epoch: int, line: int) -> tuple[int, int]:
        """The row group that holds a place of the epoch's line, and where in the line it begins."""
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, line, side="right"))
        start = int(ends[place] - self._totals[order[place]])
        groups, group_ends = self._class(epoch, int(order[place]))
        found = int(np.searchsorted(group_ends, line - start, side="right"))
        group = int(groups[found])
        return group, start + int(group_ends[found]) - int(self.group_rows[group])

    def _lay_out(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The order of the classes in an epoch, and where in its line each of them ends."""
        order = shuffled(self._classes, self.seed, _CLASSES, epoch)
        return order, np.cumsum(self._totals[order])

    def _lay_out_class(self, epoch: int, number: int) -> tuple[Int64Array, Int64Array]:
        """The order of a class's row groups in an epoch, and where each ends behind its start."""
        size = -(-(len(self.group_rows) - number) // self._classes)
        members = shuffled(size, self.seed, _MEMBERS, epoch, number)
        groups = number + self._classes * members
        return groups, np.cumsum(self.group_rows[groups], dtype=np.int64)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where in the epoch's line a lane begins; lanes take turns at having a row more."""
        share, rest = divmod(self.rows, self.lanes)
        first = epoch * self.rows % self.lanes  # it and the lanes after it have a row more
        wrapped = max(0, first + rest - self.lanes)
        return lane * share + min(lane, wrapped) + min(max(lane - first, 0), rest - wrapped)


def choose_slots(batch: int, groups: int, group_bytes: float, budget: int | None) -> int | None:
    """How many lanes a `SlotPlan` has for a global batch; None where `choose_lanes` serves better.

    A lane for every row of a global batch; several, which take turns, for every row of a small one,
    so that at least 128 row groups are mixed at a time; one for every 2, 3, … rows where the open
    row groups of one rank alone would be far more than its memory budget, which then keeps what
    does not fit in files. None for less than ten row groups a lane, and where windows have as many
    lanes. It does not depend on the number of ranks, so that the global batches do not.
    """
    limit = USUAL_BUDGET if budget is None else budget
    turns = -(-ENOUGH_GROUPS // batch)
    most = min(turns * batch, int(_OPEN * limit / max(group_bytes, 1)))
    if groups < _GROUPS_OF_A_LANE * turns * batch or most <= MOST_LANES:
        return None
    if most < batch:
        lanes = max(lanes for lanes in range(1, most + 1) if batch % lanes == 0)
    else:
        lanes = most // batch * batch
    return lanes if lanes > MOST_LANES else None


def _class_totals(group_rows: np.ndarray[Any, Any], classes: int) -> Int64Array:
    """Rows of every class, [classes]: group g is of class g % classes."""
    turns, rest = divmod(len(group_rows), classes)
    whole = group_rows[: turns * classes].reshape(turns, classes)
    totals = np.zeros(classes, np.int64)
    for row in whole:  # a sum over the first axis would make a copy of 8 bytes a group
        totals += row
    totals[:rest] += group_rows[turns * classes :]
    return totals
