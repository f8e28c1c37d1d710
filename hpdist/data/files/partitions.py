"""Columns that are written into the names of folders: `year=2020/label=cat/part-0.parquet`.

    columns = partitions(["/set/year=2020/a.parquet"], "/set")
    columns.schema  # year: int64
    columns.values["/set/year=2020/a.parquet"]  # {'year': 2020}

Spark, Hive, pandas and Polars write sets so. A column is of integers where every folder names one
(with no leading zeros, which a number would lose), else of strings; Spark's name for a null is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.data.files.paths import below

_FOLDER = re.compile(r"([^=/]+)=(.*)")
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Partitions:
    """The columns that the names of folders add, and each file's values of them."""

    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return len(self.schema) > 0

    def added(self, schema: pa.Schema) -> pa.Schema:
        """A file's columns and those of the folders; a column that the file has stays its own."""
        more = [column for column in self.schema if column.name not in schema.names]
        return pa.schema([*schema, *more], metadata=schema.metadata)

    def constant(self, path: str, column: pa.Field, rows: int) -> pa.Array:
        """A file's value of a column, once for each of so many rows; null where it has none."""
        value = pa.scalar(self.values.get(path, {}).get(column.name), column.type)
        return pa.repeat(value, rows)


def partitions(paths: Sequence[str], base: str) -> Partitions:
    """Read the columns in the names of the folders between `base` and each file.

    Without a base, as of files on a server, there are none.
    """
    if not base:
        return Partitions()
    text: dict[str, dict[str, str | None]] = {}
    for path in paths:
        folders = below(path, base).split(os.sep)[:-1]
        found = [match for folder in folders if (match := _FOLDER.fullmatch(folder))]
        text[path] = {m[1]: None if m[2] == _NULL else unquote(m[2]) for m in found}
    names = dict.fromkeys(name for one in text.values() for name in one)
    kinds = {name: _kind([one.get(name) for one in text.values()]) for name in names}
    values = {
        path: {
            name: int(value) if value is not None and kinds[name] == pa.int64() else value
            for name, value in one.items()
        }
        for path, one in text.items()
    }
    schema = pa.schema([pa.field(name, kind) for name, kind in kinds.items()])
    return Partitions(schema, values if names else {})


def _kind(values: Sequence[str | None]) -> pa.DataType:
    whole = all(value is None or _INTEGER.fullmatch(value) for value in values)
    return pa.int64() if whole else pa.string()
