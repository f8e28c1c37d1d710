"""What a batch is: tensors of this rank's slice of a global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypedDict, cast

import torch
from torch import Tensor

from hpdist.data import structures
from hpdist.data.structures import Inputs, Labels
from hpdist.errors import printable

STORED = "stored "
"""Begins the names of `StoredTensors` in what an algorithm is given with its inputs."""


class StoredTensors(TypedDict):
    """What was predicted for rows before the run, and stored."""

    probabilities: Tensor
    """fp32 [batch, classes]; all 0 where a row has no stored label."""
    confidence: Tensor
    """fp32 [batch], of the likeliest class."""
    agreement: Tensor
    """fp32 [batch]: the share of the predictions that are of that class; 0 without a label."""


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used."""

    id: int
    where: str
    """File, row group and row."""
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}")


@dataclass(frozen=True)
class LabeledBatch(Generic[Inputs, Labels]):
    """Rows with labels: uint8 images, float32 vectors or sound, int64 tokens; labels, row ids.

    Inputs and labels may each be one tensor or tensors by name, [batch, *] all of them; what has
    another length in every row is padded, with a mask.
    """

    inputs: Inputs  # [batch, channels, height, width], [batch, features], tokens or samples
    labels: Labels  # int64 [batch]; fp32 [batch, classes] of several classes, or of targets
    ids: Tensor | None = None  # int64 [batch]; only algorithms that remember rows ask for them

    def __len__(self) -> int:
        return structures.row_count(self.inputs)

    def to(
        self, device: torch.device | str, non_blocking: bool = False
    ) -> LabeledBatch[Inputs, Labels]:
        """Copy the tensors to a device."""
        return LabeledBatch(
            structures.to(self.inputs, device, non_blocking=non_blocking),
            structures.to(self.labels, device, non_blocking=non_blocking),
            None if self.ids is None else self.ids.to(device, non_blocking=non_blocking),
        )

    def narrow(self, start: int, length: int) -> LabeledBatch[Inputs, Labels]:
        """View rows [start, start + length)."""
        return LabeledBatch(
            structures.narrow(self.inputs, start, length),
            structures.narrow(self.labels, start, length),
            None if self.ids is None else self.ids.narrow(0, start, length),
        )


@dataclass(frozen=True)
class UnlabeledBatch(Generic[Inputs]):
    """Rows without labels: uint8 images, float32 vectors or sound, int64 tokens; row ids.

    Inputs may be one tensor or tensors by name, [batch, *] all of them.

    Rows that are not `valid` (they could not be read, or a filter leaves them out) hold a place in
    the global batch and nothing else: no model sees them, and every mean is over the valid rows of
    all ranks.
    """

    inputs: Inputs  # [batch, channels, height, width], [batch, features], tokens or samples
    ids: Tensor | None = None  # int64 [batch]; only algorithms that remember rows ask for them
    valid: Tensor | None = None  # bool [batch], on the CPU; None: all of them
    epochs: Tensor | None = None  # int64 [batch], on the CPU: which epoch each row is of
    bad: tuple[BadRow, ...] = ()
    """Why, of the rows that are not valid because they could not be used."""
    stored: StoredTensors | None = None
    """What `data.unlabeled.pseudo_labels` has of the rows; only some algorithms ask for it."""

    def __len__(self) -> int:
        return structures.row_count(self.inputs)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> UnlabeledBatch[Inputs]:
        """Copy inputs, ids and stored labels to a device; `valid` stays where it is."""
        return UnlabeledBatch(
            structures.to(self.inputs, device, non_blocking=non_blocking),
            None if self.ids is None else self.ids.to(device, non_blocking=non_blocking),
            self.valid,
            stored=self._stored(lambda kept: kept.to(device, non_blocking=non_blocking)),
        )

    def narrow(self, start: int, length: int) -> UnlabeledBatch[Inputs]:
        """View rows [start, start + length)."""
        return UnlabeledBatch(
            structures.narrow(self.inputs, start, length),
            None if self.ids is None else self.ids.narrow(0, start, length),
            None if self.valid is None else self.valid.narrow(0, start, length),
            stored=self._stored(lambda kept: kept.narrow(0, start, length)),
        )

    def only_valid(self) -> tuple[UnlabeledBatch[Inputs], Tensor]:
        """The valid rows, and their places in this batch, int64 on the CPU."""
        if self.valid is None or bool(self.valid.all()):
            return UnlabeledBatch(self.inputs, self.ids, stored=self.stored), torch.arange(
                len(self)
            )
        places = self.valid.nonzero().flatten()
        ids = None if self.ids is None else structures.index(self.ids, places)
        stored = self._stored(lambda kept: structures.index(kept, places))
        return UnlabeledBatch(structures.index(self.inputs, places), ids, stored=stored), places

    def _stored(self, change: Callable[[Tensor], Tensor]) -> StoredTensors | None:
        """Apply a function to every stored tensor."""
        if self.stored is None:
            return None
        return cast(StoredTensors, {k: change(cast(Tensor, v)) for k, v in self.stored.items()})
