"""The rows of several batches that follow one another, gathered at once.

Every lane gives a row at a time, each from another row group, and to gather rows one by one costs
far more than to copy them. So a few slices of every lane are laid end to end, and the rows of a
batch are taken from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.stream.open_runs import OpenRuns, Turns
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.slot_groups import Laid, laid


@dataclass(frozen=True)
class Call:
    """What a reader is asked for: rows [start, stop) of the global batch at a position."""

    position: int
    batch: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def later(self, batches: int) -> Call:
        """Give the same rows of a later batch."""
        return Call(self.position + batches * self.batch, self.batch, self.start, self.stop)


@dataclass(frozen=True)
class Block:
    """The rows of some calls that follow one another: which turns of lanes they are."""

    first: Call
    batches: int
    turns: Turns
    lines: Int64Array  # [batches * rows], places in the turns laid end to end; of a batch, sorted

    @staticmethod
    def of(first: Call, batches: int, lanes: Int64Array, turns: Int64Array) -> Block:
        """Find it from the lane and turn of each row, [batches * rows]."""
        low = int(lanes.min())
        own = lanes - low
        begin, end = np.zeros((2, int(own.max()) + 1), np.int64)
        end[own] = turns + 1  # of several the last one stays, and so the first of all backwards
        begin[own[::-1]] = turns[::-1]
        sizes = end - begin
        present = np.flatnonzero(sizes)
        lines = (np.cumsum(sizes) - sizes - begin)[own] + turns
        return Block(first, batches, Turns(low + present, begin[present], end[present]), lines)

    def number(self, call: Call) -> int | None:
        """Which of its batches a call asks for."""
        number, rest = divmod(call.position - self.first.position, call.batch)
        known = not rest and 0 <= number < self.batches and call == self.first.later(number)
        return number if known else None

    def gathered(self, runs: OpenRuns) -> Gathered:
        """Wait for the rows, and lay them end to end."""
        rows = laid(runs.parts(self.turns))
        ordered = self.batches == 1 and len(self.lines) == len(rows.ids)
        return Gathered(self, ordered, rows, rows.table if ordered else rows.table.combine_chunks())


@dataclass(frozen=True)
class Gathered:
    """The rows of a block, laid end to end."""

    block: Block
    ordered: bool
    """Whether they are laid as they come, in the one batch that there is."""
    rows: Laid
    table: pa.Table  # [rows], of one chunk unless they are ordered

    def batch(self, number: int) -> Rows:
        """Give a batch: a copy, so that nobody holds the block's memory, which the next one takes.

        The allocator gives memory back to the system that is not used again at once, and to have
        it anew costs as much as to copy the rows.
        """
        count = self.block.first.rows
        lines = self.block.lines[number * count : (number + 1) * count]
        table = self.table if self.ordered else self.table.take(pa.array(lines))
        unread: dict[int, str] = {}
        if self.rows.reasons is not None:
            found = enumerate(self.rows.reasons[lines].tolist())
            unread = {line: reason for line, reason in found if reason is not None}
        return Rows(table, self.rows.ids[lines], self.rows.epochs[lines], unread)
