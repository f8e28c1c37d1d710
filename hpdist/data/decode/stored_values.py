"""Take values out of Arrow tables as they are stored, undecoded."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from hpdist.aliases import find_moved
from hpdist.data.decode.arrow_types import plain_column
from hpdist.data.decode.encoded import Array, Unreadable

Column: TypeAlias = str | tuple[str, ...]
"""Where a row's input is: in one column, or in several, of a number or a category each."""


def names_of(column: Column) -> tuple[str, ...]:
    """Give the names of the columns that an input is in."""
    return (column,) if isinstance(column, str) else column


def stored_values(column: pa.ChunkedArray) -> list[Any]:
    """Take a column's values as they are stored, one per row, undecoded.

    Encoded images are bytes or {bytes, path}; lists of numbers, nested or not, are arrays; a list
    that is ragged or holds nulls is `Unreadable`, and so is text that is not UTF-8.
    """
    values: list[Any] = []
    for chunk in plain_column(column).chunks:
        storage = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        if _is_list(storage.type):
            values += [_nested(storage.slice(row, 1)) for row in range(len(storage))]
        else:
            values += _plain(storage)
    return values


def stored_inputs(table: pa.Table, column: Column) -> list[Any]:
    """Take the inputs as they are stored, one per row; of several columns a vector, null as NaN.

    Where a column holds other than numbers the vector is one of objects.
    """
    if isinstance(column, str):
        return stored_values(table.column(column))
    columns = [plain_column(table.column(name)) for name in column]
    of_numbers = [_is_number(one.type) for one in columns]
    if all(of_numbers):
        return list(np.stack([_numbers(one) for one in columns], axis=1))
    rows = np.empty((len(table), len(columns)), object)
    for number, (one, is_number) in enumerate(zip(columns, of_numbers, strict=True)):
        rows[:, number] = _numbers(one) if is_number else stored_values(one)
    return list(rows)


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    return any(check(kind) for check in checks)


def _numbers(column: pa.ChunkedArray) -> Array:
    """A column of numbers or booleans as float64 [rows]."""
    return np.asarray(pc.cast(column, pa.float64(), safe=False).to_numpy())


def _plain(array: pa.Array) -> list[Any]:
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_plain_value(value) for value in array]


def _plain_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unreadable("it holds text that is not UTF-8")


def _is_list(type_: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    )


def _nested(array: pa.Array) -> Array | Unreadable | None:
    """One row's nested lists as an array; None for a null."""
    if array.null_count:
        return None
    shape = []
    while _is_list(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            return Unreadable("its lists differ in length or hold nulls")
        shape.append(lengths[0])
        array = array.flatten()
    if array.null_count:
        return Unreadable("its lists hold nulls")
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def __getattr__(name: str) -> object:
    """Find what this module held before."""
    return find_moved(__name__, name)
