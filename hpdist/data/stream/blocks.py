"""Blocks of rows: read from a source that can only be read from its beginning, and resumed in.

Every block begins at a point, which a checkpoint keeps: it says where `datasets` goes on, and how
to tell whether the rows there are still the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
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

ORDER = 0x5E9
"""Keeps the order of a block apart from other permutations of the same seed."""

FoundBlock: TypeAlias = "tuple[Any, pa.Table]"
"""The state that a block begins in, and its rows."""

_log = logging.getLogger("hpdist.data")


@dataclass(frozen=True)
class Point:
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
class Block:
    """Consecutive rows of an epoch, and the order in which they come."""

    point: Point
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
class BlockSource:
    """Reads a dataset's blocks, epoch after epoch."""

    dataset: Any  # in Arrow format
    name: str
    seed: int
    block_rows: int
    files: RowFiles
    most: int

    def blocks(self, resume: dict[str, Any] | None) -> Generator[Block, None, None]:
        """Every block from a `resume_point` on, without end."""
        point = Point(**resume) if resume else Point(0, 0, 0, 0, None, "", None)
        found = self._again(point) if resume else self._epoch(point)
        while True:
            for state, table in found:
                file = self.files.file_of(point.start - point.first)
                point = replace(point, state=state, digest=_digest(table), file=file)
                count = point.start + len(table) - point.first
                if point.rows is not None and count > point.rows:
                    raise self._changed(f"at least {count}", point)
                order = permutation(len(table), self.seed, ORDER, point.epoch, point.block)
                yield Block(point, plain_table(table).combine_chunks(), order)
                point = replace(point, block=point.block + 1, start=point.start + len(table))
            count = point.start - point.first
            if not count:
                when = f" in epoch {point.epoch}" if point.epoch else ""
                raise DataError(f"{self.name}: holds no rows{when}")
            if point.rows not in (None, count):
                raise self._changed(str(count), point)
            point = Point(point.epoch + 1, point.start, 0, point.start, None, "", count)
            found = self._epoch(point)

    def _epoch(self, point: Point) -> Iterator[FoundBlock]:
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

    def _again(self, point: Point) -> Iterator[FoundBlock]:
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

    def _checked(self, point: Point) -> tuple[Iterator[FoundBlock] | None, str]:
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

    def _changed(self, count: str, point: Point) -> DataError:
        return DataError(
            f"{self.name}: epoch {point.epoch} had {count} rows, an earlier one {point.rows}; "
            "the dataset must not change during a run"
        )


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
) -> Iterator[FoundBlock]:
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
