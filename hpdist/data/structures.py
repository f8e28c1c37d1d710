"""Structures: a tensor, or tensors by name, whose first dimension is rows.

A batch's inputs and labels and a model's outputs are structures. Pictures are one tensor; pairs are
`{"image": [rows, 3, 64, 64], "text": [rows, 77]}`; the boxes of a batch are
`{"boxes": [rows, most, 4], "classes": [rows, most], "there": [rows, most]}`: what has another
length in every row is padded, with a mask that says what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias, overload

import torch
from torch import Tensor

Structure: TypeAlias = Tensor | Mapping[str, Tensor]


def tensors_of(rows: Structure) -> Iterator[Tensor]:
    """Iterate over the tensors of a structure, in the order of their names as they were given."""
    if isinstance(rows, Tensor):
        yield rows
    else:
        yield from rows.values()


@overload
def map_tensors(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor: ...
@overload
def map_tensors(
    function: Callable[[Tensor], Tensor], rows: Mapping[str, Tensor]
) -> dict[str, Tensor]: ...
@overload
def map_tensors(function: Callable[[Tensor], Tensor], rows: Structure) -> Structure: ...
def map_tensors(function: Callable[[Tensor], Tensor], rows: Structure) -> Structure:
    """Apply a function to every tensor of a structure."""
    if isinstance(rows, Tensor):
        return function(rows)
    return {name: function(tensor) for name, tensor in rows.items()}


def row_count(rows: Structure) -> int:
    """Count the rows. Raises ValueError where tensors differ in it, or where there is none."""
    counts = {len(tensor) for tensor in tensors_of(rows)}
    if len(counts) != 1:
        assert not isinstance(rows, Tensor)
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in rows.items())
        raise ValueError(f"the tensors of a structure must have as many rows each: {shapes or '-'}")
    return counts.pop()


@overload
def cat(parts: Sequence[Tensor]) -> Tensor: ...
@overload
def cat(parts: Sequence[Structure]) -> Structure: ...
def cat(parts: Sequence[Structure]) -> Structure:
    """Concatenate the rows of one or more structures. Raises ValueError where names differ."""
    first, *others = parts
    if isinstance(first, Tensor):
        if all(isinstance(part, Tensor) for part in others):
            return torch.cat([part for part in parts if isinstance(part, Tensor)])
        raise ValueError("a plain tensor and tensors by name cannot be concatenated")
    named = [part for part in parts if not isinstance(part, Tensor)]
    if len(named) != len(parts) or any(part.keys() != first.keys() for part in named):
        raise ValueError(f"only structures of the same names, {list(first)}, can be concatenated")
    return {name: torch.cat([part[name] for part in named]) for name in first}


@overload
def split(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]: ...
@overload
def split(rows: Structure, sizes: Sequence[int]) -> list[Structure]: ...
def split(rows: Structure, sizes: Sequence[int]) -> Sequence[Structure]:
    """Divide the rows into runs of these sizes, which must add up to all of them."""
    if isinstance(rows, Tensor):
        return list(rows.split(list(sizes)))
    parts = {name: tensor.split(list(sizes)) for name, tensor in rows.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(len(sizes))]


@overload
def narrow(rows: Tensor, start: int, length: int) -> Tensor: ...
@overload
def narrow(rows: Structure, start: int, length: int) -> Structure: ...
def narrow(rows: Structure, start: int, length: int) -> Structure:
    """View rows [start, start + length)."""
    return map_tensors(lambda tensor: tensor.narrow(0, start, length), rows)


@overload
def index(rows: Tensor, positions: Tensor) -> Tensor: ...
@overload
def index(rows: Structure, positions: Tensor) -> Structure: ...
def index(rows: Structure, positions: Tensor) -> Structure:
    """Take rows by their positions, int64 or bool, on any device."""
    return map_tensors(lambda tensor: tensor[positions.to(tensor.device)], rows)


@overload
def to(rows: Tensor, device: torch.device | str, *, non_blocking: bool = False) -> Tensor: ...
@overload
def to(rows: Structure, device: torch.device | str, *, non_blocking: bool = False) -> Structure: ...
def to(rows: Structure, device: torch.device | str, *, non_blocking: bool = False) -> Structure:
    """Copy the tensors to a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), rows)


@overload
def detach(rows: Tensor) -> Tensor: ...
@overload
def detach(rows: Structure) -> Structure: ...
def detach(rows: Structure) -> Structure:
    """Give the same values without gradient."""
    return map_tensors(lambda tensor: tensor.detach(), rows)


def finite_mark(rows: Structure) -> Tensor:
    """Give 0, or NaN where any number is not finite: a 0-dim tensor that ranks can add up."""
    marks = [tensor.sum() * 0 for tensor in tensors_of(rows) if tensor.is_floating_point()]
    return torch.stack(marks).sum() if marks else torch.zeros(())
