"""How messages name a row of a table: by its number, and by its own file where it has one."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hpdist.data.retry import redacted


def describe_row(table: Any, row: int) -> str:
    """Say which row of a `datasets.Dataset` it is: `row 7 (photos/cat/3.jpg)`, or `row 7`.

    Rows of images and sound that were read from files know their paths. Nothing is decoded, and
    only the paths are read.
    """
    path = row_file(table, row)
    return f"row {row}" if path is None else f"row {row} ({redacted(path)})"


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
