"""The rows to predict, in the order of their ids: any part of them can be read at any time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hpdist.data.config import Loading, Unlabeled
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column
from hpdist.data.files.row_names import place_of_row
from hpdist.data.kinds import InputKind
from hpdist.data.sources.labeled import UnlabeledTable
from hpdist.data.sources.unlabeled import open_unlabeled, scan_metadata
from hpdist.data.sources.unlabeled_rows import ParquetRows
from hpdist.data.stream.parquet import ParquetReader
from hpdist.data.stream.permute import Int64Array
from hpdist.data.stream.reader import Rows
from hpdist.errors import DataError, one_line

WHERE = "data"
_ONE_LANE = {"kind": "parquet", "lanes": 1, "groups_per_window": 1}


class ReadsInputs(Protocol):
    """What a model says of the rows that it takes."""

    @property
    def kind(self) -> InputKind:
        """The kind of input."""
        ...

    @property
    def spec(self) -> InputSpec:
        """How rows are decoded."""
        ...

    @property
    def column(self) -> Column:
        """The columns that it was trained on, for a dataset that has the same."""
        ...


@dataclass(frozen=True)
class _Like:
    """What opening unlabelled rows asks of the labelled ones."""

    column: Column
    kind: InputKind


class OrderedRows:
    """Rows of a dataset by their positions among those that are used, 0 to `count`.

    Args:
        rows: The opened dataset.
    """

    def __init__(self, rows: ParquetRows | UnlabeledTable) -> None:
        self.rows = rows
        self.name = rows.name
        self._reader: ParquetReader | None = None
        self._kept: tuple[int, pa.Table, str | None] | None = None  # the row group read last
        if isinstance(rows, ParquetRows):
            self._starts = np.concatenate([[0], np.cumsum(rows.index.rows, dtype=np.int64)])
            self._reader = cast(ParquetReader, rows.reader(0, 1, order=_ONE_LANE))
        else:
            self._starts = np.asarray([0, len(rows)])

    @property
    def count(self) -> int:
        """How many rows are used."""
        return int(self._starts[-1])

    @property
    def whole_count(self) -> int:
        """How many rows the split has, used or not: what ids number."""
        if isinstance(self.rows, ParquetRows):
            return sum(file.rows for file in self.rows.index.files)
        return len(self.rows.dataset)

    def record(self) -> list[list[Any]] | None:
        """Return the files as they were found, as JSON, where the dataset is Parquet."""
        return self.rows.index.record() if isinstance(self.rows, ParquetRows) else None

    def read(self, start: int, stop: int) -> Iterator[Rows]:
        """Read positions [start, stop) in runs that lie together. Raises DataError."""
        if isinstance(self.rows, UnlabeledTable):
            ids = self.rows.ids[start:stop]
            yield Rows(self._table(ids), ids, np.zeros_like(ids))
            return
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[group])
            last = min(stop, int(self._starts[group + 1]))
            if start < last:
                yield self._of_group(group, start - first, last - first)
            start, group = last, group + 1

    def places(self, ids: Int64Array, table: pa.Table) -> dict[str, pa.Array]:
        """Say where rows lie: `file`, `row_group` and `row` in it; null where that is unknown."""
        if isinstance(self.rows, ParquetRows):
            index = self.rows.index
            group = np.searchsorted(index.start, ids, side="right") - 1
            paths = pa.array([entry[0] for entry in index.record()], pa.string())
            return {
                "file": paths.take(pa.array(index.file[group])),
                "row_group": pa.array(index.number[group], pa.int32()),
                "row": pa.array(index.first[group] + ids - index.start[group], pa.int64()),
            }
        places = [place_of_row(self.rows.dataset, int(row)) for row in ids]
        files = [None if place is None else place[0] for place in places]
        named = _named_files(self.rows.dataset, table)
        return {
            "file": named if named is not None else pa.array(files, pa.string()),
            "row_group": pa.nulls(len(ids), pa.int32()),
            "row": pa.array(
                [int(i) if p is None else p[1] for i, p in zip(ids, places, strict=True)],
                pa.int64(),
            ),
        }

    def describe(self, row: int) -> str:
        """Name the row of an id, for messages."""
        if isinstance(self.rows, ParquetRows):
            return self.rows.index.describe(row)
        return self.rows.describe(row)

    def close(self) -> None:
        """Let go of open files."""
        if self._reader is not None:
            self._reader.close()

    def _of_group(self, group: int, start: int, stop: int) -> Rows:
        assert isinstance(self.rows, ParquetRows)
        assert self._reader is not None
        if self._kept is None or self._kept[0] != group:
            self._kept = group, *self._reader.read_group(group)
        _, table, reason = self._kept
        ids = self.rows.index.ids(group, start, stop)
        unread = {} if reason is None else dict.fromkeys(range(stop - start), reason)
        return Rows(table.slice(start, stop - start), ids, np.zeros_like(ids), unread)

    def _table(self, ids: Int64Array) -> pa.Table:
        assert isinstance(self.rows, UnlabeledTable)
        together = len(ids) > 0 and int(ids[-1]) - int(ids[0]) + 1 == len(ids)
        try:
            wanted = slice(int(ids[0]), int(ids[-1]) + 1) if together else ids.tolist()
            return self.rows.dataset[wanted]
        except Exception as error:
            raise DataError(
                f"{self.name}: cannot read rows {int(ids[0])} to {int(ids[-1])}: {one_line(error)}"
            ) from error


def open_rows(
    config: Unlabeled, model: ReadsInputs, loading: Loading, columns: Sequence[str]
) -> OrderedRows:
    """Open a dataset for a model, with further columns that are carried along.

    Parquet is read row group by row group, wherever it lies; anything else as a table. Raises
    DataError where the dataset is not what the model takes.
    """
    carried = tuple(dict.fromkeys([*config.columns, *columns]))
    streamed = config.model_copy(update={"streaming": True, "columns": carried})
    like = cast(Any, _Like(model.column, model.kind))
    found = scan_metadata(streamed, like, model.spec, loading, None, WHERE)
    if found == [None]:
        streamed = streamed.model_copy(update={"streaming": False})
    rows = open_unlabeled(streamed, like, model.spec, where=WHERE, found=found, loading=loading)
    if not isinstance(rows, (ParquetRows, UnlabeledTable)):
        raise DataError(f"{WHERE}: {rows.name} is no single dataset with a known number of rows")
    return OrderedRows(rows)


def _named_files(dataset: Any, table: pa.Table) -> pa.Array | None:
    """The files that images or sounds of a table were read from; None where it has none."""
    for name, feature in dataset.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            stored = table.column(name).combine_chunks()
            paths = pc.struct_field(stored, "path").cast(pa.string())
            if paths.null_count < len(paths):
                return paths
    return None
