"""What passes in training leave in a layer for its running statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Receives the statistics of one batch from torch's own kernel."""

    values: Tensor
    """Mean, unbiased variance and number of elements, fp32 [2 channels + 1]."""
    statistics: Tensor
    """A view of the first two."""
    mean: Tensor
    variance: Tensor
    count: int


class Records:
    """The statistics of one layer's batches since the last commit, in the form that each pass has.

    Args:
        channels: Of the layer.
        device: Of the layer.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        self.batches: list[Batch] = []
        """Where one process normalises by itself."""
        self.moments: list[Tensor] = []
        """Where the statistics are those of several ranks: float64 [2 channels + 1]."""
        # Compiled graphs add moments here, with unbiased variances, as they cannot append to lists.
        # DeepSpeed may change the dtype of what is created.
        self.compiled = torch.zeros(2 * channels + 1, device=device).double()
        self._cleared_at = self.compiled._version
        self._spare: list[Batch] = []

    def __reduce__(self) -> tuple[type[Records], tuple[int, torch.device]]:
        """Copy and pickle without contents."""
        return Records, (self.channels, self.compiled.device)

    def new_batch(self, count: int, device: torch.device) -> Batch:
        """Make room for the statistics of one more batch of so many elements per channel."""
        batch = self._spare.pop() if self._spare else self._made(device)
        if batch.count != count:
            batch.values[-1] = batch.count = count
        self.batches.append(batch)
        return batch

    @property
    def compiled_ran(self) -> bool:
        """Whether a compiled graph has added something, which only its version tells."""
        return self.compiled._version != self._cleared_at

    def any(self) -> bool:
        """Whether anything is recorded."""
        return bool(self.batches or self.moments or self.compiled_ran)

    def clear(self) -> None:
        """Forget what is recorded; the caller sets the statistics of the batches to zero."""
        if self.compiled_ran:
            self.compiled.zero_()
            self._cleared_at = self.compiled._version
        self._spare += reversed(self.batches)
        self.batches, self.moments = [], []

    def move(self, device: torch.device) -> None:
        """Move to another device, without contents."""
        self.__init__(self.channels, device)  # type: ignore[misc]

    def _made(self, device: torch.device) -> Batch:
        values = torch.zeros(2 * self.channels + 1, device=device)
        mean, variance, _ = values.split((self.channels, self.channels, 1))
        return Batch(values, values[:-1], mean, variance, 0)
