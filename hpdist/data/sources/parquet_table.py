"""A table of Parquet files that is read where it lies: nothing of it is copied.

    table.select_columns(["label"])[:]                 # reads that column alone
    rows, notes = rows_of(table, ("image",), ids, …)   # the rows that a run uses

`datasets` copies a whole set into its cache, where any row can be had at once. Of Parquet, the
least that is read is a row group. So chosen rows, such as labelled ones, are held in memory once
their row group has been read, and sets to measure on are read in order. Where neither will do,
`datasets` makes its copy, and a note says so.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets.table import table_cast

from hpdist.data.decode.arrow_types import plain_table
from hpdist.data.files.open import Retry
from hpdist.data.files.partitions import Partitions
from hpdist.data.files.row_names import same_files
from hpdist.data.files.unpacked import SETTING
from hpdist.data.sources.parquet_pieces import Pieces
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.row_groups import RowGroups

MOST_HELD = 1 << 30
"""Bytes of chosen rows that a rank holds."""
LARGEST_GROUP = 1 << 29
"""Bytes of a row group that is read for one of its rows."""
_RECENT = 64 << 20  # bytes of row groups that were read last
_AT_ONCE = 8  # row groups that are read side by side


class ParquetTable:
    """Rows of Parquet files by their numbers, as a `datasets.Dataset` in Arrow format gives them.

    Several threads may read at once.

    Args:
        pieces: Where the rows lie.
        features: The columns, in types that hold what all files have of them.
        folders: Columns that the names of folders add.
        most: Bytes that a row group may take, unless that is 16 times what it takes in its file.
        copied: Opens the same rows as a `datasets.Dataset`, which copies them.
        chosen: The only rows that will be read again and again, ascending: they are held in memory.
    """

    def __init__(
        self,
        pieces: Pieces,
        features: datasets.Features,
        folders: Partitions,
        most: int,
        copied: Callable[[], datasets.Dataset],
        chosen: Int64Array | None = None,
    ) -> None:
        self.features = features
        self.copied = copied
        self._pieces = pieces
        self._folders = folders
        self._most = most
        self._chosen = chosen
        self._schema = features.arrow_schema
        self._groups = RowGroups(list(features), Retry(), threading.Event(), most, SETTING)
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, pa.Table] = OrderedDict()  # the one read last comes last
        self._recent_bytes = 0
        self._held: dict[int, pa.Table] = {}  # the chosen rows of pieces

    def __len__(self) -> int:
        return int(self._pieces.starts[-1])

    @property
    def column_names(self) -> list[str]:
        """The columns."""
        return list(self.features)

    @property
    def format(self) -> dict[str, Any]:
        """How rows are given, as `datasets` says it: by Arrow, whatever is asked for."""
        return {"type": "arrow"}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in memory, by what the footers say."""
        return self._pieces.bytes_of(np.arange(len(self)), self.features)

    def select_columns(self, columns: Sequence[str]) -> ParquetTable:
        """Give some columns of the same rows."""
        return self._like({name: self.features[name] for name in columns}, self._chosen)

    def with_format(self, kind: str) -> ParquetTable:
        """Give the same rows as Arrow tables, which is all that it can."""
        if kind != "arrow":
            raise ValueError(f"rows of Parquet files are given as Arrow tables, not as {kind}")
        return self

    def holding(self, chosen: Int64Array) -> ParquetTable:
        """Give the same table, which holds chosen rows once they have been read."""
        return self._like(self.features, chosen)

    def bytes_of(self, rows: Int64Array) -> int:
        """Estimate the bytes of ascending rows in memory."""
        return self._pieces.bytes_of(rows, self.features)

    @property
    def largest_group(self) -> int:
        """Bytes of the largest row group in memory, by what the footers say."""
        return int(self._pieces.group_bytes(self.features).max(initial=0))

    def __getitem__(self, rows: slice | Sequence[int]) -> pa.Table:
        """Read rows in the order in which they are asked for. Raises what reading a file does."""
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
            if rows.step == 1 and self._chosen is None:
                return self._cast(self._between(rows.start, rows.stop))
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        piece = np.searchsorted(self._pieces.starts, wanted, side="right") - 1
        order = piece.argsort(kind="stable")
        numbers, begins = np.unique(piece[order], return_index=True)
        lines = np.split(order, begins[1:])
        parts = [
            self._rows_of(number, wanted[of] - self._pieces.starts[number])
            for number, of in zip(numbers.tolist(), lines, strict=False)  # no rows are one part
        ]
        return self._cast(parts, order.argsort(kind="stable"))

    def _like(self, features: Any, chosen: Int64Array | None) -> ParquetTable:
        features = datasets.Features(features)
        same = (self._pieces, features, self._folders, self._most, self.copied, chosen)
        view = ParquetTable(*same)
        same_files(self, view)
        return view

    def _between(self, start: int, stop: int) -> list[pa.Table]:
        """Read rows that follow one another."""
        if start >= stop:
            return []
        starts = self._pieces.starts
        first = int(np.searchsorted(starts, start, side="right")) - 1
        end = int(np.searchsorted(starts, stop, side="left"))
        ends = (first, end - 1)  # those that the rows before or behind may be in

        def read(number: int) -> pa.Table:
            return self._piece(number, keep=number in ends)

        if end - first <= 2:
            tables = [read(number) for number in range(first, end)]
        else:
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hpdist-table") as pool:
                tables = list(pool.map(read, range(first, end)))
        low = start - int(starts[first])
        tables[0] = tables[0].slice(low)
        tables[-1] = tables[-1].slice(0, len(tables[-1]) - (int(starts[end]) - stop))
        return tables

    def _rows_of(self, number: int, places: Int64Array) -> pa.Table:
        """Read rows of a piece, by their places in it."""
        held = self._chosen_places(number)
        at = np.searchsorted(held, places)
        if len(held) and (held[np.minimum(at, len(held) - 1)] == places).all():
            if number not in self._held:
                # Taken, so that nothing else of the row group stays in memory.
                self._held[number] = self._piece(number, keep=False).take(held)
            return self._held[number].take(at)
        return self._piece(number).take(places)

    def _chosen_places(self, number: int) -> Int64Array:
        if self._chosen is None:
            return np.zeros(0, np.int64)
        start, stop = self._pieces.starts[number : number + 2]
        low, high = np.searchsorted(self._chosen, [start, stop])
        places: Int64Array = self._chosen[low:high] - start
        return places

    def _piece(self, number: int, keep: bool = True) -> pa.Table:
        """Read a piece in the types of its file, with the columns that folders name."""
        with self._lock:
            if number in self._recent:
                self._recent.move_to_end(number)
                return self._recent[number]
        pieces = self._pieces
        file = pieces.files[int(pieces.file[number])]
        table = plain_table(self._groups.read(file, int(pieces.number[number])))
        for column in self._folders.schema:
            if column.name in self.features and column.name not in table.column_names:
                values = self._folders.constant(file.path, column, len(table))
                table = table.append_column(column, values)
        table = table.select(self.column_names)
        table = table.slice(int(pieces.first[number]), int(pieces.rows[number]))
        if keep:
            self._remember(number, table)
        return table

    def _remember(self, number: int, table: pa.Table) -> None:
        with self._lock:
            if number not in self._recent:
                self._recent_bytes += table.nbytes
            self._recent[number] = table
            while self._recent_bytes > _RECENT and len(self._recent) > 1:
                self._recent_bytes -= self._recent.popitem(last=False)[1].nbytes

    def _cast(self, parts: Sequence[pa.Table], order: Int64Array | None = None) -> pa.Table:
        """Join tables in the types of the features; `order` is that of the rows of the result."""
        joined = [
            pa.concat_tables(list(same))
            for _, same in itertools.groupby(parts, key=lambda part: part.schema.types)
        ]
        if order is not None and len(joined) == 1:
            joined, order = [joined[0].take(order)], None
        cast = [self._as_features(table) for table in joined]
        whole = pa.concat_tables(cast) if cast else self._schema.empty_table()
        return whole if order is None else whole.take(order)

    def _as_features(self, table: pa.Table) -> pa.Table:
        if table.schema.types == self._schema.types:
            return pa.Table.from_arrays(table.columns, schema=self._schema)
        return table_cast(table, self._schema)


def rows_of(
    table: Any, columns: Sequence[str], ids: Int64Array, where: str, *, chosen: bool
) -> tuple[Any, list[str]]:
    """Take columns of a table in Arrow format for reading the rows `ids`, which ascend.

    With `chosen` they are read in any order, again and again; else in their own. Gives what a
    person should know, too.
    """
    view = table.select_columns(list(columns)).with_format("arrow")
    same_files(table, view)
    if not isinstance(view, ParquetTable):
        return view, []
    largest = view.largest_group
    if largest > LARGEST_GROUP:
        reason = (
            f"a row group of it takes {largest >> 20} MiB, which is much to read for a row; write "
            "it with smaller ones"
        )
    elif chosen and view.bytes_of(ids) > MOST_HELD:
        reason = (
            f"the {len(ids)} rows in use take {view.bytes_of(ids) >> 20} MiB, more than a rank "
            "holds in memory"
        )
    else:
        return (view.holding(ids) if chosen else view), []
    copied = table.copied().select_columns(list(columns)).with_format("arrow")
    same_files(table, copied)
    return copied, [f"note: {where}: its files are copied into the cache of `datasets`: {reason}"]
