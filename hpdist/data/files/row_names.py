"""How messages name a row of a table: by its number, and by the file that it is in, where known."""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hpdist.messages.redaction import redacted

_files: weakref.WeakKeyDictionary[Any, tuple[list[str], list[int]]] = weakref.WeakKeyDictionary()
"""The files of tables that were joined from files, and the row behind the last of each."""


def remember_files(table: Any, rows: Iterable[tuple[str, int]]) -> None:
    """Note which files a table's rows come from, given how many each has, in order."""
    files = list(rows)
    ends = list(itertools.accumulate(count for _, count in files))
    if files and ends[-1] == len(table):
        _files[table] = [path for path, _ in files], ends


def same_files(table: Any, view: Any) -> None:
    """Note that a view has the rows of a table, in its order."""
    if table in _files:
        _files[view] = _files[table]


def describe_row(table: Any, row: int) -> str:
    """Say which row of a `datasets.Dataset` it is: `row 7 (photos/cat/3.jpg)`, or `row 7`.

    Rows of images and sound that were read from files know their paths. Nothing is decoded, and
    only the paths are read. Of other rows it is the file of the table, and which row of it, where
    the table is as it was opened.
    """
    path = row_file(table, row)
    if path is not None:
        return f"row {row} ({redacted(path)})"
    place = _place(table, row)
    return f"row {row}" if place is None else f"row {row} ({place})"


def describe_rows(table: Any, rows: Sequence[int]) -> str:
    """Say which rows cannot be read, with the file of the first one; nothing is read for it."""
    named = f"rows {[int(row) for row in rows[:3]]}…"
    place = _place(table, int(rows[0])) if len(rows) else None
    return named if place is None else f"{named} (the first: {place})"


def _place(table: Any, row: int) -> str | None:
    """Where a row of a table lies that was joined from files: the file, and which row of it."""
    place = place_of_row(table, row)
    return None if place is None else f"{place[0]}, row {place[1]}"


def place_of_row(table: Any, row: int) -> tuple[str, int] | None:
    """Give the file that a row of a joined table lies in, and which row of it; None if unknown."""
    if table not in _files:
        return None
    paths, ends = _files[table]
    number = bisect.bisect_right(ends, row)
    return paths[number], row - (ends[number - 1] if number else 0)


def row_file(table: Any, row: int) -> str | None:
    """Give the file that a row's image or sound was read from; None where it has none."""
    kinds = (datasets.Image, datasets.Audio)
    for name, feature in table.features.items():
        if not isinstance(feature, kinds):
            continue
        stored = table.select_columns([name]).with_format("arrow")[row : row + 1].column(name)
        path: str | None = pc.struct_field(stored, "path")[0].as_py()
        if path:
            return path
    return None
