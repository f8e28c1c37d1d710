"""How the stored values of one kind of input become rows of a batch.

    class Series(InputSpec):
        kind = "series"
        layout = {"values": ArrayLayout((16,), np.dtype("float32"))}

        def decode_row(self, value, out):
            out["values"][:] = value  # or raise ValueError

One spec is derived from the labelled rows and shared by every other set, so that a test or
unlabelled row is decoded as a labelled one is. A spec is sent to decoding processes: it can be
pickled, and its module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hpdist.data.decode.arrays import (
    ArrayLayout,
    Arrays,
    Layout,
    Shape,
    check_rows,
    clear_rows,
    shape_of,
    shown_shape,
    slice_rows,
)
from hpdist.data.decode.encoded import Unreadable
from hpdist.data.decode.recorded import recorded
from hpdist.errors import DataError, printable

if TYPE_CHECKING:  # imported where it is used: a decoding process does without it
    import torch
    from torch import Tensor

    from hpdist.data.structures import Structure

_REASON_LENGTH = 300


class InputSpec(ABC):
    """How every set's inputs are decoded, and what one row is."""

    kind: ClassVar[str]
    """The name of the kind: see `hpdist.data.kinds`."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Give what a row is in memory: one array, or several by name."""

    @property
    def worth_processes(self) -> bool:
        """Whether a row takes so long to decode that worker processes pay."""
        return False

    @property
    def not_for_arrays(self) -> str | None:
        """Say what a model of plain arrays cannot take of these rows, and what to do."""
        return None

    @property
    def view_arguments(self) -> tuple[Any, ...]:
        """Give what `build` of the kind's views is given behind the seed."""
        return ()

    @property
    def paired_column(self) -> str | None:
        """Name the column whose value comes with a row's own as a pair, if there is one."""
        return None

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Name the features of a row, where they have names."""
        return ()

    @property
    def model_input_shape(self) -> Shape:
        """Give the shape of a row, or shapes by name, as the views give it to the model."""
        return shape_of(self.layout)

    def record(self) -> dict[str, Any]:
        """Give the spec as JSON, of which `InputKind.recorded_spec` makes it again.

        Raises DataError for a spec that is no dataclass of plain values.
        """
        return recorded(self)

    def save_files(self, folder: Path) -> dict[str, Any]:
        """Write what decoding needs beside the spec, such as a tokenizer, into a folder.

        Gives the spec as `record` does, with the names of these files in it.
        """
        return self.record()

    def describe(self) -> str:
        """Say what a row is, for the opening lines of a run."""
        found = shape_of(self.layout)
        shapes = found if isinstance(found, Mapping) else {self.kind: found}
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return f"{self.kind}: {shown}"

    def decode_row(self, value: Any, out: Arrays) -> None:
        """Decode a stored value into a row. Raises ValueError where it does not fit the spec."""
        raise NotImplementedError(f"{type(self).__name__} must define decode_row or decode_into")

    def reason(self, error: Exception) -> str:
        """Say in one line why a value cannot be decoded, in every run alike."""
        text = " ".join(str(error).split()) or type(error).__name__
        return printable(text, _REASON_LENGTH)

    def threads_pay(self, values: Sequence[Any]) -> bool:
        """Tell whether threads decode values faster than one does."""
        return False

    def empty(self, rows: int, pin: bool = False) -> Structure:
        """Make room for rows on the CPU, [rows, *] each tensor, page-locked on request."""
        import torch

        def room(one: ArrayLayout) -> Tensor:
            return torch.empty((rows, *one.shape), dtype=torch_dtype(one), pin_memory=pin)

        layout = self.layout
        if isinstance(layout, ArrayLayout):
            return room(layout)
        return {name: room(one) for name, one in layout.items()}

    def example(self, rows: int) -> Structure:
        """Give rows to try a model on: zeros, unless a kind has better ones."""
        found = self.empty(rows)
        clear_rows(arrays_of(found))
        return found

    def decode(self, value: Any) -> Any:
        """Turn one stored value into a row: a tensor, or tensors by name.

        Raises ValueError where the value does not fit the spec.
        """
        out = self.empty(1)
        for reason in self.decode_valid([value], out).values():
            raise ValueError(reason)
        return out[0] if not isinstance(out, Mapping) else {n: t[0] for n, t in out.items()}

    def decode_rows(
        self,
        values: Sequence[Any],
        ids: Sequence[int],
        name: str,
        describe: Callable[[int], str] = "row {}".format,
    ) -> Any:
        """Decode stored values into a structure, [rows, *] each tensor.

        Raises DataError that names the dataset, the row, as `describe` does, and the cause.
        """
        out = self.empty(len(values))
        for line, reason in self.decode_valid(values, out).items():
            raise DataError(
                f"{name}: {describe(ids[line])} cannot be decoded: {reason}; mend or remove that "
                "row"
            )
        return out

    def decode_valid(self, values: Sequence[Any], out: Structure) -> dict[int, str]:
        """Decode each value into its line of `out`, which `empty` made.

        Returns why, by line and in their order, for the values that cannot be decoded; their lines
        are zeros.
        """
        return self.decode_into(values, arrays_of(out))

    def decode_into(self, values: Sequence[Any], out: Arrays) -> dict[int, str]:
        """Do as `decode_valid` does, into arrays."""
        check_rows(self.layout, len(values), out)
        reasons = {}
        for line, value in enumerate(values):
            row = slice_rows(out, line)
            try:
                self.decode_row(value, row)
            except Exception as error:  # image libraries raise nearly everything on a damaged file
                clear_rows(row)
                reasons[line] = self.reason(error)
        return reasons


class ArraySpec(InputSpec):
    """The spec of rows that are one array each."""

    shape: tuple[int, ...]
    """The shape of a row as it is decoded."""
    array_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)

    @property
    def layout(self) -> ArrayLayout:
        """Give shape and dtype of a row."""
        return ArrayLayout(self.shape, self.array_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Give `array_dtype` as torch calls it."""
        return torch_dtype(self.layout)


def torch_dtype(layout: ArrayLayout) -> torch.dtype:
    """Give the dtype of an array as torch calls it."""
    import torch

    found: torch.dtype = getattr(torch, layout.dtype.name)
    return found


def arrays_of(rows: Structure) -> Arrays:
    """View tensors on the CPU as arrays."""
    if isinstance(rows, Mapping):
        return {name: tensor.numpy() for name, tensor in rows.items()}
    return rows.numpy()


def require_value(value: Any, *, is_array: bool) -> None:
    """Raise ValueError for a null, for what cannot be read, and for bytes in place of arrays."""
    if value is None:
        raise ValueError("the value is null")
    if isinstance(value, Unreadable):
        raise ValueError(value.reason)
    if is_array != isinstance(value, np.ndarray):
        found = "an array" if isinstance(value, np.ndarray) else "an encoded image"
        raise ValueError(f"it is {found}, but the labelled rows are not")


def require_shape(array: Any, shape: tuple[int, ...], hint: str = "") -> None:
    """Raise ValueError where an array has not the shape of a row."""
    if array.shape != shape:
        ours, first = shown_shape(array.shape), shown_shape(shape)
        raise ValueError(f"its shape is {ours}, the first labelled row's is {first}{hint}")
