"""What ranks that hold parts of a table must know of one another between steps.

Within a step an algorithm never communicates itself: its sums travel with those of the step. What
is computed of whole tables, in `Algorithm.commit` or `begin_generation`, needs sums of its own.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hpdist.errors import ConfigError


class OverRanks(Protocol):
    """Reductions over the ranks. Collective: every rank must call, with the same shapes."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Give the sum over the ranks, in the tensor's own dtype."""
        ...

    def max(self, value: Tensor) -> Tensor:
        """Give the largest over the ranks, in the tensor's own dtype."""
        ...


class OneRank:
    """The reductions of a single rank."""

    world_size = 1

    def sum(self, value: Tensor) -> Tensor:
        """Give the value."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """Give the value."""
        return value


ONE_RANK = OneRank()


def require_ranks(over_ranks: OverRanks, world_size: int) -> OverRanks:
    """Give the reductions; raises ConfigError unless they are over the ranks that hold the rows."""
    if over_ranks.world_size != world_size:
        raise ConfigError(
            f"the algorithm holds rows of one of {world_size} ranks, and its `over_ranks` are of "
            f"{over_ranks.world_size}; set algorithm.over_ranks after bind_rank, as "
            "SemiSupervisedStep does"
        )
    return over_ranks
