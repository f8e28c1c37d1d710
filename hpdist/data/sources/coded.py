"""A column of few different values: each value once, and a number for every row.

    values = coded(table.column("label"))  # None where nearly every row has another value
    has_mark = values.each(is_mark, bool)   # asks once for each value, not for each row

So a column of ten million labels takes a byte or two a row, and no Python object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

_LEAST_REPEATED = 4  # rows of a value, on average, for which this is worth while


class CodedValues(Sequence[Any]):
    """A sequence of values by their codes.

    Args:
        values: The different values, in the order in which they occur first; None is one of them.
        codes: Each row's place among them, integers [rows].
    """

    def __init__(self, values: list[Any], codes: npt.NDArray[Any]) -> None:
        self.values = values
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[Any]:
        return (self.values[code] for code in self.codes.tolist())

    @overload
    def __getitem__(self, row: int) -> Any: ...

    @overload
    def __getitem__(self, row: slice) -> list[Any]: ...

    def __getitem__(self, row: int | slice) -> Any:
        """Give the value of a row, or the values of some as a list."""
        codes = self.codes[row]
        if isinstance(row, slice):
            return [self.values[code] for code in codes.tolist()]
        return self.values[codes]

    def each(self, function: Callable[[Any], Any], dtype: Any) -> npt.NDArray[Any]:
        """Give the function of every row's value, [rows]; it is called once for each value."""
        found = np.array([function(value) for value in self.values], dtype)
        return found[self.codes] if len(found) else np.zeros(len(self), dtype)

    def replaced(self, function: Callable[[Any], Any]) -> CodedValues:
        """Give the same rows with the function of their values."""
        return CodedValues([function(value) for value in self.values], self.codes)

    def among(self, rows: npt.NDArray[np.bool_]) -> list[Any]:
        """Give the different values of some rows, bool [rows], in the order of their first rows."""
        codes, first = np.unique(self.codes[rows], return_index=True)
        return [self.values[code] for code in codes[first.argsort()].tolist()]

    def first(self, value: int) -> int:
        """Give the first row that has one of the values, by its place among them."""
        return int((self.codes == value).argmax())


def coded(column: pa.ChunkedArray) -> CodedValues | None:
    """Give a column's values as codes; None where its type has none, or most values differ."""
    try:
        # Together first: dictionaries of several chunks that hold null cannot be joined.
        whole = column.combine_chunks()
        encoded = whole.dictionary_encode(null_encoding="encode")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    if isinstance(encoded, pa.ChunkedArray):  # of texts of more than 2 GiB, or of no chunk
        if encoded.num_chunks != 1:
            return None
        encoded = encoded.chunk(0)
    if len(encoded.dictionary) * _LEAST_REPEATED > len(column):
        return None
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return CodedValues(values, codes.astype(np.min_scalar_type(max(len(values) - 1, 0))))
