"""What a batch is: tensors of this rank's slice of a global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used."""

    id: int
    where: str
    """File, row group and row."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class LabeledBatch:
    """Rows with labels: uint8 images, float32 vectors or sound, int64 tokens; labels, row ids."""

    inputs: Tensor  # [batch, channels, height, width], [batch, features], tokens or samples
    labels: Tensor  # int64 [batch]; fp32 [batch, classes] of several classes, or of targets
    ids: Tensor | None = None  # int64 [batch]; only algorithms that remember rows ask for them

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabeledBatch:
        """Copy the tensors to a device."""
        return LabeledBatch(
            self.inputs.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            None if self.ids is None else self.ids.to(device, non_blocking=non_blocking),
        )

    def narrow(self, start: int, length: int) -> LabeledBatch:
        """View rows [start, start + length)."""
        return LabeledBatch(
            self.inputs.narrow(0, start, length),
            self.labels.narrow(0, start, length),
            None if self.ids is None else self.ids.narrow(0, start, length),
        )


@dataclass(frozen=True)
class UnlabeledBatch:
    """Rows without labels: uint8 images, float32 vectors or sound, int64 tokens; row ids.

    Rows that are not `valid` (they could not be read, or a filter leaves them out) hold a place in
    the global batch and nothing else: no model sees them, and every mean is over the valid rows of
    all ranks.
    """

    inputs: Tensor  # [batch, channels, height, width], [batch, features], tokens or samples
    ids: Tensor | None = None  # int64 [batch]; only algorithms that remember rows ask for them
    valid: Tensor | None = None  # bool [batch], on the CPU; None: all of them
    epochs: Tensor | None = None  # int64 [batch], on the CPU: which epoch each row is of
    bad: tuple[BadRow, ...] = ()
    """Why, of the rows that are not valid because they could not be used."""

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> UnlabeledBatch:
        """Copy inputs and ids to a device; `valid` stays where it is."""
        return UnlabeledBatch(
            self.inputs.to(device, non_blocking=non_blocking),
            None if self.ids is None else self.ids.to(device, non_blocking=non_blocking),
            self.valid,
        )

    def narrow(self, start: int, length: int) -> UnlabeledBatch:
        """View rows [start, start + length)."""
        return UnlabeledBatch(
            self.inputs.narrow(0, start, length),
            None if self.ids is None else self.ids.narrow(0, start, length),
            None if self.valid is None else self.valid.narrow(0, start, length),
        )

    def only_valid(self) -> tuple[UnlabeledBatch, Tensor]:
        """The valid rows, and their places in this batch, int64 on the CPU."""
        if self.valid is None or bool(self.valid.all()):
            return UnlabeledBatch(self.inputs, self.ids), torch.arange(len(self))
        places = self.valid.nonzero().flatten()
        chosen = places.to(self.inputs.device)
        ids = None if self.ids is None else self.ids[places.to(self.ids.device)]
        return UnlabeledBatch(self.inputs[chosen], ids), places
