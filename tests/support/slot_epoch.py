"""Follows the order of an epoch rank by rank, by arithmetic alone: what each of many would read."""

from __future__ import annotations

import numpy as np

from hpdist.data.stream.slot_plan import Runs, SlotPlan

GROUP_ROWS = 1000


def uneven_groups(count: int) -> np.ndarray:
    """Rows of so many row groups: 1,000 but for the last of each file, every 25th."""
    rows = np.full(count, GROUP_ROWS, np.uint32)
    rows[24::25] = np.random.default_rng(0).integers(1, GROUP_ROWS + 1, len(rows[24::25]))
    return rows


class Epoch:
    """The runs of all lanes in the first epoch, in the order of the lanes."""

    def __init__(self, plan: SlotPlan) -> None:
        lanes = np.arange(plan.lanes)
        turns, ends = np.zeros_like(lanes), -((lanes - plan.rows) // plan.lanes)
        found = []
        while len(lanes):
            found.append(plan.runs_at(lanes, turns))
            more = found[-1].stop < ends
            lanes, turns, ends = lanes[more], found[-1].stop[more], ends[more]
        runs = Runs.joined(found)
        runs = runs.where(np.lexsort((runs.first, runs.lane)))
        self.plan = plan
        self.groups = runs.group
        self.rows = runs.stop - runs.first
        self.starts = np.searchsorted(runs.lane, np.arange(plan.lanes + 1))

    def ratio(self, batch: int, rank: int, ranks: int) -> float:
        """Rows that a rank reads for each row it uses; lanes side by side share a row group."""
        start, stop = rank * batch // ranks, (rank + 1) * batch // ranks
        share = batch // self.plan.lanes  # slots of a lane
        low, high = self.starts[start // share], self.starts[-(-stop // share)]
        read = self.plan.group_rows[np.unique(self.groups[low:high])].sum(dtype=np.int64)
        return float(read / (self.plan.rows * (stop - start) / batch))
