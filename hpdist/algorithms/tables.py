"""What is remembered of every unlabelled row by its id, the same on every rank.

What ranks find of their rows travels in the algorithm's sums: each fills in its own rows' places in
a tensor of the global batch and leaves the others 0, so that the sum over ranks is a gather.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.base import WeakOutputs
from hpdist.errors import ConfigError

UNSEEN = -2
"""The label of a row that no step has used."""
NEVER = -1
"""The label of a row that was used and never got one."""

_FIRST_ROWS = 1024
_LOW = 24  # bits: an fp32 holds integers of so many exactly


def spread(weak: WeakOutputs, values: Tensor, *, labeled: bool = False) -> Tensor:
    """Values [unlabeled, *] at their rows' places in the global batch, fp32 [global batch, *].

    Or those of labelled rows, in the labelled global batch.
    """
    places = weak.places
    assert places is not None
    at, rows = places.unlabeled, places.unlabeled_rows
    if labeled:
        at, rows = places.labeled, places.labeled_rows
    empty = values.new_zeros(rows, *values.shape[1:], dtype=torch.float32)
    return empty.index_copy(0, at.to(values.device, non_blocking=True), values.float())


def id_words(ids: Tensor) -> Tensor:
    """Row ids as numbers that an fp32 holds exactly, int64 [rows, 2]: id / 2^24, and the rest."""
    return torch.stack((ids >> _LOW, ids & ((1 << _LOW) - 1)), dim=1)


def ids_of(words: Tensor) -> Tensor:
    """The ids of their words [rows, 2], int64 [rows]."""
    high, low = words.round().long().unbind(dim=1)
    return (high << _LOW) | low


def last_places(words: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """The row ids of a global batch, each once, and where it stands: the last place if in several.

    `words` [global batch, 2] are the summed `id_words`; `filled` [global batch] says which places
    have a row. int64 [rows] both, on the device, which is waited for.
    """
    numbers = torch.where(filled, ids_of(words), -1).tolist()
    last = {row: place for place, row in enumerate(numbers) if row >= 0}
    ids, places = torch.tensor(list(last)).long(), torch.tensor(list(last.values())).long()
    return ids.to(words.device), places.to(words.device)


class LabelTable:
    """Labels by row id in int16 [rows], replicated; a step costs O(its global batch).

    `observe` works out what would change, and only `commit` changes the table. It grows by doubling
    when an id comes that is beyond its end.

    Args:
        num_classes: Labels are 0 up to it, at most 2^15 - 1.
        device: Where the table lives.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes > torch.iinfo(torch.int16).max:
            raise ConfigError(f"a table of labels holds at most 32767 classes, not {num_classes}")
        self.num_classes = num_classes
        # The last entry belongs to no row: what must not be written anywhere is written there.
        self._labels = torch.full((1,), UNSEEN, dtype=torch.int16, device=device)
        self._found: tuple[Tensor, Tensor, Tensor] | None = None  # ids, labels, which to write
        self._largest = _HostNumber()

    @staticmethod
    def pack(weak: WeakOutputs, labels: Tensor) -> Tensor:
        """What this rank says of its rows, to be summed over the ranks: fp32 [3, global batch].

        `labels` int64 [unlabeled] are classes or `NEVER`. Rows of the result: id / 2^24, the rest
        of the id, and label + 2; all 0 in a place whose row cannot be used.
        """
        told = torch.cat((id_words(weak.ids), labels[:, None] + 2), dim=1)  # [unlabeled, 3]
        return spread(weak, told).T

    def observe(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """From the summed `pack`: by how much each label's count changes, and the rows seen first.

        int64 [classes] and []. Of several places with one id, the last that has a label wins.
        """
        told = packed[2].round().long()  # [batch]
        used = told > 0
        ids = torch.where(used, ids_of(packed[:2].T), -1)
        labels = told - 2
        # Sort by id, then by whether there is a label, then by place: the last of an id wins.
        order = (labels >= 0).long().argsort(stable=True)
        order = order[ids[order].argsort(stable=True)]
        ids, labels, used = ids[order], labels[order], used[order]
        wins = torch.ones_like(used)
        wins[:-1] = ids[1:] != ids[:-1]
        wins = wins & used
        end = len(self._labels) - 1
        known = wins & (ids < end)
        old = torch.where(known, self._labels[torch.where(known, ids, end)].long(), UNSEEN)
        new = torch.where(labels >= 0, labels, old.clamp(min=NEVER))
        change = self._count(new, wins) - self._count(old, wins)
        self._found = (ids, new, wins)
        self._largest.set(ids.max() if len(ids) else ids.sum() - 1)
        return change, (wins & (old == UNSEEN)).sum()

    def commit(self, sound: Tensor | None, rows: int | None) -> None:
        """Write down what `observe` found, unless it is not sound; `rows` are expected at least."""
        if self._found is None:
            return
        ids, labels, wins = self._found
        self._found = None
        self._grow(self._largest.get() + 1, rows or 0)
        writes = wins if sound is None else wins & sound
        end = len(self._labels) - 1
        places = torch.where(writes, ids, end)
        self._labels[places] = torch.where(writes, labels, UNSEEN).to(torch.int16)

    def discard(self) -> None:
        """Forget what `observe` found."""
        self._found = None

    def labels(self) -> Tensor:
        """A copy of the labels, int16 [rows]."""
        return self._labels[:-1].clone()

    def load(self, labels: Tensor) -> None:
        """Take over labels, of however many rows."""
        end = self._labels.new_full((1,), UNSEEN)
        self._labels = torch.cat([labels.to(end.device, end.dtype), end])
        self.discard()

    def _count(self, labels: Tensor, which: Tensor) -> Tensor:
        """How often each label occurs among some rows, int64 [classes]; integers, so exact."""
        counted = (which & (labels >= 0)).long()
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
        return counts.index_add(0, labels.clamp(min=0), counted)

    def _grow(self, needed: int, expected: int) -> None:
        length = len(self._labels) - 1
        if needed > length or expected > length:
            more = max(needed if needed <= expected else max(needed, 2 * length), expected)
            labels = self._labels.new_full((more + 1,), UNSEEN)
            labels[:length] = self._labels[:-1]
            self._labels = labels


class RowTable:
    """Numbers by row id, [rows, *shape], 0 where none were written; the same on every rank."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.values = torch.zeros(0, *shape, dtype=dtype, device=device)

    def reserve(self, ids: Tensor, expected: int | None = None) -> None:
        """Have room for these rows: for as many as are `expected`, and beyond that by doubling.

        Waits for the device.
        """
        there, needed = len(self.values), int(ids.max()) + 1 if len(ids) else 0
        if needed > there:
            doubled = max(needed, 2 * there, _FIRST_ROWS)
            rows = doubled if expected is None or needed > expected else expected
            more = (0, 0) * (self.values.dim() - 1) + (0, rows - there)
            self.values = F.pad(self.values, more)

    def write(self, ids: Tensor, values: Tensor, expected: int | None = None) -> None:
        """Set rows, each at most once."""
        self.reserve(ids, expected)
        self.values[ids] = values.to(self.values.dtype)

    def read(self, ids: Tensor) -> Tensor:
        """Rows, fp32 [rows, *shape]; 0 beyond the table's end."""
        if not len(self.values):
            return torch.zeros(len(ids), *self.values.shape[1:], device=ids.device)
        inside = ids < len(self.values)
        rows = self.values[torch.where(inside, ids, 0)].float()
        return rows * inside.view(-1, *[1] * (rows.dim() - 1))

    def load(self, values: Tensor) -> None:
        """Take over a table, of however many rows."""
        self.values = values.to(self.values.device, self.values.dtype).clone()


class _HostNumber:
    """A number on its way from the device: waiting for it waits for no later work."""

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


def take(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A state without one of its tensors, and that tensor; raises KeyError where it is missing."""
    rest = dict(state)
    if name not in rest:
        raise KeyError(f"state holds {sorted(state)}, expected {name!r} too")
    return rest, rest.pop(name)
