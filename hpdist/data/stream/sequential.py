"""Rows of sources that can only be read from their beginning: JSON lines, CSV, tar, generators.

A source is read in blocks of so many rows, and the rows of a block are mixed with one another.
Blocks follow one another, and epochs follow without a gap; where an epoch ends is found by reading
it. Every rank reads all blocks and takes its own rows of a global batch, so that any number of
ranks sees the same batches. `datasets` says where a block begins, and goes on there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import weakref
from bisect import bisect_right
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.decode.arrow_types import plain_table
from hpdist.data.files.retry import cause
from hpdist.data.files.unpacked import USUAL, unpacking
from hpdist.data.stream.permute import Int64Array, permutation
from hpdist.data.stream.reader import Rows
from hpdist.data.stream.row_files import FileStart, RowFiles
from hpdist.errors import DataError
from hpdist.messages.redaction import redacted_text

_ORDER = 0x5E9  # the order of a block must differ from other permutations of the same seed
_KEPT_BATCHES = 256  # how far behind the newest batch one can still ask where to resume
_JOIN_SECONDS = 2.0  # a thread that hangs in a network read must not hold up who closes

_Found: TypeAlias = "tuple[Any, pa.Table]"

_log = logging.getLogger("hpdist.data")


class SequentialReader:
    """Reads a `datasets.IterableDataset` without row counts, one block after the other.

    What it promises less than a reader of indexed files: every rank reads everything, and rows are
    mixed within a block alone. Resuming reads again, and drops, what comes before the block in its
    file or shard, and at most the two before that one. Where the state of `datasets` does not lead
    back to the same rows (`shuffle` loses its buffer, for one), the whole epoch is read again up to
    the block, with a warning.

    Args:
        dataset: The whole of it, alike on every rank.
        columns: The columns to read.
        name: The setting and what it names, for messages.
        seed: Chooses the order within the blocks.
        block_rows: Rows of a block; the last one of an epoch is shorter.
        resume: A `resume_point` to go on from.
        files: Takes note of which file every row is of.
        most: Bytes that a compressed file may hold: `data.loading.most_unpacked`.

    Raises DataError for a dataset that is split by node.
    """

    def __init__(
        self,
        dataset: Any,
        columns: list[str],
        name: str,
        seed: int,
        block_rows: int,
        resume: dict[str, Any] | None = None,
        files: RowFiles | None = None,
        most: int = USUAL,
    ) -> None:
        if block_rows < 1:
            raise ValueError(f"block_rows is {block_rows}, but a block has at least one row")
        name = redacted_text(name)
        if dataset._distributed is not None:
            raise DataError(
                f"{name}: is split by node already; pass the whole dataset, without "
                "split_dataset_by_node: every rank is given its own rows of it"
            )
        self._name = name
        self._shards = dataset.num_shards
        self._seed = seed
        self._block_rows = block_rows
        self._rows: int | None = resume["rows"] if resume else None
        view = dataset.select_columns(columns).with_format("arrow")
        self._files = files or RowFiles()
        source = _Source(view, name, seed, block_rows, self._files, most)
        self._blocks = _Blocks(source.blocks(resume), resume)
        self._end = weakref.finalize(self, self._blocks.close)

    @property
    def rows(self) -> int | None:
        """Rows of an epoch; None until all rows of the first one have been read."""
        return self._rows

    def order(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        return {
            "kind": "sequential",
            "seed": self._seed,
            "block_rows": self._block_rows,
            "shards": self._shards,
        }

    def read(self, position: int, batch: int, start: int, stop: int) -> Rows:
        """Read rows [start, stop) of the global batch of `batch` rows that begins at `position`.

        Positions must not decrease. Raises DataError where the source fails, holds no rows, or has
        another number of them than in an earlier epoch.
        """
        end = position + batch
        blocks = self._blocks.reach(position, end)
        self._rows = next(block.rows for block in reversed(blocks) if block.start <= end)
        start, stop = position + start, position + stop
        taken = [block for block in blocks if block.start < stop and start < block.stop]
        picks = [block.picked(start, stop) for block in taken or blocks[:1]]
        try:
            # Without declared features, the types of each block are inferred.
            table = pa.concat_tables([pick.table for pick in picks], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{self._name}: rows near row {picks[0].ids[0]} of epoch {picks[0].epochs[0]} are "
                f"of another type than the next ones: {cause(error)}"
            ) from error
        ids = np.concatenate([pick.ids for pick in picks])
        return Rows(table, ids, np.concatenate([pick.epochs for pick in picks]))

    def prepare(self, position: int, batch: int, start: int, stop: int) -> None:
        """Begin to read ahead what that call of `read` will need; returns at once."""
        self._blocks.begin(position + batch)

    def resume_point(self, position: int) -> dict[str, Any] | None:
        """Where the block at `position` begins; None at the very beginning.

        For positions that do not decrease, at most 256 batches behind the newest one.
        """
        return self._blocks.point(position)

    def describe(self, row: int) -> str:
        """Name a row by its number, and where they are known by its file and its place there."""
        return self._files.describe(row)

    def close(self) -> None:
        """Stop reading ahead and let go of files; a read that hangs is left to end by itself."""
        self._end()


@dataclass(frozen=True)
class _Point:
    """Where a block begins, and what tells whether a block is this one."""

    epoch: int
    first: int  # position of the epoch's first row
    block: int  # number in the epoch
    start: int  # position of the block's first row
    state: Any  # what `datasets` goes on from; None: read the epoch from its beginning
    digest: str  # of the block's rows
    rows: int | None  # of an epoch, once one has ended
    file: FileStart | None = None  # the file of the block's first row, and the file's first row

    def saved(self) -> dict[str, Any]:
        """All of it as JSON; a state that is none is left out."""
        try:
            state = json.loads(json.dumps(self.state))
        except TypeError:
            state = None
        return dict(vars(self), state=state)


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of an epoch, and the order in which they come."""

    point: _Point
    table: pa.Table
    order: Int64Array  # [rows], places in the table

    @property
    def start(self) -> int:
        """The position of its first row."""
        return self.point.start

    @property
    def stop(self) -> int:
        """The position behind its last row."""
        return self.point.start + len(self.order)

    @property
    def rows(self) -> int | None:
        """Rows of an epoch, if one has ended before this block."""
        return self.point.rows

    def picked(self, low: int, high: int) -> Rows:
        """Those of its rows that are at positions [low, high)."""
        places = self.order[max(0, low - self.start) : max(0, high - self.start)]
        ids = places + (self.start - self.point.first)
        epochs = np.full(len(ids), self.point.epoch, np.int64)
        return Rows(self.table.take(pa.array(places)), ids, epochs)


@dataclass(frozen=True)
class _Source:
    """Reads a dataset's blocks, epoch after epoch."""

    dataset: Any  # in Arrow format
    name: str
    seed: int
    block_rows: int
    files: RowFiles
    most: int

    def blocks(self, resume: dict[str, Any] | None) -> Generator[_Block, None, None]:
        """Every block from a `resume_point` on, without end."""
        point = _Point(**resume) if resume else _Point(0, 0, 0, 0, None, "", None)
        found = self._again(point) if resume else self._epoch(point)
        while True:
            for state, table in found:
                file = self.files.file_of(point.start - point.first)
                point = replace(point, state=state, digest=_digest(table), file=file)
                count = point.start + len(table) - point.first
                if point.rows is not None and count > point.rows:
                    raise self._changed(f"at least {count}", point)
                order = permutation(len(table), self.seed, _ORDER, point.epoch, point.block)
                yield _Block(point, plain_table(table).combine_chunks(), order)
                point = replace(point, block=point.block + 1, start=point.start + len(table))
            count = point.start - point.first
            if not count:
                when = f" in epoch {point.epoch}" if point.epoch else ""
                raise DataError(f"{self.name}: holds no rows{when}")
            if point.rows not in (None, count):
                raise self._changed(str(count), point)
            point = _Point(point.epoch + 1, point.start, 0, point.start, None, "", count)
            found = self._epoch(point)

    def _epoch(self, point: _Point) -> Iterator[_Found]:
        """The blocks of an epoch from a point on, each with the state that it begins in."""
        if point.block and point.state is None:
            whole = self._epoch(replace(point, block=0, start=point.first))
            return islice(whole, point.block, None)
        place = point.start - point.first
        return read_blocks(
            self.dataset,
            self.name,
            self.block_rows,
            f" of epoch {point.epoch}",
            place,
            point.state,
            self.files,
            point.file,
            self.most,
        )

    def _again(self, point: _Point) -> Iterator[_Found]:
        """Do as `_epoch`, and make sure that the first block is the one that the point is of."""
        found = None
        reason = f"{self.name}: where it was cannot be saved"
        if point.state is not None or not point.block:
            found, reason = self._checked(point)
        if found is None and point.block:
            place = point.start - point.first
            _log.warning("%s; reading epoch %d again up to row %d", reason, point.epoch, place)
            found, reason = self._checked(replace(point, state=None))
        if found is None:
            raise DataError(
                f"{reason}; restore the dataset of the saved run, or start a new one (a dataset "
                "that is not the same each time that it is read cannot be continued)"
            )
        return found

    def _checked(self, point: _Point) -> tuple[Iterator[_Found] | None, str]:
        """The blocks from a point on, if the first is the point's; else why not."""
        found = self._epoch(point)
        try:
            first = next(found, None)
        except DataError as error:  # also where `datasets` does not know its own state any more
            return None, str(error)
        if first is None or _digest(first[1]) != point.digest:
            place = point.start - point.first
            return None, (
                f"{self.name}: cannot continue: the rows from row {place} of epoch {point.epoch} "
                "on are not those of the saved run"
            )
        return chain([first], found), ""

    def _changed(self, count: str, point: _Point) -> DataError:
        return DataError(
            f"{self.name}: epoch {point.epoch} had {count} rows, an earlier one {point.rows}; "
            "the dataset must not change during a run"
        )


class _Blocks:
    """The blocks in memory, which a thread reads up to the place that was asked for.

    The thread must hold no reference to the reader, or the reader is never collected.
    """

    def __init__(
        self, source: Generator[_Block, None, None], resume: dict[str, Any] | None
    ) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._blocks: list[_Block] = []
        self._points = [_Point(**resume)] if resume else []
        self._floor = 0  # what lies before is not needed
        self._resumed = 0  # the last position asked for
        self._oldest = 0  # where to resume before it is not needed
        self._wanted = -1  # the place to read up to
        self._error: BaseException | None = None
        self._closed = False

    def reach(self, floor: int, place: int) -> list[_Block]:
        """The blocks from the one that holds `floor` to the one that holds `place`."""
        with self._changed:
            self._drop(floor, place)
            self._want(place)
            self._changed.wait_for(lambda: self._holds(place) or self._error or self._closed)
            if self._blocks and self._blocks[-1].stop >= place:  # an error may come behind
                return [block for block in self._blocks if block.start <= place]
            raise self._error or RuntimeError("the reader is closed")

    def begin(self, place: int) -> None:
        """Have the thread read up to `place`."""
        with self._changed:
            self._want(place)

    def point(self, position: int) -> dict[str, Any] | None:
        """Where to begin to get the row at a position."""
        with self._changed:
            self._resumed = max(self._resumed, position)
            if position == 0 or not self._points:
                return None
            if position < self._points[0].start:
                raise ValueError(f"position {position} was passed long ago")
            return self._points[self._at(position)].saved()

    def close(self) -> None:
        """End the thread, which closes the source."""
        with self._changed:
            self._closed = True
            self._blocks = []
            self._changed.notify_all()
        if self._thread is None:
            self._source.close()
        elif self._thread is not threading.current_thread():  # the collector may run in any
            self._thread.join(_JOIN_SECONDS)

    def _want(self, place: int) -> None:
        self._wanted = max(self._wanted, place)
        self._changed.notify_all()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="hpdist-blocks", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._holds(self._wanted))
                if self._closed:
                    break
            try:
                block = next(self._source)
            except BaseException as error:  # `reach` raises it where the rows are asked for
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._keep(block)
                self._changed.notify_all()
            del block
        self._source.close()

    def _keep(self, block: _Block) -> None:
        if block.stop > self._floor and not self._closed:
            self._blocks.append(block)
        if block.stop <= self._oldest:
            self._points.clear()
        self._points.append(block.point)

    def _at(self, position: int) -> int:
        """The last point that is not behind a position; -1 where there is none."""
        return bisect_right([point.start for point in self._points], position) - 1

    def _holds(self, place: int) -> bool:
        return bool(self._blocks) and self._blocks[-1].stop > place

    def _drop(self, floor: int, place: int) -> None:
        """Forget what lies before the batch from `floor` to `place`."""
        if floor < self._floor or (self._points and floor < self._points[0].start):
            raise ValueError(f"position {floor} was passed; positions must not decrease")
        self._floor = floor
        self._blocks = [block for block in self._blocks if block.stop > floor]
        self._oldest = max(self._resumed, floor - _KEPT_BATCHES * (place - floor))
        self._points = self._points[max(0, self._at(self._oldest)) :]


def read_blocks(
    dataset: Any,
    name: str,
    block_rows: int,
    epoch: str = "",
    place: int = 0,
    state: Any = None,
    files: RowFiles | None = None,
    since: FileStart | None = None,
    most: int = USUAL,
) -> Iterator[_Found]:
    """Read a dataset in Arrow format once, in blocks, each with the state that it begins in.

    `state` is such a state to go on from, and `place` the number of rows before it; `epoch` is said
    after every row's number. `files` takes note of the files that are read, and
    `since` is the one that the state is in; `most` is what compressed files may hold. Raises
    DataError when the source fails, naming the last row read.
    """
    # Two iterations of one IterableDataset share a position and lose rows, and a state that was
    # loaded stays for the next iteration: a shard has its own.
    once = dataset.shard(num_shards=1, index=0)
    files = files or RowFiles()
    files.watch(once, (since[0], since[1]) if since else None, begun=state is not None)
    if state is not None:
        once.load_state_dict(state)
    tables = once.iter(batch_size=block_rows)
    while True:
        try:
            with unpacking(most):
                table = next(tables, None)
            following = once.state_dict()
        except Exception as error:  # every source has its own
            where = f"after row {place - 1}{epoch}" if place else f"at the beginning{epoch}"
            file = "" if files.reading is None else f" (of {files.reading})"
            raise DataError(
                f"{name}: reading failed {where}, in the next {block_rows} rows{file}: "
                f"{cause(_innermost(error))}"
            ) from error
        if table is None:
            return
        if len(table):
            yield state, table
        place += len(table)
        state = following


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _digest(table: pa.Table) -> str:
    """Tell one block from another by its size, its first and its last row."""
    ends = [table.slice(row, 1).to_pylist() for row in (0, len(table) - 1)]
    return hashlib.blake2b(repr((len(table), ends)).encode(), digest_size=8).hexdigest()
