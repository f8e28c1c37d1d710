"""Which runs of the lanes are open, found for all lanes at once: a loop over them costs far more.

What a lane has open are runs that follow one another, from the turn that it gave last, or a little
later, to the end of the last run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.slot_groups import OpenGroup, Parts
from hpdist.data.stream.slot_plan import Runs, SlotPlan

_IDLE = 16  # blocks, after which a lane that no row was taken from is let go

OpenGroups: TypeAlias = Callable[[Int64Array, Int64Array], Sequence[OpenGroup]]
"""Begins to read row groups, which epochs and numbers name, [groups] each."""


@dataclass(frozen=True)
class Turns:
    """Turns `first` to `stop` of lanes; all are [lanes]."""

    lane: Int64Array  # sorted
    first: Int64Array
    stop: Int64Array

    def and_as_many(self) -> Turns:
        """Give them and the next ones."""
        return Turns(self.lane, self.first, 2 * self.stop - self.first)


class OpenRuns:
    """The runs that are open, in the order of lanes and turns.

    Args:
        plan: Whose lanes they are of.
        open_groups: Called for the row groups of runs as these are opened.
    """

    def __init__(self, plan: SlotPlan, open_groups: OpenGroups) -> None:
        self._plan = plan
        self._open_groups = open_groups
        self._runs = Runs(*[np.empty(0, np.int64)] * 6)
        self._groups = np.empty(0, object)  # of each run
        self._since = np.zeros(plan.lanes, np.int64)  # of each lane, the first turn that is open
        self._until = np.zeros(plan.lanes, np.int64)  # and the one behind the last
        self._used = np.zeros(plan.lanes, np.int64)  # the block that last took a row from a lane
        self._blocks = 0

    def open(self, turns: Turns) -> None:
        """Have the row groups of these turns read."""
        lane = turns.lane
        self._used[lane] = self._blocks
        jump = (turns.first < self._since[lane]) | (turns.first > self._until[lane])
        jumped = lane[jump]
        self._since[jumped] = self._until[jumped] = turns.first[jump]
        found = []
        while (short := self._until[lane] < turns.stop).any():
            runs = self._plan.runs_at(lane[short], self._until[lane[short]])
            self._since[runs.lane] = np.minimum(self._since[runs.lane], runs.first)
            self._until[runs.lane] = runs.stop
            found.append(runs)
        if found:
            kept = ~np.isin(self._runs.lane, jumped) if len(jumped) else slice(None)
            self._add(Runs.joined(found), kept)

    def parts(self, turns: Turns) -> Parts:
        """What the runs hold of turns that are open, in the order of lanes and turns."""
        runs = self._runs
        first, stop = np.zeros((2, self._plan.lanes), np.int64)  # no turn of the other lanes
        first[turns.lane], stop[turns.lane] = turns.first, turns.stop
        begin = np.maximum(runs.first, first[runs.lane])
        end = np.minimum(runs.stop, stop[runs.lane])
        used = np.flatnonzero(begin < end)
        before = runs.start - runs.first
        return Parts(
            self._groups[used].tolist(),
            runs.epoch[used],
            (before + begin)[used],
            (before + end)[used],
        )

    def let_go(self, turns: Turns, batch: int) -> None:
        """Let go of the runs that lanes have passed with these turns, and of lanes not used."""
        self._blocks += 1
        runs = self._runs
        passed = np.zeros(self._plan.lanes, np.int64)
        passed[turns.lane] = turns.stop
        self._since[turns.lane] = np.maximum(self._since[turns.lane], turns.stop)
        kept = runs.stop > passed[runs.lane]
        most = _IDLE * max(1, self._plan.lanes // batch)  # lanes take turns
        idle = self._blocks - self._used[runs.lane] > most
        self._since[runs.lane[idle]] = self._until[runs.lane[idle]] = 0
        kept &= ~idle
        if not kept.all():
            self._runs, self._groups = runs.where(kept), self._groups[kept]

    def _add(self, runs: Runs, kept: Any) -> None:
        """Add runs, which come behind those of their lanes that are kept."""
        groups = np.empty(len(runs.lane), object)
        groups[:] = self._open_groups(runs.epoch, runs.group)
        both = Runs.joined([self._runs.where(kept), runs])
        order = np.argsort(both.lane, kind="stable")
        self._runs = both.where(order)
        self._groups = np.concatenate([self._groups[kept], groups])[order]
