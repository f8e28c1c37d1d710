"""The largest values of every class among rows that several ranks hold: exact, by counts alone.

No row and no value reaches another rank. The bits of numbers that are not negative are ordered as
the numbers are, so the smallest value that is selected is found bit by bit, each by one count of
every class. Of equal values those with the smallest ids are selected, found in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

_BITS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


@dataclass(frozen=True)
class Entries:
    """Values of some rows.

    Args:
        values: fp32 or fp64, not negative: [rows, classes], or [rows] with a class each.
        ids: Of the rows, int64 [rows], each once over all ranks.
        classes: The classes of values [rows], int64 [rows]; None where there is one of every class.
    """

    values: Tensor
    ids: Tensor
    classes: Tensor | None = None

    @property
    def bits(self) -> Tensor:
        """The values as integers that are ordered as they are, int64 like the values."""
        kind, _ = _BITS[self.values.dtype]
        return self.values.contiguous().view(kind).long()

    def of_class(self, numbers: Tensor) -> Tensor:
        """Give the number [classes] of each value's class, like the values."""
        return numbers if self.classes is None else numbers[self.classes]

    @property
    def own_ids(self) -> Tensor:
        """The ids, to be compared with what is like the values."""
        return self.ids[:, None] if self.classes is None else self.ids

    def count(self, which: Tensor, number: int) -> Tensor:
        """Count the values of each of so many classes that are marked, int64 [classes]."""
        if self.classes is None:
            return which.sum(dim=0)
        return torch.bincount(self.classes[which], minlength=number)


Count: TypeAlias = Callable[[Callable[[Entries], Tensor]], Tensor]
"""Counts the values of every class, of all ranks, that a function marks: int64 [classes]."""


@dataclass(frozen=True)
class Selection:
    """The smallest value of each class that is selected, and below which id, int64 [classes]."""

    least: Tensor
    below: Tensor

    def of(self, entries: Entries) -> Tensor:
        """Say which values are selected, bool like the values."""
        bits, least = entries.bits, entries.of_class(self.least)
        tied = (bits == least) & (entries.own_ids < entries.of_class(self.below))
        return (bits > least) | tied


def select_largest(count: Count, wanted: Tensor, rows: int, dtype: torch.dtype) -> Selection:
    """Select so many of the largest values of every class, or all if there are fewer.

    Args:
        count: Over all entries of all ranks. Collective, if the entries lie on several.
        wanted: How many of each class, int64 [classes].
        rows: What is more than any id.
        dtype: Of the values.

    It counts once for each bit of a value, and of an id.
    """
    least = torch.zeros_like(wanted)
    for bit in reversed(range(_BITS[dtype][1])):
        higher = least | (1 << bit)

        def reaches(entries: Entries, higher: Tensor = higher) -> Tensor:
            return entries.bits >= entries.of_class(higher)

        least = torch.where(count(reaches) >= wanted, higher, least)
    ties = wanted - count(lambda entries: entries.bits > entries.of_class(least))
    below = torch.zeros_like(wanted)
    for bit in reversed(range(rows.bit_length())):
        wider = below | (1 << bit)

        def is_tied(entries: Entries, wider: Tensor = wider) -> Tensor:
            equal = entries.bits == entries.of_class(least)
            return equal & (entries.own_ids < entries.of_class(wider))

        below = torch.where(count(is_tied) <= ties, wider, below)
    return Selection(least, below)
