"""Reads the rows of a Parquet dataset in the order of a `SlotPlan`, a few batches at a time.

Every lane gives a row at a time, each from another row group, and to gather rows one by one costs
far more than to copy them. So a block of several batches is gathered at once: a few slices of every
lane, laid end to end, and then taken in the order of the batches.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.files.open import Retry, is_remote
from hpdist.data.stream.index import Index
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.plan import USUAL_BUDGET
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.segments import Segments
from hpdist.data.stream.slot_groups import Pieces, SlotGroup
from hpdist.data.stream.slot_plan import Run, SlotPlan
from hpdist.data.stream.spill import Spill
from hpdist.data.stream.threads import DaemonThreads
from hpdist.data.stream.wide import joined, widened

KIND = "parquet-slots"
"""What a checkpoint calls this order."""

_LOCAL_THREADS = min(4, os.cpu_count() or 1)  # more than cores only get into each other's way
_REMOTE_THREADS = 16
_PATIENCE = 2.0  # seconds that closing waits for a read that heeds no stop
_IDLE = 16  # blocks, after which a lane that no row was taken from is let go
_BLOCK_ROWS = 16384  # that a block has at most, but one batch at least
_GROUP_PART = 4  # of a row group that a block takes, so that a lane has one or two of them open
_BLOCK_PART = 4  # of the memory budget that a block may take; two are in memory at a time


class _Opened:
    """A row group that is being read, or was; the lanes that share it hold the same one."""

    def __init__(self, future: Future[SlotGroup]) -> None:
        self._future = future
        self._group: SlotGroup | None = None

    def result(self) -> SlotGroup:
        """Wait for its rows."""
        if self._group is None:
            self._group = self._future.result()
        return self._group

    def cancel(self) -> None:
        """Do not begin to read it."""
        self._future.cancel()


@dataclass(frozen=True)
class _Reading:
    """A run of a lane, and its row group."""

    run: Run
    opened: _Opened


@dataclass(frozen=True)
class _Call:
    """What `read` was asked for."""

    position: int
    batch: int
    start: int
    stop: int

    def later(self, batches: int) -> _Call:
        """Give the same rows of a later batch."""
        return _Call(self.position + batches * self.batch, self.batch, self.start, self.stop)


@dataclass(frozen=True)
class _Block:
    """The rows of several calls that follow one another, of which some may be gathered."""

    first: _Call
    batches: int
    spans: tuple[tuple[int, int, int], ...]  # of each lane, the first turn and the one behind it
    lines: Int64Array  # [batches * rows], places in the spans laid end to end

    def number(self, call: _Call) -> int | None:
        """Which of its batches a call asks for."""
        number, rest = divmod(call.position - self.first.position, call.batch)
        known = not rest and 0 <= number < self.batches and call == self.first.later(number)
        return number if known else None


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
        self._groups: weakref.WeakValueDictionary[tuple[int, int], _Opened]
        self._groups = weakref.WeakValueDictionary()
        self._lanes: dict[int, list[_Reading]] = {}  # of each lane, its runs in order
        self._used: dict[int, int] = {}  # of each lane, the block that last took a row from it
        self._blocks = 0
        self._block: tuple[_Block, Rows] | None = None
        self._ahead: _Block | None = None  # what was prepared
        self._batches = 1  # of the next block: more, the longer calls follow one another
        remote = any(is_remote(file.path) for file in index.files)
        threads = _REMOTE_THREADS if remote else _LOCAL_THREADS
        self._threads = DaemonThreads(threads, "hpdist-parquet")

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
        call = _Call(position, batch, start, stop)
        if start == stop:
            none = np.empty(0, np.int64)
            return Rows(self._segments.schema.empty_table(), none, none)
        block, rows = self._block_with(call)
        number = block.number(call) or 0
        if number == block.batches - 1:
            self._batches = 2 * block.batches
        return _sliced(rows, number * (stop - start), stop - start)

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Open the row groups of these rows, and of the ones after them."""
        call = _Call(position, batch, start, stop)
        if start == stop or (self._block is not None and self._block[0].number(call) is not None):
            return
        most = max(1, min(self._block_rows // (stop - start), self._most_batches))
        follows = self._block is not None and call == self._block[0].first.later(
            self._block[0].batches
        )
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
            opened.cancel()
        self._lanes.clear()
        self._block = self._ahead = None
        self._threads.close(_PATIENCE)
        self._segments.close()

    def _block_with(self, call: _Call) -> tuple[_Block, Rows]:
        """The block that holds a call's rows: the last one, what was prepared, or a new one."""
        if self._block is not None and self._block[0].number(call) is not None:
            return self._block
        block, self._ahead = self._ahead, None
        if block is None or block.first != call:
            self._batches = 1
            block = self._begin(call, 1)
        self._block = None  # its memory is for the next one
        self._block = block, self._gathered(block)
        return self._block

    def _begin(self, call: _Call, batches: int) -> _Block:
        """Find where the rows of a block lie, and have them read, with those of the next block."""
        found = [self._plan.places(*_fields(call.later(number))) for number in range(batches)]
        lanes = np.concatenate([lanes for lanes, _ in found])
        turns = np.concatenate([turns for _, turns in found])
        low = int(lanes.min())
        own = lanes - low
        begin = np.full(int(own.max()) + 1, np.iinfo(np.int64).max)
        end = np.zeros(len(begin), np.int64)
        np.minimum.at(begin, own, turns)
        np.maximum.at(end, own, turns + 1)
        sizes = np.maximum(end - begin, 0)
        lines = (np.cumsum(sizes) - sizes - begin)[own] + turns
        present = np.flatnonzero(sizes).tolist()
        spans = tuple((low + lane, int(begin[lane]), int(end[lane])) for lane in present)
        for lane, first, last in spans:
            self._open(lane, first, last + last - first)
        return _Block(call, batches, spans, lines)

    def _open(self, lane: int, turn: int, stop: int) -> list[_Reading]:
        """The runs that hold turns of a lane; all are being read."""
        self._used[lane] = self._blocks
        known = self._lanes.setdefault(lane, [])
        if known and known[0].run.first <= turn and stop <= known[0].run.stop:
            return known[:1]
        found = []
        while turn < stop:
            reading = next((r for r in known if r.run.first <= turn < r.run.stop), None)
            if reading is None:
                run = self._plan.run_at(lane, turn)
                reading = _Reading(run, self._opened(run.epoch, run.group))
                known.append(reading)
            found.append(reading)
            turn = reading.run.stop
        return found

    def _opened(self, epoch: int, group: int) -> _Opened:
        opened = self._groups.get((epoch, group))
        if opened is None:
            opened = _Opened(self._threads.submit(lambda: self._read_group(epoch, group)))
            self._groups[epoch, group] = opened
        return opened

    def _read_group(self, epoch: int, group: int) -> SlotGroup:
        table, reason = self._segments.whole(group)
        whole = widened(table).combine_chunks()  # of one chunk, so that a piece is one
        first = int(self._index.ids(group, 0, 1)[0])
        return SlotGroup(whole, first, self._plan.pieces(epoch, group), reason, self.spill)

    def _gathered(self, block: _Block) -> Rows:
        """Wait for a block's rows, and put them in the order of the batches."""
        pieces = Pieces()
        epochs, counts, reasons = [], [], []
        for lane, first, last in block.spans:
            for reading in self._open(lane, first, last):
                run, group = reading.run, reading.opened.result()
                begin, end = max(first, run.first), min(last, run.stop)
                at = run.start - run.first
                group.lay(at + begin, at + end, pieces)
                counts.append(end - begin)
                epochs.append(run.epoch)
                reasons.append(group.reason)
        self._let_go(block)
        table = widened(joined(pieces.tables))
        in_order = pieces.all_ids()[block.lines]
        of_rows = np.repeat(np.asarray(epochs), counts)[block.lines]
        unread = _unread(reasons, counts, block.lines)
        if block.batches > 1 or len(block.lines) < len(table):  # else they are in order already
            table = table.combine_chunks().take(pa.array(block.lines))
        return Rows(table, in_order, of_rows, unread)

    def _let_go(self, block: _Block) -> None:
        """Let go of the runs that the lanes have passed, and of lanes that are not used."""
        self._blocks += 1
        for lane, _, stop in block.spans:
            if self._lanes[lane][0].run.stop <= stop:
                self._lanes[lane] = [r for r in self._lanes[lane] if r.run.stop > stop]
        idle = _IDLE * max(1, self._plan.lanes // block.first.batch)  # they take turns
        for lane, used in list(self._used.items()):
            if self._blocks - used > idle:
                del self._used[lane]
                del self._lanes[lane]


def _fields(call: _Call) -> tuple[int, int, int, int]:
    return call.position, call.batch, call.start, call.stop


def _unread(
    reasons: Sequence[str | None], counts: Sequence[int], lines: Int64Array
) -> dict[int, str]:
    """Why rows could not be read, by their place among `lines`; of parts of `counts` rows."""
    if not any(reasons):
        return {}
    of_part = np.repeat(np.arange(len(counts)), counts)[lines].tolist()
    return {
        line: reason for line, part in enumerate(of_part) if (reason := reasons[part]) is not None
    }


def _sliced(rows: Rows, start: int, count: int) -> Rows:
    """One batch of a block."""
    stop = start + count
    unread = {line - start: why for line, why in rows.unread.items() if start <= line < stop}
    table = None if rows.table is None else rows.table.slice(start, count)
    return Rows(table, rows.ids[start:stop], rows.epochs[start:stop], unread)
