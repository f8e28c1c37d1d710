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

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from hpdist.data.stream.permute import Int64Array, all_shuffled, chosen, keys_of, shuffled
from hpdist.data.stream.plan import ENOUGH_GROUPS, MOST_LANES, USUAL_BUDGET

_CLASSES, _MEMBERS, _ROWS, _PIECES = 0x5C0, 0x5C1, 0x5C2, 0x5C3  # what one seed chooses differs
_MEMBERS_OF_A_CLASS = 256  # a place in the line costs a permutation of as many
_KEPT = 4096  # classes whose order is kept; each takes 4 KB
_PIECE = 32  # rows; to lay a piece out costs a tenth of what its rows cost
_GROUPS_OF_A_LANE = 10  # so that opening every lane reads at most a tenth of an epoch
_OPEN = 8  # times the memory budget that the open row groups of all lanes may take on one rank


class Runs(NamedTuple):
    """Consecutive rows of a lane that lie in one row group, of many lanes; all are [runs]."""

    lane: Int64Array
    epoch: Int64Array
    group: Int64Array
    first: Int64Array  # the turn of the lane at which a run begins
    stop: Int64Array  # the turn behind it
    start: Int64Array  # the place of its first row in the group's permuted rows

    def where(self, chosen: np.ndarray[Any, Any]) -> Runs:
        """Some of them, in any order."""
        return Runs(*(part[chosen] for part in self))

    @staticmethod
    def joined(runs: Sequence[Runs]) -> Runs:
        """Put runs one behind the other."""
        return Runs(*(np.concatenate(parts) for parts in zip(*runs, strict=True)))


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
        self, position: int, batch: int, start: int, stop: int, batches: int = 1
    ) -> tuple[Int64Array, Int64Array]:
        """Lanes and turns of rows [start, stop) of the global batch at `position`, both [rows].

        The batch is the next `batch` rows of the sequence, sorted by lane; a lane's turn counts its
        rows from the beginning of the first epoch. Of several batches that follow one another, the
        rows come one behind the other: [batches * rows].
        """
        begin = position + batch * np.arange(batches)[:, None]
        (turns, rest), (end_turns, end_rest) = (
            np.divmod(at, self.lanes) for at in (begin, begin + batch)
        )
        each = end_turns - turns  # rows of a lane; of lanes `low` to `high` one more, or one less
        low, high = np.minimum(rest, end_rest), np.maximum(rest, end_rest)
        between = each + np.where(end_rest > rest, 1, -1)
        slots = np.arange(start, stop)[None]
        behind_low = slots - each * low
        behind_high = behind_low - between * (high - low)
        lanes = np.where(behind_low < 0, slots, 0) // np.maximum(each, 1)
        lanes += np.where(behind_low >= 0, low + behind_low // np.maximum(between, 1), 0)
        lanes = np.where(behind_high >= 0, high + behind_high // np.maximum(each, 1), lanes)
        first = each * lanes + np.minimum(end_rest, lanes) - np.minimum(rest, lanes)
        before = -((lanes - begin) // self.lanes)  # positions of the lane before the batch
        return lanes.reshape(-1), (before + slots - first).reshape(-1)

    def runs_at(self, lanes: Int64Array, turns: Int64Array) -> Runs:
        """The runs of lanes that hold their rows of these turns, both [runs]."""
        epochs = (lanes + turns * self.lanes) // self.rows
        origin = -((lanes - epochs * self.rows) // self.lanes)  # an epoch's first turn of a lane
        begin, end = self._lane_starts(epochs, lanes), self._lane_starts(epochs, lanes + 1)
        backward = lanes % 2 == 1
        lines = np.where(backward, end - 1 - (turns - origin), begin + turns - origin)
        groups, starts = self._groups_at(epochs, lines)
        low, high = np.maximum(begin, starts), np.minimum(end, starts + self.group_rows[groups])
        first = origin + np.where(backward, end - high, low - begin)
        return Runs(lanes, epochs, groups, first, first + high - low, low - starts)

    def pieces(self, epochs: Int64Array, groups: Int64Array) -> list[tuple[list[int], list[int]]]:
        """How the rows of row groups are permuted, in pieces of rows that follow one another.

        For each group, the row at which each piece begins, and the place in the order at which it
        does, and the place behind the last one: [pieces] and [pieces + 1]. Where pieces begin
        differs from epoch to epoch.
        """
        rows = self.group_rows[groups].astype(np.int64)
        first = 1 + chosen(_PIECE, keys_of((self.seed, _PIECES), epochs, groups))
        counts = 1 + np.maximum(-((first - rows) // _PIECE), 0)
        ends = np.cumsum(counts)
        owner = np.repeat(np.arange(len(groups)), counts)
        order = all_shuffled(counts, keys_of((self.seed, _ROWS), epochs, groups))
        behind = first[owner] + _PIECE * order  # where each piece ends, but for the last one
        starts = np.where(order == 0, 0, behind - _PIECE)
        places = np.cumsum(np.minimum(behind, rows[owner]) - starts) - np.repeat(
            np.cumsum(rows) - rows, counts
        )
        known, behind_places = starts.tolist(), places.tolist()
        return [
            (known[end - count : end], [0, *behind_places[end - count : end]])
            for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
        ]

    def _groups_at(self, epochs: Int64Array, lines: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The row groups that hold places of the epochs' lines, and where there each begins."""
        groups, starts = np.empty(len(lines), np.int64), np.empty(len(lines), np.int64)
        for number, (epoch, line) in enumerate(zip(epochs.tolist(), lines.tolist(), strict=True)):
            order, ends = self._epoch(epoch)
            place = ends.searchsorted(line, side="right")
            known, behind = self._class(epoch, int(order[place]))
            start = int(ends[place - 1]) if place else 0
            found = behind.searchsorted(line - start, side="right")
            groups[number] = known[found]
            starts[number] = start + behind[found - 1] if found else start
        return groups, starts

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

    def _lane_starts(self, epochs: Int64Array, lanes: Int64Array) -> Int64Array:
        """Where in the epochs' lines lanes begin; lanes take turns at having a row more."""
        share, rest = divmod(self.rows, self.lanes)
        first = epochs * self.rows % self.lanes  # it and the lanes after it have a row more
        wrapped = np.maximum(0, first + rest - self.lanes)
        more = np.minimum(np.maximum(lanes - first, 0), rest - wrapped)
        starts: Int64Array = lanes * share + np.minimum(lanes, wrapped) + more
        return starts


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
