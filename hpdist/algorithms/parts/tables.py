"""Values remembered of every unlabelled row by its id.

What ranks find of their rows travels in the algorithm's sums: each fills in its own rows'
positions in a tensor of the global batch and leaves the others 0, so the sum is a gather.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpdist.algorithms.exchange import WeakOutputs
from hpdist.algorithms.saved_state import SavedShards, Shards
from hpdist.data.structures import sent
from hpdist.errors import ConfigError

UNSEEN = -2
"""The label of a row that no step has used."""
NEVER = -1
"""The label of a row that was used and never got one."""

BLOCK = 4096
"""Ids in a row that one rank owns: the first block is that of rank 0, the next of rank 1."""

_LOW = 24  # bits: an fp32 holds integers of so many exactly


def scatter_to_global(weak: WeakOutputs, values: Tensor, *, labeled: bool = False) -> Tensor:
    """Values [unlabeled, *] at their rows' positions in the global batch, fp32 [global batch, *].

    With `labeled`, those of labelled rows in the labelled global batch.
    """
    positions = weak.positions
    assert positions is not None
    at, rows = positions.unlabeled, positions.unlabeled_rows
    if labeled:
        at, rows = positions.labeled, positions.labeled_rows
    empty = values.new_zeros(rows, *values.shape[1:], dtype=torch.float32)
    return empty.index_copy(0, sent(at, values.device), values.float())


def encode_ids(ids: Tensor) -> Tensor:
    """Encode row ids as numbers exact in fp32, int64 [rows, 2]: id / 2^24 and the rest."""
    return torch.stack((ids >> _LOW, ids & ((1 << _LOW) - 1)), dim=1)


def ids_of(encoded: Tensor) -> Tensor:
    """Decode ids from [rows, 2] to int64 [rows]."""
    high, low = encoded.round().long().unbind(dim=1)
    return (high << _LOW) | low


def last_occurrences(encoded: Tensor, occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row id of a global batch once, with its position: the last one if it has several.

    `encoded` [global batch, 2] are the summed `encode_ids`; `occupied` [global batch] marks the
    positions that have a row. Both results are int64 [rows], on the device, which is waited for.
    """
    numbers = torch.where(occupied, ids_of(encoded), -1).tolist()
    last = {row: place for place, row in enumerate(numbers) if row >= 0}
    ids, positions = torch.tensor(list(last)).long(), torch.tensor(list(last.values())).long()
    return ids.to(encoded.device), positions.to(encoded.device)


def require_whole(held: int, ranks: int, rank: int, world_size: int) -> None:
    """Raise ConfigError if an algorithm that is to be a rank holds the rows of one of several."""
    if ranks > 1:
        raise ConfigError(
            f"the algorithm holds the rows of rank {held} of {ranks} and cannot be rank {rank} of "
            f"{world_size}; make a new one, and load what `whole_state` gave"
        )


class LabelTable:
    """Labels by row id in int16, each held by only one rank; a step costs O(its global batch).

    Ids are dealt out in blocks of `BLOCK`, one to each rank in turn, so a rank holds 2 rows / ranks
    bytes, give or take a block. Every rank sees the ids and labels of the whole global batch, but
    only the owner of a row knows its old label. So a rank knows its part of the change of the
    counts: `pending_deltas`, which is summed over the ranks with the next step's statistics.

    `observe` computes the change, and only `commit` changes the table. It grows by doubling when
    an id is beyond its end, and covers the same ids on every rank.

    Args:
        num_classes: Labels are 0 up to it, at most 2^15 - 1.
        device: Of the table.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes > torch.iinfo(torch.int16).max:
            raise ConfigError(f"a table of labels holds at most 32767 classes, not {num_classes}")
        self.num_classes = num_classes
        self.rank, self.ranks = 0, 1
        self.rows = 0
        """Ids that the table covers, including those of other ranks."""
        # The last entry belongs to no row: writes that must have no effect go there.
        self._labels = torch.full((1,), UNSEEN, dtype=torch.int16, device=device)
        self.pending_deltas = torch.zeros(num_classes + 1, dtype=torch.int64, device=device)
        """This rank's part of the last committed change that no `commit` has included yet,
        int64 [classes + 1]; always 0 where there is one rank."""
        self._found: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._largest = _HostNumber()

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Keep the rows of one rank; raises ConfigError if those of others are missing."""
        if (rank, world_size) == (self.rank, self.ranks):
            return
        require_whole(self.rank, self.ranks, rank, world_size)
        whole = WholeShards({"labels": self._labels[:-1].cpu()})
        self.rank, self.ranks = rank, world_size
        self.load(whole)

    @staticmethod
    def pack(weak: WeakOutputs, labels: Tensor) -> Tensor:
        """This rank's ids and labels, to be summed over the ranks: fp32 [3, global batch].

        `labels` int64 [unlabeled] are classes or `NEVER`. Rows of the result: id / 2^24, the rest
        of the id, and label + 2; all 0 at a position whose row cannot be used.
        """
        rows = torch.cat((encode_ids(weak.known_ids), labels[:, None] + 2), dim=1)
        return scatter_to_global(weak, rows).T  # of [unlabeled, 3]

    def observe(self, packed: Tensor) -> Tensor:
        """Compute from the summed `pack` the change by this rank's rows: int64 [classes + 1].

        The change of each label's count, and last the number of rows seen first. Of several
        positions with one id, the last that has a label wins.
        """
        codes = packed[2].round().long()  # [batch]
        used = codes > 0
        ids = torch.where(used, ids_of(packed[:2].T), -1)
        self._largest.set(ids.max() if len(ids) else ids.sum() - 1)
        labels = codes - 2
        # Sort by id, then by whether there is a label, then by position: the last of an id wins.
        order = (labels >= 0).long().argsort(stable=True)
        order = order[ids[order].argsort(stable=True)]
        ids, labels, used = ids[order], labels[order], used[order]
        wins = torch.ones_like(used)
        wins[:-1] = ids[1:] != ids[:-1]
        blocks = ids // BLOCK
        wins = wins & used & (blocks % self.ranks == self.rank)
        positions = blocks // self.ranks * BLOCK + ids % BLOCK  # in this rank's part
        end = len(self._labels) - 1
        known = wins & (positions < end)
        old = torch.where(known, self._labels[torch.where(known, positions, end)].long(), UNSEEN)
        new = torch.where(labels >= 0, labels, old.clamp(min=NEVER))
        counts = self._count(new, wins) - self._count(old, wins)
        change = torch.cat([counts, (wins & (old == UNSEEN)).sum().view(1)])
        self._found = (positions, new, wins, change)
        return change

    def commit(self, is_finite: Tensor | None, rows: int | None) -> None:
        """Write what `observe` found, unless it is not finite; at least `rows` are expected.

        The former deltas are in the counts by now; this step's change replaces them.
        """
        if self._found is None:
            return
        positions, labels, wins, change = self._found
        self._found = None
        self._grow(self._largest.get() + 1, rows or 0)
        writes = wins if is_finite is None else wins & is_finite
        end = len(self._labels) - 1
        positions = torch.where(writes, positions, end)
        self._labels[positions] = torch.where(writes, labels, UNSEEN).to(torch.int16)
        if self.ranks > 1:
            self.pending_deltas = (
                change if is_finite is None else torch.where(is_finite, change, self.pending_deltas)
            )

    def discard(self) -> None:
        """Forget what `observe` found."""
        self._found = None

    def labels(self) -> Tensor:
        """A copy of this rank's labels in the order of their ids, int16; of one rank, all."""
        return self._labels[:-1].clone()

    def shards(self) -> Shards:
        """Return this rank's labels by id and `pending_deltas`, [ranks, classes + 1]."""
        labels = self._labels[:-1].cpu()
        parts = labels.split(BLOCK) if self.ranks > 1 else (labels,)
        starts = range(self.rank * BLOCK, self.rows, self.ranks * BLOCK)
        return {
            "labels": list(zip(starts, parts, strict=False)),  # one rank's is in one part
            "changes": [(self.rank * len(self.pending_deltas), self.pending_deltas)],
        }

    def load(self, saved: SavedShards) -> Tensor:
        """Take over this rank's part of labels, of any number of rows, saved by any ranks.

        Returns the sum of the pending deltas, int64 [classes + 1]: the same on every rank.
        """
        self.rows = saved.size("labels")
        starts = range(self.rank * BLOCK, self.rows, self.ranks * BLOCK)
        parts = [saved.read("labels", at, min(at + BLOCK, self.rows)) for at in starts]
        end = torch.full((1,), UNSEEN, dtype=torch.int16)
        self._labels = torch.cat([*(p.to(end) for p in parts), end]).to(self._labels.device)
        self.discard()
        self.pending_deltas = torch.zeros_like(self.pending_deltas)
        size = saved.size("changes")
        deltas = saved.read("changes", 0, size) if size else self.pending_deltas
        return deltas.to(self.pending_deltas).view(-1, len(self.pending_deltas)).sum(dim=0)

    def _count(self, labels: Tensor, which: Tensor) -> Tensor:
        """How often each label occurs among some rows, int64 [classes]; exact integers."""
        counted = (which & (labels >= 0)).long()
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
        return counts.index_add(0, labels.clamp(min=0), counted)

    def _grow(self, needed: int, expected: int) -> None:
        """Cover this many ids, the same on every rank, so that what they save has no holes."""
        if max(needed, expected) > self.rows:
            more = max(needed if needed <= expected else max(needed, 2 * self.rows), expected)
            labels = self._labels.new_full((self._own(more) + 1,), UNSEEN)
            labels[: len(self._labels) - 1] = self._labels[:-1]
            self._labels, self.rows = labels, more

    def _own(self, rows: int) -> int:
        """The number of ids below `rows` that are this rank's."""
        rounds, rest = divmod(rows, BLOCK * self.ranks)
        return rounds * BLOCK + min(max(rest - self.rank * BLOCK, 0), BLOCK)


class WholeShards:
    """Shards of all ranks, joined: flat tensors by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def size(self, name: str) -> int:
        """The number of elements; 0 if there are none."""
        return len(self._values[name]) if name in self._values else 0

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some of the elements."""
        return self._values[name][start:stop]


class _HostNumber:
    """A number on its way from the device: reading it waits for no later work."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def set(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def get(self) -> int:
        assert self._value is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._value)
