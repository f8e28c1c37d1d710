"""Reads the rows of a Parquet dataset in the order of its plan, window by window, ahead of use."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_schema
from hpdist.data.decode.encoded import Array
from hpdist.data.files.open import FileChangedError, FileLostError, Retry, is_remote
from hpdist.data.stream.bounded import TooLargeError
from hpdist.data.stream.index import Index
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.plan import USUAL_BUDGET, Piece, Plan, Segment, Window, choose_lanes
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.row_groups import RowGroups
from hpdist.data.stream.threads import DaemonThreads
from hpdist.errors import DataError

_LOCAL_THREADS = min(4, os.cpu_count() or 1)  # more than cores only get into each other's way
_REMOTE_THREADS = 16
_MOST_IN_32_BITS = 1 << 30  # bytes; beyond, a column's offsets might not fit
_PATIENCE = 2.0  # seconds that closing waits for a read that heeds no stop
_IDLE = 16  # batches, after which a lane that no row was taken from is let go


@dataclass(frozen=True)
class _Read:
    """A window's rows, mixed."""

    epoch: int
    table: pa.Table  # [rows]
    ids: Int64Array  # [rows]
    large: bool
    """Whether it is large enough to have 64-bit offsets."""
    reasons: tuple[str, ...]
    """Why rows could not be read, one for each segment of them."""
    reason: Array | None  # int32 [rows], which of them is each row's; -1: it was read

    def unread(self, first: int, last: int) -> dict[int, str]:
        """Why, by line from `first` on, rows up to `last` could not be read."""
        if self.reason is None:
            return {}
        found = self.reason[first:last]
        return {line: self.reasons[found[line]] for line in np.flatnonzero(found >= 0).tolist()}


class _Opened:
    """A window that is being read, or was."""

    def __init__(self, window: Window, future: Future[_Read]) -> None:
        self.window = window
        self.start = window.start
        self.stop = window.start + window.rows
        self._future = future
        self._read: _Read | None = None

    def result(self) -> _Read:
        """Wait for its rows."""
        if self._read is None:
            self._read = self._future.result()
        return self._read

    def cancel(self) -> None:
        """Do not begin to read it."""
        self._future.cancel()


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
        lanes = choose_lanes(batch, len(index.rows), _average(index), budget)
        if order is not None and order.get("kind") == "parquet":
            lanes = order["lanes"], order["groups_per_window"]
            known = all(isinstance(n, int) and 0 < n < 1 << 31 for n in lanes)
            if not known or lanes[0] > max(index.rows.sum(), 1):  # memory goes by the lanes
                raise ValueError(f"lanes and groups_per_window cannot be {lanes}")
        self._index = index
        self._columns = list(columns)
        self._name = name
        self._plan = Plan(index.rows, seed, *lanes)
        self._stop = stop or threading.Event()
        limit = USUAL_BUDGET if budget is None else budget
        index.check_sizes(limit, name)
        self._groups = RowGroups(columns, retry or Retry(), self._stop, limit)
        self._lanes: dict[int, list[_Opened]] = {}  # of each lane, its windows in order
        self._used: dict[int, int] = {}  # of each lane, the batch that last took a row from it
        self._batches = 0
        self._ahead: tuple[tuple[int, int, int, int], _Runs] | None = None  # what was prepared
        remote = any(is_remote(file.path) for file in index.files)
        self._threads = DaemonThreads(
            _REMOTE_THREADS if remote else _LOCAL_THREADS, "hpdist-parquet"
        )
        schema = plain_schema(index.arrow_schema)
        fields = [schema.field(column) for column in self._columns]
        self._schema = pa.schema([pa.field(f.name, f.type, nullable=True) for f in fields])

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
            return Rows(self._schema.empty_table(), none, none)
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
        return self._read_segment(Segment(group, 0, int(self._index.rows[group])))

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
        self._groups.close()

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
            table, reason = self._read_segment(segment)
            tables.append(table)
            ids.append(self._index.ids(segment.group, segment.start, segment.stop))
            numbers.append(-1 if reason is None else len(reasons))
            if reason is not None:
                reasons.append(reason)
        order = self._plan.row_order(window)
        whole = pa.concat_tables(tables)
        large = whole.get_total_buffer_size() > _MOST_IN_32_BITS
        if large:
            whole = whole.cast(_large(whole.schema))
        mixed = whole.combine_chunks().take(pa.array(order))  # of one chunk, since that is faster
        of_rows = None  # no dictionary: a damaged row group may claim millions of rows
        if reasons:
            of_rows = np.repeat(np.asarray(numbers, np.int32), [len(part) for part in ids])[order]
        ids_in_order = np.concatenate(ids)[order]
        return _Read(window.epoch, mixed, ids_in_order, large, tuple(reasons), of_rows)

    def _read_segment(self, segment: Segment) -> tuple[pa.Table, str | None]:
        """A segment's rows; or nulls and why, where the file is damaged."""
        index = self._index
        file = index.files[int(index.file[segment.group])]
        first = int(index.first[segment.group]) + segment.start
        count = segment.stop - segment.start
        try:
            group = self._groups.read(file, int(index.number[segment.group]))
            if len(group) < first + count:
                raise pa.ArrowInvalid(f"the row group holds {len(group)} rows")
            found = group if len(group) == count else group.slice(first, count)
            return (found if found.schema == self._schema else self._typed(found, file.path)), None
        except FileChangedError as error:
            raise DataError(
                f"{self._name}: {error}; a run needs the same data to its end: restore the file, "
                "or start a new run"
            ) from error
        except InterruptedError:
            raise
        except FileLostError as error:
            reason = error.reason
        except TooLargeError as error:
            reason = f"its row group is not read: {error}"
        except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            reason = f"its row group cannot be read: {' '.join(str(error).split())[:200]}"
        nulls = [pa.nulls(count, field.type) for field in self._schema]
        return pa.table(nulls, schema=self._schema), reason

    def _typed(self, found: pa.Table, path: str) -> pa.Table:
        """A file's rows in the types of all files, with the columns that its folders name."""
        own = found.schema.names
        columns = [
            found.column(field.name).cast(field.type)
            if field.name in own
            else self._index.folders.constant(path, field, len(found))
            for field in self._schema
        ]
        return pa.table(columns, schema=self._schema)


def _joined(parts: Sequence[tuple[_Read, int, int]]) -> Rows:
    """Lines [first, last) of several windows, one behind the other; only ids are copied."""
    tables = [read.table.slice(first, last - first) for read, first, last in parts]
    if len({read.large for read, _, _ in parts}) > 1:
        tables = [table.cast(_large(table.schema)) for table in tables]
    ids = np.concatenate([read.ids[first:last] for read, first, last in parts])
    epochs = np.repeat(
        [read.epoch for read, _, _ in parts], [last - first for _, first, last in parts]
    )
    unread: dict[int, str] = {}
    at = 0
    for read, first, last in parts:
        unread |= {at + line: why for line, why in read.unread(first, last).items()}
        at += last - first
    return Rows(pa.concat_tables(tables), ids, epochs, unread)


def _average(index: Index) -> float:
    """Bytes of a row group in memory, weighted by its rows: what a window's group costs."""
    return float(np.average(index.size, weights=index.rows))


def _large(schema: pa.Schema) -> pa.Schema:
    """Give a table's columns with 64-bit offsets."""
    return pa.schema([field.with_type(_large_type(field.type)) for field in schema])


def _large_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_large_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.large_list(kind.value_field.with_type(_large_type(kind.value_type)))
    return kind
