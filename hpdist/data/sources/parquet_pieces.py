"""Where the rows of local Parquet files lie that are read as a table: row groups, or parts of them.

pieces = Pieces.of([Span(paths, 0, 1000)], footers, ["image", "label"])
pieces.starts[-1]  # the number of rows
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.files.open import FileVersion
from hpdist.data.stream.index import DataFile
from hpdist.data.stream.permute import Int64Array


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of files that follow one another."""

    files: Sequence[str]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of row groups in the order of a table's rows; a whole one is a part too."""

    files: tuple[DataFile, ...]
    file: Int64Array
    """The file of each, in `files`, [pieces]."""
    number: Int64Array
    """Its row group's number there, [pieces]."""
    first: Int64Array
    """The first of the row group's rows, [pieces]."""
    rows: Int64Array
    """How many there are, [pieces]."""
    of_group: Int64Array
    """How many rows the whole row group has, [pieces]."""
    sizes: Mapping[str, Int64Array]
    """Bytes of the whole row group in memory, by column, as its footer says, [pieces]."""

    @staticmethod
    def of(
        spans: Iterable[Span], footers: Mapping[str, pq.FileMetaData], columns: Sequence[str]
    ) -> Pieces:
        """Lay out rows of files in the order of the spans."""
        places: dict[str, int] = {}
        found: list[tuple[int, ...]] = []
        for span in spans:
            begin = 0
            for path in span.files:
                place = places.setdefault(path, len(places))
                for number in range(footers[path].num_row_groups):
                    group = footers[path].row_group(number)
                    low = max(span.start - begin, 0)
                    high = min(span.stop - begin, group.num_rows)
                    begin += group.num_rows
                    if low < high:
                        sizes = _column_bytes(group)
                        own = (sizes.get(name, 0) for name in columns)
                        found.append((place, number, low, high - low, group.num_rows, *own))
        numbers = np.asarray(found, np.int64).reshape(len(found), 5 + len(columns)).T.copy()
        files = [
            DataFile(path, FileVersion.of_local(os.stat(path)), footers[path].num_rows, "")
            for path in places
        ]
        file, in_file, first, rows, of_group, *held = numbers
        by_column = dict(zip(columns, held, strict=True))
        return Pieces(tuple(files), file, in_file, first, rows, of_group, by_column)

    @cached_property
    def starts(self) -> Int64Array:
        """Where each piece begins in the table, and last how many rows there are, [pieces + 1]."""
        return np.concatenate([[0], np.cumsum(self.rows)])

    def group_bytes(self, columns: Iterable[str]) -> Int64Array:
        """Bytes in memory of some columns of each piece's whole row group, [pieces]."""
        return sum((self.sizes[name] for name in columns), np.zeros_like(self.rows))

    def bytes_of(self, rows: Int64Array, columns: Iterable[str]) -> int:
        """Estimate the bytes in memory of some columns of ascending rows of the table."""
        counts = np.diff(np.searchsorted(rows, self.starts))
        return int((self.group_bytes(columns) * (counts / self.of_group)).sum())


def spans_of(
    split: str, splits: Mapping[str, Sequence[str]], footers: Mapping[str, pq.FileMetaData]
) -> list[Span]:
    """Find the rows that a split specification names. Raises what `datasets` does of a wrong one.

    `splits` are the files of every split that it names.
    """
    lengths = {
        name: sum(footers[path].num_rows for path in paths) for name, paths in splits.items()
    }
    spans = []
    for part in datasets.ReadInstruction.from_spec(split).to_absolute(lengths):
        stop = lengths[part.splitname] if part.to is None else part.to
        spans.append(Span(splits[part.splitname], part.from_ or 0, stop))
    return spans


def _column_bytes(group: Any) -> dict[str, int]:
    """Bytes in memory of a row group's columns, nested ones as a whole."""
    found: dict[str, int] = {}
    for leaf in range(group.num_columns):
        chunk = group.column(leaf)
        name = chunk.path_in_schema.partition(".")[0]
        found[name] = found.get(name, 0) + chunk.total_uncompressed_size
    return found
