"""The user's own filter and map over stored rows: neither moves any other row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from hpdist.config.component import import_object
from hpdist.data.config import UnlabeledSource
from hpdist.data.decode.encoded import Unreadable
from hpdist.data.decode.stored_values import Column, stored_inputs, stored_values
from hpdist.data.files.named_files import NOTHING, PathRule, named
from hpdist.errors import ConfigError, describe

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFunctions:
    """What is done to a row before it is decoded.

    A row, as {column: stored value}, that `keep` answers False for holds its place and counts for
    nothing; so does one that either raises an error for, which makes it a bad row.
    """

    column: Column
    keep: Callable[[Row], bool] | None = None
    map: Callable[[Row], Row] | None = None
    rule: PathRule = NOTHING
    """Which files the rows, and what `map` makes of them, may name."""
    paired_column: str | None = None
    """A column whose value comes with the input's, as the second of a pair."""

    def values(self, table: pa.Table) -> Values:
        """The input column's stored values, mapped, and which rows the filter leaves out."""
        if self.keep is None and self.map is None:
            inputs = named(stored_inputs(table, self.column), self.rule)
            if self.paired_column is not None:
                inputs = list(
                    zip(inputs, stored_values(table.column(self.paired_column)), strict=True)
                )
            return Values(inputs)
        columns = {name: stored_values(table.column(name)) for name in table.column_names}
        found = Values([])
        for line in range(len(table)):
            row = {name: values[line] for name, values in columns.items()}
            given = row[self.column] if isinstance(self.column, str) else row
            if isinstance(given, Unreadable) or given is None:
                found.values.append(given)
                continue
            try:
                kept = self.keep is None or bool(self.keep(row))
                mapped = self.map(row) if kept and self.map is not None else row
                (value,) = named([_stored(mapped, self.column)], self.rule)
                pair = value if self.paired_column is None else (value, mapped[self.paired_column])
                found.values.append(pair)
            except Exception as error:  # whatever the user's function raises
                found.values.append(Unreadable(f"filter or map failed: {describe(error)}"))
                continue
            if not kept:
                found.left_out.add(line)
        return found


@dataclass
class Values:
    """Stored values of rows, and the lines of those that the filter leaves out."""

    values: list[Any]
    left_out: set[int] = field(default_factory=set)


def row_functions(
    config: UnlabeledSource,
    column: Column,
    where: str,
    paired_column: str | None = None,
    rule: PathRule = NOTHING,
) -> RowFunctions:
    """The functions that a config names. Raises ConfigError where one cannot be imported."""
    keep, change = (_function(getattr(config, key), f"{where}.{key}") for key in ("filter", "map"))
    return RowFunctions(column, keep, change, rule, paired_column)


def _function(name: str | None, where: str) -> Any:
    if name is None:
        return None
    try:
        found = import_object(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{where}: {name} is {type(found).__name__}, not a function")
    return found


def _stored(row: Row, column: Column) -> Any:
    """A row's input, as stored ones come: lists of numbers and several columns as arrays."""
    if not isinstance(column, str):
        values = [row[name] for name in column]
        texts = any(isinstance(value, str) for value in values)
        return np.asarray(values, object if texts else np.float64)  # None as NaN
    value = row[column]
    return np.asarray(value) if isinstance(value, (list, tuple)) else value
