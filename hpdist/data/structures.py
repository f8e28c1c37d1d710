"""Structures: a tensor, or tensors by name, whose first dimension is rows.

A batch's inputs and labels and a model's outputs are structures. Pictures are one tensor; pairs are
`{"image": [rows, 3, 64, 64], "text": [rows, 77]}`; the boxes of a batch are
`{"boxes": [rows, most, 4], "classes": [rows, most], "there": [rows, most]}`: what has another
length in every row is padded, with a mask that says what is there.

Code that handles one tensor may leave a type's arguments out: `LabeledBatch` stands for
`LabeledBatch[Tensor, Tensor]`. Code that carries any structure writes `LabeledBatch[Any, Any]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import TypeVar

Structure: TypeAlias = Tensor | Mapping[str, Tensor]
Arrays: TypeAlias = npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]
"""A structure before it is tensors: an array, or arrays by name, whose first dimension is rows."""

Rows = TypeVar("Rows", bound=Structure)
"""Any structure: what a function gives is what it was given, one tensor or tensors by name."""
Inputs = TypeVar("Inputs", bound=Structure, default=Tensor)
"""What a batch's inputs are."""
Labels = TypeVar("Labels", bound=Structure, default=Tensor)
"""What its labels are."""
Outputs = TypeVar("Outputs", bound=Structure, default=Tensor)
"""What a model says of it."""


def tensors_of(rows: Structure) -> Iterator[Tensor]:
    """Iterate over the tensors of a structure, in the order of their names as they were given."""
    if isinstance(rows, Tensor):
        yield rows
    else:
        yield from rows.values()


def map_tensors(function: Callable[[Tensor], Tensor], rows: Rows) -> Rows:
    """Apply a function to every tensor of a structure."""
    if isinstance(rows, Tensor):
        return cast(Rows, function(rows))
    named = cast(Mapping[str, Tensor], rows)
    return cast(Rows, {name: function(tensor) for name, tensor in named.items()})


def row_count(rows: Structure) -> int:
    """Count the rows. Raises ValueError where tensors differ in it, or where there is none."""
    if isinstance(rows, Tensor):
        return len(rows)
    counts = {len(tensor) if tensor.dim() else None for tensor in rows.values()}
    count = counts.pop() if len(counts) == 1 else None
    if count is None:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in rows.items())
        raise ValueError(f"the tensors of a structure must have as many rows each: {shapes or '-'}")
    return count


def cat(parts: Sequence[Rows]) -> Rows:
    """Concatenate the rows of one or more structures. Raises ValueError where names differ."""
    first, *others = parts
    if isinstance(first, Tensor):
        if all(isinstance(part, Tensor) for part in others):
            return cast(Rows, torch.cat(cast(list[Tensor], list(parts))))
        raise ValueError("a plain tensor and tensors by name cannot be concatenated")
    if any(isinstance(part, Tensor) or part.keys() != first.keys() for part in others):
        raise ValueError(f"only structures of the same names, {list(first)}, can be concatenated")
    named = cast(Sequence[Mapping[str, Tensor]], parts)
    return cast(Rows, {name: torch.cat([part[name] for part in named]) for name in first})


def split(rows: Rows, sizes: Sequence[int]) -> list[Rows]:
    """Divide the rows into runs of these sizes, which must add up to all of them."""
    if isinstance(rows, Tensor):
        return cast(list[Rows], list(torch.split(rows, list(sizes))))
    named = cast(Mapping[str, Tensor], rows)
    parts = {name: torch.split(tensor, list(sizes)) for name, tensor in named.items()}
    runs = range(len(sizes))
    return [cast(Rows, {name: part[n] for name, part in parts.items()}) for n in runs]


def narrow(rows: Rows, start: int, length: int) -> Rows:
    """View rows [start, start + length)."""
    return map_tensors(lambda tensor: tensor.narrow(0, start, length), rows)


def index(rows: Rows, positions: Tensor) -> Rows:
    """Take rows by their positions, int64 or bool, on any device."""
    return map_tensors(lambda tensor: tensor[positions.to(tensor.device)], rows)


def to(rows: Rows, device: torch.device | str, *, non_blocking: bool = False) -> Rows:
    """Copy the tensors to a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), rows)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Send a tensor to a device and do not wait for it: not for the copy, nor for earlier work.

    A GPU takes what lies on the CPU from page-locked memory, or the copy would wait for its turn.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def as_dtype(rows: Rows, dtype: torch.dtype) -> Rows:
    """Convert floating-point tensors; whole numbers, such as token ids, stay as they are."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, rows)


def detach(rows: Rows) -> Rows:
    """Give the same values without gradient."""
    return map_tensors(lambda tensor: tensor.detach(), rows)


def map_arrays(function: Callable[[npt.NDArray[Any]], Any], rows: Arrays) -> Any:
    """Apply a function to every array of a structure."""
    if isinstance(rows, Mapping):
        return {name: function(array) for name, array in rows.items()}
    return function(rows)


def take_rows(rows: Arrays, positions: npt.NDArray[Any]) -> Any:
    """Take rows of arrays by their positions, int64."""
    return map_arrays(lambda array: array[positions], rows)


def from_arrays(rows: Arrays) -> Any:
    """Give arrays as tensors, which share their memory where they are contiguous."""
    return map_arrays(lambda array: torch.from_numpy(np.ascontiguousarray(array)), rows)


def finite_mark(rows: Structure) -> Tensor:
    """Give 0, or NaN where any number is not finite: a 0-dim tensor that ranks can add up."""
    marks = [tensor.sum() * 0 for tensor in tensors_of(rows) if tensor.is_floating_point()]
    return torch.stack(marks).sum() if marks else torch.zeros(())


def describe_rows(rows: Any) -> str:
    """Write a structure's shapes for a message: `[2, 3, 8, 8]`, or `image [2, 3, 8, 8], …`."""
    if isinstance(rows, Tensor):
        return str(list(rows.shape))
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in rows.items())
