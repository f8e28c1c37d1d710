"""How inputs are decoded, by the first of the labelled rows that can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hpdist.data.decode.categories import Categories
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.decode.vector import VectorSpec
from hpdist.data.files.named_files import USUAL_LIMITS, Limits
from hpdist.data.kinds.base import TableOfRows
from hpdist.errors import DataError, one_line

_LOOKED_AT = 64  # rows, in search of one that can be decoded

SpecT = TypeVar("SpecT")


def input_spec(
    rows: TableOfRows,
    size: int | None = None,
    *,
    missing: bool = False,
    mode: str | None = None,
    categories: Categories | None = None,
    limits: Limits = USUAL_LIMITS,
) -> ImageSpec | VectorSpec:
    """Derive how pixels or numbers are decoded from the first labelled row in use that can be.

    `size` resizes every image to size x size; `missing` lets vectors hold NaN; `mode` is what
    images become (L, RGB or RGBA), by default what that row's is; `categories` are those of columns
    that hold no numbers. Raises DataError when none of the first rows is an image or array.
    """
    spec = first_spec(rows, lambda value: spec_of_value(value, size, mode, limits))
    if not isinstance(spec, VectorSpec):
        return spec
    spec = replace(spec, missing=missing)
    if categories is not None:
        return spec.with_categories(categories)
    return spec if isinstance(rows.column, str) else replace(spec, names=rows.column)


def first_spec(rows: TableOfRows, make: Callable[[Any], SpecT]) -> SpecT:
    """Make a spec of the first stored value that it can be made of.

    Raises DataError, with the error of the first row, where none of the first rows will do.
    """

    def made(row: int) -> SpecT | Exception:
        try:
            return make(rows.read_split([row])[0])
        except Exception as error:  # image libraries raise nearly everything on a damaged file
            return error

    found = map(made, rows.ids[:_LOOKED_AT].tolist())
    first_error = next(found)
    if not isinstance(first_error, Exception):
        return first_error
    for spec in found:
        if not isinstance(spec, Exception):
            return spec
    raise DataError(
        f"{rows.name}: {rows.describe(int(rows.ids[0]))}, column {rows.column!r}, tells no input "
        f"shape: {one_line(first_error)}"
    ) from first_error


def spec_of_value(
    value: Any,
    size: int | None = None,
    mode: str | None = None,
    limits: Limits = USUAL_LIMITS,
) -> ImageSpec | VectorSpec:
    """Derive the spec of pixels or numbers from one stored value. Raises ValueError."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        if size:
            raise ValueError(f"views.size is {size}, but the rows are vectors: remove views.size")
        return VectorSpec(value.shape)
    return ImageSpec.of(value, size, mode, limits)
