"""Reads the rows of a Parquet dataset in the order of its plan, window by window, ahead of use."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.decode.encoded import Array
from hpdist.data.files.open import Retry, is_remote
from hpdist.data.stream.index import Index
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.plan import USUAL_BUDGET, Piece, Plan, Window, choose_lanes
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.segments import Segments
from hpdist.data.stream.threads import Awaited, reading_threads
from hpdist.data.stream.wide import joined, widened

_PATIENCE = 2.0  # seconds that closing waits for a read that heeds no stop
_IDLE = 16  # batches, after which a lane that no row was taken from is let go


@dataclass(frozen=True)
class _Read:
    """A window's rows, mixed."""

    epoch: int
    table: pa.Table  # [rows]
    ids: Int64Array  # [rows]
    reasons: tuple[str, ...]
    """Why rows could not be read, one for each segment of them."""
    reason: Array | None  # int32 [rows], which of them is each row's; -1: it was read

    def unread(self, first: int, last: int) -> dict[int, str]:
        """Why, by line from `first` on, rows up to `last` could not be read."""
        if self.reason is None:
            return {}
        found = self.reason[first:last]
        return {line: self.reasons[found[line]] for line in np.flatnonzero(found >= 0).tolist()}


class _Opened(Awaited[_Read]):
    """A window that is being read, or was."""

    def __init__(self, window: Window, future: Future[_Read]) -> None:
        super().__init__(future)
        self.window = window
        self.start = window.start
        self.stop = window.start + window.rows


_Runs: TypeAlias = list[tuple[_Opened, int, int]]  # windows, and which of their lines


class ParquetReader:
    """The rows of a Parquet dataset, exactly once an epoch, on any number of ranks.

    Args:
        index: Of the dataset.
        columns: Which of them are read.
        name: Of the dataset, for messages.
        seed: Chooses the order.
        batch: Rows of a global batch, by which the lanes are chosen.
        budget: Bytes for the windows of all lanes, the open ones and the next; None: as much as
            mixes at least 128 row groups, at most 512 MiB.
        order: That of the run that is resumed, to go on with its lanes and windows.
        retry: How long a server may fail.
        stop: Set by whoever closes the stream, so that no read is waited for.
    """

    def __init__(
        self,
        index: Index,
        columns: Sequence[str],
        name: str,
        seed: int,
        batch: int,
        *,
        budget: int | None = None,
        order: Mapping[str, Any] | None = None,
        retry: Retry | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        lanes = choose_lanes(batch, len(index.rows), index.group_bytes, budget)
        if order is not None and order.get("kind") == "parquet":
            lanes = order["lanes"], order["groups_per_window"]
            known = all(isinstance(n, int) and 0 < n < 1 << 31 for n in lanes)
            if not known or lanes[0] > max(index.row_count, 1):  # memory goes by the lanes
                raise ValueError(f"lanes and groups_per_window cannot be {lanes}")
        self._index = index
        self._plan = Plan(index.rows, seed, *lanes)
        self._stop = stop or threading.Event()
        limit = USUAL_BUDGET if budget is None else budget
        index.check_sizes(limit, name)
        self._segments = Segments(index, columns, name, retry or Retry(), self._stop, limit)
        self._lanes: dict[int, list[_Opened]] = {}  # of each lane, its windows in order
        self._used: dict[int, int] = {}  # of each lane, the batch that last took a row from it
        self._batches = 0
        self._ahead: tuple[tuple[int, int, int, int], _Runs] | None = None  # what was prepared
        self._threads = reading_threads(any(is_remote(file.path) for file in index.files))

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self._plan.rows

    def order(self) -> dict[str, Any]:
        """Lanes, windows, seed and the fingerprint of the files."""
        plan = self._plan
        return {
            "kind": "parquet",
            "seed": plan.seed,
            "rows": plan.rows,
            "lanes": plan.lanes,
            "groups_per_window": plan.groups_per_window,
            "fingerprint": self._index.fingerprint,
        }

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch at `position`."""
        if start == stop:
            none = np.empty(0, np.int64)
            return Rows(self._segments.schema.empty_table(), none, none)
        call = (position, batch, start, stop)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == call:
            runs = ahead[1]
        else:
            runs = self._runs(self._plan.pieces(*call))
        rows = _joined([(opened.result(), first, last) for opened, first, last in runs])
        self._batches += 1
        for opened, _, _ in runs:
            if self._lanes[opened.window.lane][0] is not opened:
                self._drop_before(opened.window)
        self._drop_idle()
        return rows

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Open the windows of these rows, and the ones after them."""
        call = (position, batch, start, stop)
        runs = self._runs(self._plan.pieces(*call))
        self._ahead = call, runs
        for opened, _, _ in runs:
            lane = self._lanes[opened.window.lane]
            if lane[-1] is opened:
                lane.append(self._open(self._plan.after(opened.window)))

    def resume_point(self, position: int) -> None:
        """Nothing: the position says it all."""
        return

    def read_group(self, group: int) -> tuple[pa.Table, str | None]:
        """Read the used rows of a row group in their order; nulls and why where it is damaged."""
        return self._segments.whole(group)

    def describe(self, row: int) -> str:
        """Name file, row group and row."""
        return self._index.describe(row)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        for lane in self._lanes.values():
            for opened in lane:
                opened.cancel()
        self._lanes.clear()
        self._ahead = None
        self._threads.close(_PATIENCE)
        self._segments.close()

    def _runs(self, pieces: Sequence[Piece]) -> _Runs:
        """The windows that hold these pieces, and which of their rows; all are being read."""
        runs = []
        for epoch, lane, at, stop in pieces:
            while at < stop:
                opened = self._opened_at(epoch, lane, at)
                end = min(stop, opened.stop)
                runs.append((opened, at - opened.start, end - opened.start))
                at = end
        return runs

    def _opened_at(self, epoch: int, lane: int, offset: int) -> _Opened:
        self._used[lane] = self._batches
        known = self._lanes.setdefault(lane, [])
        for opened in known:
            if opened.start <= offset < opened.stop and opened.window.epoch == epoch:
                return opened
        opened = self._open(self._plan.window_at(epoch, lane, offset))
        known.append(opened)
        return opened

    def _open(self, window: Window) -> _Opened:
        return _Opened(window, self._threads.submit(lambda: self._read_window(window)))

    def _drop_before(self, window: Window) -> None:
        """Let go of a lane's windows that it has passed."""
        kept = []
        for opened in self._lanes[window.lane]:
            passed = (opened.window.epoch, opened.window.number) < (window.epoch, window.number)
            opened.cancel() if passed else kept.append(opened)
        self._lanes[window.lane] = kept

    def _drop_idle(self) -> None:
        """Let go of lanes that a few rows were taken from where the ranks' slices moved."""
        for lane, batch in list(self._used.items()):
            if self._batches - batch > _IDLE:
                del self._used[lane]
                for opened in self._lanes.pop(lane):
                    opened.cancel()

    def _read_window(self, window: Window) -> _Read:
        tables, ids, numbers = [], [], []
        reasons: list[str] = []
        for segment in window.segments:
            table, reason = self._segments.read(segment)
            tables.append(table)
            ids.append(self._index.ids(segment.group, segment.start, segment.stop))
            numbers.append(-1 if reason is None else len(reasons))
            if reason is not None:
                reasons.append(reason)
        order = self._plan.row_order(window)
        whole = widened(pa.concat_tables(tables))
        mixed = whole.combine_chunks().take(pa.array(order))  # of one chunk, since that is faster
        of_rows = None  # no dictionary: a damaged row group may claim millions of rows
        if reasons:
            of_rows = np.repeat(np.asarray(numbers, np.int32), [len(part) for part in ids])[order]
        ids_in_order = np.concatenate(ids)[order]
        return _Read(window.epoch, mixed, ids_in_order, tuple(reasons), of_rows)


def _joined(parts: Sequence[tuple[_Read, int, int]]) -> Rows:
    """Lines [first, last) of several windows, one behind the other; only ids are copied."""
    tables = [read.table.slice(first, last - first) for read, first, last in parts]
    ids = np.concatenate([read.ids[first:last] for read, first, last in parts])
    epochs = np.repeat(
        [read.epoch for read, _, _ in parts], [last - first for _, first, last in parts]
    )
    unread: dict[int, str] = {}
    at = 0
    for read, first, last in parts:
        unread |= {at + line: why for line, why in read.unread(first, last).items()}
        at += last - first
    return Rows(joined(tables), ids, epochs, unread)
