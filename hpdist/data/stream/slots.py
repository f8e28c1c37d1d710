"""Reads the rows of a Parquet dataset in the order of a `SlotPlan`, a few batches at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpdist.data.files.open import Retry, is_remote
from hpdist.data.stream.index import Index
from hpdist.data.stream.open_runs import OpenRuns
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.plan import USUAL_BUDGET
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.segments import Segments
from hpdist.data.stream.slot_blocks import Block, Call, Gathered
from hpdist.data.stream.slot_groups import OpenGroup, SlotGroup
from hpdist.data.stream.slot_plan import SlotPlan
from hpdist.data.stream.spill import Spill
from hpdist.data.stream.threads import Awaited, reading_threads
from hpdist.data.stream.wide import widened

KIND = "parquet-slots"
"""What a checkpoint calls this order."""

_PATIENCE = 2.0  # seconds that closing waits for a read that heeds no stop
_BLOCK_ROWS = 16384  # that a block has at most, but one batch at least
_GROUP_PART = 4  # of a row group that a block takes, so that a lane has one or two of them open
_BLOCK_PART = 4  # of the memory budget that a block may take; two are in memory at a time


class SlotReader:
    """The rows of a Parquet dataset, exactly once an epoch, on any number of ranks.

    Args:
        index: Of the dataset.
        columns: Which of them are read.
        name: Of the dataset, for messages.
        seed: Chooses the order.
        lanes: See `choose_slots`.
        budget: Bytes of rows that are kept in memory; what the open row groups take beyond it is
            kept in a file. None: 512 MiB.
        retry: How long a server may fail.
        stop: Set by whoever closes the stream, so that no read is waited for.
    """

    def __init__(
        self,
        index: Index,
        columns: Sequence[str],
        name: str,
        seed: int,
        lanes: int,
        *,
        budget: int | None = None,
        retry: Retry | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._index = index
        self._plan = SlotPlan(index.rows, seed, lanes)
        self._stop = stop or threading.Event()
        limit = USUAL_BUDGET if budget is None else budget
        index.check_sizes(limit, name)
        self._segments = Segments(index, columns, name, retry or Retry(), self._stop, limit)
        self.spill = Spill(limit - 2 * limit // _BLOCK_PART, name)
        row_bytes = index.bytes / max(self._plan.rows, 1)
        self._block_rows = min(_BLOCK_ROWS, int(limit / _BLOCK_PART / max(row_bytes, 1)))
        self._most_batches = self._plan.rows // len(index.rows) // _GROUP_PART
        self._groups: weakref.WeakValueDictionary[tuple[int, int], OpenGroup]
        self._groups = weakref.WeakValueDictionary()  # lanes that share one hold the same
        self._runs = OpenRuns(self._plan, self._open)
        self._block: Gathered | None = None
        self._ahead: Block | None = None  # what was prepared
        self._batches = 1  # of the next block: more, the longer calls follow one another
        self._threads = reading_threads(any(is_remote(file.path) for file in index.files))

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self._plan.rows

    def order(self) -> dict[str, Any]:
        """Lanes, seed and the fingerprint of the files."""
        return {
            "kind": KIND,
            "seed": self._plan.seed,
            "rows": self._plan.rows,
            "lanes": self._plan.lanes,
            "fingerprint": self._index.fingerprint,
        }

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch at `position`."""
        call = Call(position, batch, start, stop)
        if start == stop:
            none = np.empty(0, np.int64)
            return Rows(self._segments.schema.empty_table(), none, none)
        gathered = self._block_with(call)
        number = gathered.block.number(call) or 0
        if number == gathered.block.batches - 1:
            self._batches = 2 * gathered.block.batches
        return gathered.batch(number)

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Open the row groups of these rows, and of the ones after them."""
        call = Call(position, batch, start, stop)
        known = None if self._block is None else self._block.block
        if start == stop or (known is not None and known.number(call) is not None):
            return
        most = max(1, min(self._block_rows // (stop - start), self._most_batches))
        follows = known is not None and call == known.first.later(known.batches)
        self._batches = min(self._batches, most) if follows else 1
        self._ahead = self._begin(call, self._batches)

    def resume_point(self, position: int) -> None:
        """Nothing: the position says it all."""
        return

    def describe(self, row: int) -> str:
        """Name file, row group and row."""
        return self._index.describe(row)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        for opened in list(self._groups.values()):
            opened.reading.cancel()
        self._runs = OpenRuns(self._plan, self._open)
        self._block = self._ahead = None
        self._threads.close(_PATIENCE)
        self._segments.close()

    def _block_with(self, call: Call) -> Gathered:
        """The block that holds a call's rows: the last one, what was prepared, or a new one."""
        if self._block is not None and self._block.block.number(call) is not None:
            return self._block
        block, self._ahead = self._ahead, None
        if block is None or block.first != call:
            self._batches = 1
            block = self._begin(call, 1)
        self._block = None  # its memory is for the next one
        self._runs.open(block.turns)
        self._block = block.gathered(self._runs)
        self._runs.let_go(block.turns, call.batch)
        return self._block

    def _begin(self, call: Call, batches: int) -> Block:
        """Find where the rows of a block lie, and have them read, with those of the next block."""
        places = self._plan.places(call.position, call.batch, call.start, call.stop, batches)
        block = Block.of(call, batches, *places)
        self._runs.open(block.turns.and_as_many())
        return block

    def _open(self, epochs: Int64Array, groups: Int64Array) -> list[OpenGroup]:
        """Begin to read row groups, or find that others do."""
        keys = list(zip(epochs.tolist(), groups.tolist(), strict=True))
        opened: list[Any] = [self._groups.get(key) for key in keys]
        fresh = np.flatnonzero([found is None for found in opened])
        pieces = self._plan.pieces(epochs[fresh], groups[fresh])
        for number, order in zip(fresh.tolist(), pieces, strict=True):
            opened[number] = self._groups.get(keys[number])  # two lanes may begin with it
            if opened[number] is None:
                reading = self._read_later(keys[number][1])
                opened[number] = self._groups[keys[number]] = OpenGroup(reading, order)
        return opened

    def _read_later(self, group: int) -> Awaited[SlotGroup]:
        return Awaited(self._threads.submit(lambda: self._read_group(group)))

    def _read_group(self, group: int) -> SlotGroup:
        table, reason = self._segments.whole(group)
        whole = widened(table).combine_chunks()  # of one chunk, so that a piece is one
        return SlotGroup(whole, int(self._index.ids(group, 0, 1)[0]), reason, self.spill)
