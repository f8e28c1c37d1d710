"""The base of add-ons that remember numbers of every unlabelled row, each row by one rank only."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.exchange import Sums
from hpdist.algorithms.over_ranks import OverRanks, require_ranks
from hpdist.algorithms.parts.row_tables import RemembersRows, Tables, recall_rows


class RemembersRowsAddOn(RemembersRows, AddOn):
    """An add-on with tables of its own, which its `start` puts into `remembered`.

    The rows of a batch are used on any rank: before a step the ranks exchange their ids, and each
    gives what it remembers of those that are its own. Nothing of that happens on one rank.
    """

    looks_up: ClassVar[tuple[str, ...]] = ()
    """The tables of which a step needs the batch's rows."""

    @property
    def recalls(self) -> bool:
        """Whether the rows of a batch are remembered by other ranks."""
        return self.base.recalls or super().recalls

    def recall(self, encoded: Tensor) -> dict[str, Tensor]:
        """Give what this rank remembers of the rows of a global batch, with the inner algorithm."""
        needed = {name: self.remembered[name] for name in self.looks_up}
        inner = self.base.recall(encoded) if self.base.recalls else {}
        return inner | self._prefixed(recall_rows(needed, encoded))

    def take_recalled(self, sums: Sums) -> None:
        """Take what all ranks remember of the rows of the global batch."""
        own, inner = self._divide(sums)
        super().take_recalled(own)
        self.base.take_recalled(inner)

    def ranks_of_rows(self) -> OverRanks:
        """Give the reductions over the ranks that hold the rows; raises ConfigError without."""
        (ranks,) = {table.ranks for table in self.remembered.values()}
        return require_ranks(self.over_ranks, ranks)

    @property
    def saved_tables(self) -> Tables:
        """The tables by the names that they have in checkpoints, with the add-on's prefix."""
        return {self._key(name): table for name, table in self.remembered.items()}
