"""Decoded rows in memory: an array, or arrays by name, whose first dimension is rows.

They are to numpy what the structures of `hpdist.data.structures` are to torch, which a decoding
process does without. A layout says what one row is:

    layout = {"values": ArrayLayout((16,), np.dtype("float32")), …}
    rows = mapped_arrays(layout, 8, memory)  # {"values": [8, 16], …}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hpdist.data.decode.encoded import Array

Arrays: TypeAlias = "Array | Mapping[str, Array]"
Shape: TypeAlias = tuple[int, ...] | Mapping[str, tuple[int, ...]]

_ALIGNED = 64  # bytes that every array of shared memory begins at a multiple of


@dataclass(frozen=True)
class ArrayLayout:
    """One row of an array: its shape and its dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout: TypeAlias = ArrayLayout | Mapping[str, ArrayLayout]


def shape_of(layout: Layout) -> Shape:
    """Give the shape of a row, or the shapes by name."""
    if isinstance(layout, ArrayLayout):
        return layout.shape
    return {name: one.shape for name, one in layout.items()}


def slice_rows(arrays: Arrays, rows: slice | int | Array) -> Arrays:
    """View some rows, or one row without the dimension of rows; take those of given places."""
    if isinstance(arrays, np.ndarray):
        return arrays[rows, ...]  # also of one number a row, a view
    return {name: array[rows, ...] for name, array in arrays.items()}


def copy_rows(source: Arrays, target: Arrays) -> None:
    """Copy all rows into arrays of the same shapes."""
    for one, other in zip(_each(source), _each(target), strict=True):
        other[...] = one


def clear_rows(arrays: Arrays) -> None:
    """Set every number to zero."""
    for array in _each(arrays):
        array[...] = 0


def check_rows(layout: Layout, rows: int, arrays: Arrays) -> None:
    """Raise ValueError unless arrays have room for exactly so many rows of a layout."""
    named, found = _by_name(layout), _by_name(arrays)
    for name, one in named.items():
        shape = found[name].shape if name in found else ()
        if shape != (rows, *one.shape):
            whose = f" of {name!r}" if name else ""
            raise ValueError(
                f"{rows} rows of {shown_shape(one.shape)}{whose} do not fit into "
                f"{shown_shape(shape)}"
            )


def memory_size(layout: Layout, rows: int) -> int:
    """Count the bytes that `mapped_arrays` needs for so many rows."""
    ends = [at + rows * one.bytes for at, one in _placed(layout, rows)]
    return max(ends, default=0)


def mapped_arrays(layout: Layout, rows: int, memory: Any) -> Arrays:
    """View memory as so many rows of a layout, its arrays one behind the other."""
    views = [
        np.frombuffer(memory, one.dtype, rows * math.prod(one.shape), at).reshape(rows, *one.shape)
        for at, one in _placed(layout, rows)
    ]
    return views[0] if isinstance(layout, ArrayLayout) else dict(zip(layout, views, strict=True))


def shown_shape(shape: tuple[int, ...]) -> str:
    """Write a shape for a message: `3x8x8`."""
    return "x".join(str(length) for length in shape)


def _placed(layout: Layout, rows: int) -> Iterator[tuple[int, ArrayLayout]]:
    at = 0
    for one in _by_name(layout).values():
        yield at, one
        at += -(-rows * one.bytes // _ALIGNED) * _ALIGNED


def _by_name(arrays: Any) -> Mapping[str, Any]:
    return arrays if isinstance(arrays, Mapping) else {"": arrays}


def _each(arrays: Arrays) -> Iterator[Array]:
    yield from _by_name(arrays).values()
