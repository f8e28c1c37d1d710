"""Vectors of numbers: lists of equal length, or the columns of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from hpdist.data.decode.arrays import Arrays
from hpdist.data.decode.encoded import Array
from hpdist.data.decode.spec import ArraySpec, require_shape, require_value
from hpdist.messages.human import counted

if TYPE_CHECKING:  # which imports `datasets`
    from hpdist.data.decode.categories import Categories


@dataclass(frozen=True)
class VectorSpec(ArraySpec):
    """Rows are float32 [features]."""

    kind: ClassVar[str] = "table"
    shape: tuple[int, ...]
    missing: bool = False
    """Whether a vector may hold NaN, for the views to fill in."""
    names: tuple[str, ...] = ()
    """The features' names, where they are columns or categories of these."""
    categories: Categories | None = None
    """The categories of the columns that hold no numbers."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Name the features, where they have names."""
        return self.names

    @property
    def view_arguments(self) -> tuple[Any, ...]:
        """Give the column that every feature comes from, where several come from one."""
        return () if self.categories is None else (self.categories.groups,)

    def with_categories(self, categories: Categories) -> VectorSpec:
        """Give the spec in which columns become the features of their categories."""
        features = categories.features
        return replace(self, shape=(len(features),), names=features, categories=categories)

    def describe(self) -> str:
        """Say what a row is, for the opening lines of a run."""
        return f"vectors of {counted(self.shape[0], 'number')}"

    def decode_row(self, value: Any, out: Arrays) -> None:
        """Put numbers into a row. Raises ValueError where one is none, or not finite."""
        require_value(value, is_array=True)
        row = value if self.categories is None else self.categories.encode(value)
        vector = _finite(row, self.missing, self.names)
        require_shape(vector, self.shape)
        cast(Array, out)[...] = vector


def _finite(array: Array, missing: bool, names: tuple[str, ...]) -> Array:
    """Numbers as float32, all of them finite, or else NaN where they may be `missing`."""
    if array.dtype.kind not in "iufb":
        raise ValueError(f"a vector of {array.dtype} is not one of numbers")
    with np.errstate(over="ignore"):  # infinities are refused below
        vector = array.astype(np.float32)
    wrong = np.isinf(vector) if missing else ~np.isfinite(vector)
    if wrong.any():
        place = int(wrong.argmax())
        where = f" in column {names[place]!r}" if place < len(names) else ""
        hint = "; views.missing: mean, of views.name: table, fills in what is missing"
        raise ValueError(
            f"it holds NaN or infinity{where}, or leaves float32's range"
            f"{hint if np.isnan(array[place]) else ''}"
        )
    return vector
