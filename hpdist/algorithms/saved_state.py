"""State that is too large to be copied in every step, or of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor


class Table(Protocol):
    """Values of rows by their ids: too many to be copied in every step."""

    @property
    def values(self) -> Tensor:
        """All values, [rows, *]."""
        ...

    def load(self, values: Tensor) -> None:
        """Take over values, of any number of rows."""
        ...


Shards = dict[str, list[tuple[int, Tensor]]]
"""What only this rank holds: by name, where its parts of a flat tensor begin, and the parts."""


class SavedShards(Protocol):
    """The shards of all ranks as they were saved: flat tensors by name, to be read in parts."""

    def size(self, name: str) -> int:
        """The number of elements; 0 if there are none."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some of the elements."""
        ...


def check_names(state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Raise KeyError unless a state has just these names."""
    if state.keys() != set(expected):
        raise KeyError(f"state holds {sorted(state)}, expected {sorted(expected)}")
