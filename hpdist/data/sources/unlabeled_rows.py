"""Sets of unlabelled rows, each in its own way read in any order that a seed chooses.

A table is `hpdist.data.sources.labeled.UnlabeledTable`; here are a Parquet stream, any other stream
and several sets mixed. Each is a `RowSource` of `hpdist.data.stream`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import datasets

from hpdist.data.decode.stored_values import Column
from hpdist.data.files.open import Retry
from hpdist.data.sources.labeled import UnlabeledTable
from hpdist.data.stream.functions import RowFunctions, Values
from hpdist.data.stream.index import Index
from hpdist.data.stream.mixed import MixedReader
from hpdist.data.stream.parquet import ParquetReader
from hpdist.data.stream.reader import Reader, Rows
from hpdist.data.stream.row_files import RowFiles
from hpdist.data.stream.sequential import SequentialReader
from hpdist.data.stream.slot_plan import choose_slots
from hpdist.data.stream.slots import KIND as SLOTS
from hpdist.data.stream.slots import SlotReader


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """Rows of Parquet files, wherever they lie: exactly once an epoch on any number of ranks."""

    index: Index
    column: Column
    name: str
    functions: RowFunctions
    columns: tuple[str, ...]
    budget: int | None
    retry: Retry
    recorded: list[list[Any]] | None = None
    """The files as an earlier start of the run found them."""

    def values(self, rows: Rows) -> Values:
        """The stored values of rows, after filter and map."""
        return self.functions.values(rows.table)

    def reader(
        self,
        seed: int,
        batch: int,
        *,
        order: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Reader:
        """Read by a lane for each slot of a batch, or by lanes and windows; see `choose_slots`.

        A run that is resumed goes on with the kind of order that it began with.
        """
        lanes = self.slots(batch, order)
        if lanes is not None:
            return SlotReader(
                self.index,
                self.columns,
                self.name,
                seed,
                lanes,
                budget=self.budget,
                retry=self.retry,
                stop=stop,
            )
        return ParquetReader(
            self.index,
            self.columns,
            self.name,
            seed,
            batch,
            budget=self.budget,
            order=order,
            retry=self.retry,
            stop=stop,
        )

    def slots(self, batch: int, order: Mapping[str, Any] | None = None) -> int | None:
        """How many lanes a `SlotReader` reads; None where windows are read, as by `order`."""
        if order is None:
            index = self.index
            return choose_slots(batch, len(index.rows), index.group_bytes, self.budget)
        if order.get("kind") != SLOTS:
            return None
        lanes = order["lanes"]
        if not isinstance(lanes, int) or not 0 < lanes <= self.index.row_count:
            raise ValueError(f"lanes cannot be {lanes}")
        return lanes

    def changes(self) -> str:
        """Name the files that differ from the run that is resumed."""
        if self.recorded is None:
            return "its files differ"
        return self.index.changes(self.recorded)


@dataclass(frozen=True, eq=False)
class SequentialRows:
    """Rows that only reading counts, such as lines of JSON: every rank reads all of them."""

    dataset: datasets.IterableDataset
    column: Column
    name: str
    functions: RowFunctions
    columns: tuple[str, ...]
    block_rows: int
    most: int
    """What its compressed files may hold."""
    files: RowFiles = field(default_factory=RowFiles)

    def values(self, rows: Rows) -> Values:
        """The stored values of rows, after filter and map."""
        return self.functions.values(rows.table)

    def reader(
        self,
        seed: int,
        batch: int,
        *,
        order: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Reader:
        """Read block by block."""
        block_rows = self.block_rows
        if order is not None and order.get("kind") == "sequential":
            block_rows = order["block_rows"]
        state = None if resume is None else dict(resume)
        return SequentialReader(
            self.dataset,
            list(self.columns),
            self.name,
            seed,
            block_rows,
            state,
            self.files,
            self.most,
        )

    def changes(self) -> str:
        """Say what differs from the run that is resumed."""
        return "other rows"

    @property
    def warning(self) -> str:
        """What this source cannot promise, and the way out."""
        return (
            f"{self.name} does not say how many rows it has: every rank reads all of it, rows are "
            f"mixed {self.block_rows} at a time, and resuming depends on the state that `datasets` "
            "keeps; `hpdist convert CONFIG --out FOLDER` writes it as Parquet once, which has none "
            "of these limits"
        )


@dataclass(frozen=True, eq=False)
class MixedRows:
    """Rows of several sets, in fixed proportions."""

    parts: tuple[ParquetRows | UnlabeledTable, ...]
    weights: tuple[float, ...]
    name: str

    @property
    def column(self) -> Column:
        """The column that the model sees; every part's is renamed to it."""
        return self.parts[0].column

    def values(self, rows: Rows) -> Values:
        """The stored values of rows, after each part's filter and map."""
        found = Values([])
        for number, part in rows.parts:
            own = self.parts[number].values(part)
            found.left_out.update(len(found.values) + line for line in own.left_out)
            found.values.extend(own.values)
        return found

    def reader(
        self,
        seed: int,
        batch: int,
        *,
        order: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Reader:
        """Read every part at its own pace."""
        orders: Sequence[Any] = (order or {}).get("parts") or [None] * len(self.parts)
        total = sum(self.weights)
        readers = [
            part.reader(seed + number, max(1, round(batch * weight / total)), order=o, stop=stop)
            for number, (part, weight, o) in enumerate(
                zip(self.parts, self.weights, orders, strict=False)
            )
        ]
        lengths = [_last_id(part) + 1 for part in self.parts]
        offsets = list(itertools.accumulate(lengths, initial=0))[:-1]
        return MixedReader(readers, self.weights, offsets)

    def changes(self) -> str:
        """Name what differs in which part."""
        return "; ".join(f"{part.name}: {part.changes()}" for part in self.parts)


AnyUnlabeled: TypeAlias = "UnlabeledTable | ParquetRows | SequentialRows | MixedRows"


def row_count(rows: AnyUnlabeled) -> int | None:
    """How many rows there are to learn from; None where only reading or a filter says."""
    if isinstance(rows, MixedRows):
        counts = [row_count(part) for part in rows.parts]
        return sum(filter(None, counts)) if all(counts) else None
    if isinstance(rows, SequentialRows) or rows.functions.keep is not None:
        return None
    return rows.index.row_count if isinstance(rows, ParquetRows) else len(rows)


def _last_id(rows: ParquetRows | UnlabeledTable) -> int:
    if isinstance(rows, ParquetRows):
        return rows.index.id_count - 1
    return int(rows.ids.max())
