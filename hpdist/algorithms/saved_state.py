"""State that is too large to be copied in every step, or that each rank holds a part of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor


class Table(Protocol):
    """What is remembered of rows by their ids: too much to be copied in every step."""

    @property
    def values(self) -> Tensor:
        """All of it, [rows, *]."""
        ...

    def load(self, values: Tensor) -> None:
        """Take it over, of however many rows."""
        ...


Shards = dict[str, list[tuple[int, Tensor]]]
"""What a rank holds alone: by name, where its parts of a flat tensor begin, and the parts."""


class SavedShards(Protocol):
    """What ranks held alone when it was saved: flat tensors by name, to be read in parts."""

    def size(self, name: str) -> int:
        """Elements of it; 0 where there are none."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some of its elements."""
        ...


def check_names(state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Raise KeyError unless a state has just these names."""
    if state.keys() != set(expected):
        raise KeyError(f"state holds {sorted(state)}, expected {sorted(expected)}")
