"""Numbers remembered of every unlabelled row by its id, each row by one rank only.

Ids are dealt out in blocks, as those of `LabelTable` are, so a rank holds rows / ranks of them,
give or take a block. A row is used on any rank: before a step the ranks exchange the ids of the
global batch, and each gives what it remembers of those that are its own (`Algorithm.recall`).
Nothing of that happens on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import Sums
from hpdist.algorithms.parts.tables import BLOCK, WholeShards, ids_of, require_whole
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.protocol import TAKEN
from hpdist.algorithms.saved_state import SavedShards, Shards, check_names
from hpdist.data.structures import sent

FIRST_ROWS = 1024
"""Rows of a table that begins to grow."""


class ShardedRows:
    """Numbers by row id, [rows, width] or [rows]; 0 if never written.

    Args:
        width: Numbers of a row; None for a single one.
        dtype: In which they are held.
        device: Of the table.
        top: Hold only so many numbers of a row, the largest by magnitude, with their places; the
            others are taken for 0.
    """

    def __init__(
        self,
        width: int | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        top: int | None = None,
    ) -> None:
        self.width = width
        self.top = None if top is None or width is None or top >= width else top
        self.rank, self.ranks = 0, 1
        self.rows = 0
        """Ids that the table covers, including those of other ranks."""
        row = () if width is None else (self.top or width,)
        self.parts = {"": torch.zeros(0, *row, dtype=dtype, device=device)}
        """This rank's rows in the order of their ids, by what follows the table's name."""
        if self.top is not None:
            short = torch.int16 if width is not None and width <= 1 << 15 else torch.int32
            self.parts["_places"] = torch.zeros(0, *row, dtype=short, device=device)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(math.prod(p.shape[1:]) * p.element_size() for p in self.parts.values())

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Keep the rows of one rank; raises ConfigError if those of others are missing."""
        if (rank, world_size) == (self.rank, self.ranks):
            return
        require_whole(self.rank, self.ranks, rank, world_size)
        whole = WholeShards({name: part.reshape(-1).cpu() for name, part in self.parts.items()})
        self.rank, self.ranks = rank, world_size
        self.load("", whole)

    def write(self, ids: Tensor, values: Tensor, expected: int | None = None) -> None:
        """Set rows [rows, *], each at most once; every rank is given all of them.

        Waits for the device.
        """
        self.cover(ids, expected)
        own, at = self._own_places(ids)
        ids, at = ids[own], at[own]
        for name, new in self._packed(values[own]).items():
            self.parts[name][at] = new.to(self.parts[name].dtype)

    def recall(self, ids: Tensor) -> Tensor:
        """Give what this rank remembers of rows, fp32 [rows, numbers]; 0 of those of other ranks.

        The sum over the ranks is for `unpack`. Ids below 0 stand for no row.
        """
        own, at = self._own_places(ids)
        known = own & (at < len(self.parts[""]))
        at = torch.where(known, at, 0)
        widths = [part.shape[1:].numel() for part in self.parts.values()]
        if not len(self.parts[""]):
            return torch.zeros(len(ids), sum(widths), device=ids.device)
        pairs = zip(self.parts.values(), widths, strict=True)
        found = [part.reshape(len(part), width)[at].float() for part, width in pairs]
        numbers: Tensor = torch.cat(found, dim=1)
        return numbers.masked_fill(~known[:, None], 0.0)

    def unpack(self, recalled: Tensor) -> Tensor:
        """Give the rows' numbers, fp32 [rows, width] or [rows], from what `recall` gave."""
        if self.width is None:
            return recalled[:, 0]
        if self.top is None:
            return recalled
        values, places = recalled.split(self.top, dim=1)
        whole: Tensor = values.new_zeros(len(values), self.width)
        return whole.scatter_add(1, places.round().long(), values)  # an empty row has place 0

    def read(self, ids: Tensor) -> Tensor:
        """Give rows as `unpack` does; on several ranks only this rank's."""
        return self.unpack(self.recall(ids))

    @property
    def own_ids(self) -> Tensor:
        """The ids of this rank's rows, int64 [rows], in the order of its parts."""
        places = torch.arange(len(self.parts[""]), device=self.parts[""].device)
        blocks = places.div(BLOCK, rounding_mode="floor") * self.ranks + self.rank
        return places if self.ranks == 1 else blocks * BLOCK + places % BLOCK

    def cover(self, ids: Tensor, expected: int | None = None) -> None:
        """Make room for rows, as `write` does; the same on every rank. Waits for the device."""
        self._reserve(int(ids.max()) + 1 if len(ids) else 0, expected or 0)

    def clear(self) -> None:
        """Forget all rows."""
        self.rows = 0
        self.parts = {name: part[:0].clone() for name, part in self.parts.items()}

    def shards(self, name: str) -> Shards:
        """Give this rank's rows, under the names that begin with `name`."""
        found: Shards = {}
        starts = range(self.rank * BLOCK, self.rows, self.ranks * BLOCK)
        for suffix, part in self.parts.items():
            width = part.shape[1:].numel()
            pairs = zip(starts, part.cpu().split(BLOCK), strict=False)  # an empty one has a block
            found[name + suffix] = [(at * width, block.reshape(-1)) for at, block in pairs]
        return found

    def load(self, name: str, saved: SavedShards) -> None:
        """Take over this rank's part of a table of any number of rows, saved by any ranks.

        Raises KeyError where the sizes are those of other options.
        """
        counts = {}
        for suffix, part in self.parts.items():
            counts[suffix], rest = divmod(saved.size(name + suffix), part.shape[1:].numel())
            if rest:
                raise KeyError(f"state holds {name + suffix!r} of rows of another width")
        if len(set(counts.values())) > 1:
            raise KeyError(f"state holds parts of {name!r} of another number of rows")
        self.rows = counts[""]
        for suffix, part in self.parts.items():
            width = part.shape[1:].numel()
            starts = range(self.rank * BLOCK, self.rows, self.ranks * BLOCK)
            if self.ranks == 1:
                spans = [(0, self.rows)] if self.rows else []
            else:
                spans = [(at, min(at + BLOCK, self.rows)) for at in starts]
            read = [saved.read(name + suffix, a * width, b * width) for a, b in spans]
            whole = torch.cat([piece.to(part) for piece in read]) if read else part.new_zeros(0)
            self.parts[suffix] = whole.view(-1, *part.shape[1:]).clone()

    def _own_places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids are this rank's, bool [rows], and their places in its part."""
        blocks = ids.div(BLOCK, rounding_mode="floor")
        own = (ids >= 0) & (blocks % self.ranks == self.rank)
        return own, blocks.div(self.ranks, rounding_mode="floor") * BLOCK + ids % BLOCK

    def _packed(self, values: Tensor) -> dict[str, Tensor]:
        if self.top is None:
            return {"": values}
        places = values.abs().topk(self.top, dim=1).indices
        return {"": values.gather(1, places), "_places": places}

    def _reserve(self, needed: int, expected: int) -> None:
        """Cover this many ids, as many on every rank: the expected ones, then by doubling."""
        if needed <= self.rows:
            return
        doubled = max(needed, 2 * self.rows, FIRST_ROWS)
        self.rows = doubled if needed > expected else expected
        rounds, rest = divmod(self.rows, BLOCK * self.ranks)
        own = rounds * BLOCK + min(max(rest - self.rank * BLOCK, 0), BLOCK)
        for name, part in self.parts.items():
            self.parts[name] = torch.cat([part, part.new_zeros(own - len(part), *part.shape[1:])])


Tables: TypeAlias = Mapping[str, ShardedRows]
"""Tables of one algorithm or add-on, by the names that they have in checkpoints."""


def are_sharded(tables: Tables) -> bool:
    """Whether other ranks hold rows of them."""
    return any(table.ranks > 1 for table in tables.values())


def recall_rows(tables: Tables, encoded: Tensor) -> dict[str, Tensor]:
    """Give what this rank remembers of the rows of a global batch; see `Algorithm.recall`."""
    ids = torch.where(encoded[:, 0] > 0.5, ids_of(encoded) - TAKEN, -1)
    return {name: table.recall(ids) for name, table in tables.items()}


def names_in_state(tables: Tables) -> list[str]:
    """The names under which tables are saved."""
    return [name + end for name, table in tables.items() for end in table.parts]


def whole_tables(tables: Tables) -> dict[str, Tensor]:
    """Give the tables for a state, on one rank; on several each has only its shards."""
    if are_sharded(tables):
        return {}
    return {name + end: part for name, t in tables.items() for end, part in t.parts.items()}


def shards_of(tables: Tables) -> Shards:
    """What this rank remembers, on several; on one it is all in the state."""
    found: Shards = {}
    for name, table in tables.items() if are_sharded(tables) else ():
        found |= table.shards(name)
    return found


def load_tables(tables: Tables, state: Mapping[str, Tensor], saved: SavedShards | None) -> None:
    """Take over tables of any length, saved by any number of ranks, from a state or from shards.

    Raises KeyError if widths are those of other options, or tables are missing.
    """
    names = names_in_state(tables)
    here = [name for name in names if name in state]
    if here or saved is None:
        check_names({name: state[name] for name in here}, names)
        saved = WholeShards({name: state[name].reshape(-1) for name in names})
    for name, table in tables.items():
        table.load(name, saved)


class RemembersRows(Algorithm):
    """The base of algorithms that remember numbers of every unlabelled row.

    Its `start` puts the tables into `remembered`.
    """

    remembered: Tables = MappingProxyType({})
    """By the algorithm's own names."""
    _recalled: Sums = MappingProxyType({})

    @property
    def saved_tables(self) -> Tables:
        """The tables by the names that they have in checkpoints."""
        return self.remembered

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Hold this rank's rows only."""
        super().bind_rank(rank, world_size)
        for table in self.remembered.values():
            table.bind_rank(rank, world_size)

    @property
    def recalls(self) -> bool:
        """Whether the rows of a batch are remembered by other ranks."""
        return are_sharded(self.remembered)

    def recall(self, encoded: Tensor) -> dict[str, Tensor]:
        """Give what this rank remembers of the rows of a global batch."""
        return recall_rows(self.remembered, encoded)

    def take_recalled(self, sums: Sums) -> None:
        """Take what all ranks remember of the rows of the global batch."""
        self._recalled = sums

    def looked_up(self, name: str, ids: Tensor, positions: BatchPositions | None) -> Tensor:
        """Give what was remembered of rows of this micro-batch before the step, fp32 [rows, *]."""
        table = self.remembered[name]
        if not are_sharded(self.remembered):
            return table.read(ids)
        assert positions is not None
        rows = self._recalled[name]
        return table.unpack(rows[sent(positions.unlabeled, rows.device)])

    def remembered_bytes(self, rows: int) -> int:
        """Count the bytes that a rank needs to remember so many rows."""
        own = sum(t.row_bytes * -(-rows // t.ranks) for t in self.remembered.values())
        return super().remembered_bytes(rows) + own

    def state_dict(self) -> dict[str, Tensor]:
        """The state, and on one rank the tables; on several each has only its `shards`."""
        return {**super().state_dict(), **whole_tables(self.saved_tables)}

    def shards(self) -> Shards:
        """What this rank remembers; on one rank it is all in `state_dict`."""
        return super().shards() | shards_of(self.saved_tables)

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over a state, its tables of any length, saved by any number of ranks.

        Raises KeyError if names or widths are those of other options, or tables are missing.
        """
        names = names_in_state(self.saved_tables)
        super().load_state_dict({k: v for k, v in state.items() if k not in names}, saved)
        load_tables(self.saved_tables, state, saved)
