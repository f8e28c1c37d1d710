"""The base of add-ons that remember numbers of every unlabelled row, each row by one rank only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.exchange import Sums
from hpdist.algorithms.over_ranks import OverRanks, require_ranks
from hpdist.algorithms.parts.row_tables import (
    Tables,
    are_sharded,
    load_tables,
    names_in_state,
    recall_rows,
    shards_of,
    whole_tables,
)
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.saved_state import SavedShards, Shards
from hpdist.data.structures import sent


class RemembersRowsAddOn(AddOn):
    """An add-on with tables of its own, which its `start` puts into `remembered`.

    The rows of a batch are used on any rank: before a step the ranks exchange their ids, and each
    gives what it remembers of those that are its own. Nothing of that happens on one rank.
    """

    remembered: Tables = MappingProxyType({})
    """By the names that they have in checkpoints, without the add-on's prefix."""
    looks_up: ClassVar[tuple[str, ...]] = ()
    """Those of which a step needs the batch's rows."""
    _recalled: Sums = MappingProxyType({})

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Hold this rank's rows only, as the inner algorithm does."""
        super().bind_rank(rank, world_size)
        for table in self.remembered.values():
            table.bind_rank(rank, world_size)

    @property
    def recalls(self) -> bool:
        """Whether the rows of a batch are remembered by other ranks."""
        return self.base.recalls or are_sharded(self.remembered)

    def recall(self, encoded: Tensor) -> dict[str, Tensor]:
        """Give what this rank remembers of the rows of a global batch, with the inner algorithm."""
        needed = {name: self.remembered[name] for name in self.looks_up}
        inner = self.base.recall(encoded) if self.base.recalls else {}
        return inner | self._prefixed(recall_rows(needed, encoded))

    def take_recalled(self, sums: Sums) -> None:
        """Take what all ranks remember of the rows of the global batch."""
        self._recalled, inner = self._divide(sums)
        self.base.take_recalled(inner)

    def looked_up(self, name: str, ids: Tensor, positions: BatchPositions | None) -> Tensor:
        """Give what was remembered of rows of this micro-batch before the step, fp32 [rows, *]."""
        table = self.remembered[name]
        if not are_sharded(self.remembered):
            return table.read(ids)
        assert positions is not None
        rows = self._recalled[name]
        return table.unpack(rows[sent(positions.unlabeled, rows.device)])

    def ranks_of_rows(self) -> OverRanks:
        """Give the reductions over the ranks that hold the rows; raises ConfigError without."""
        (ranks,) = {table.ranks for table in self.remembered.values()}
        return require_ranks(self.over_ranks, ranks)

    def remembered_bytes(self, rows: int) -> int:
        """Count the bytes that a rank needs to remember so many rows, with the inner algorithm."""
        own = sum(t.row_bytes * -(-rows // t.ranks) for t in self.remembered.values())
        return super().remembered_bytes(rows) + own

    def state_dict(self) -> dict[str, Tensor]:
        """Both states, and on one rank the tables; on several each has only its `shards`."""
        return super().state_dict() | whole_tables(self._saved_tables)

    def shards(self) -> Shards:
        """What this rank remembers, with the inner algorithm's."""
        return super().shards() | shards_of(self._saved_tables)

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over both states, the tables of any length, saved by any number of ranks.

        Raises KeyError if names or widths are those of other options, or tables are missing.
        """
        names = names_in_state(self._saved_tables)
        super().load_state_dict({k: v for k, v in state.items() if k not in names}, saved)
        load_tables(self._saved_tables, state, saved)

    @property
    def _saved_tables(self) -> Tables:
        return {self._key(name): table for name, table in self.remembered.items()}
