"""The positions of a micro-batch's rows in the global batch, and the noise keyed by them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpdist.data.random import normal, stream_id, uniform


@dataclass(frozen=True)
class BatchPositions:
    """Where a micro-batch's rows stand in the global batch, and noise that depends only on that.

    The noise is the same however many ranks share the batch.
    """

    labeled: Tensor  # [labeled], int64, on the CPU
    unlabeled: Tensor  # [unlabeled], int64, on the CPU
    labeled_rows: int  # of the global batch
    unlabeled_rows: int  # of the global batch, including rows that cannot be used
    seed: int
    step: int

    def noise(self, name: str, count: int, *, labeled: bool = False) -> Tensor:
        """Uniform numbers in [0, 1) for each row, fp32 [rows, count], on the CPU."""
        positions = self.labeled if labeled else self.unlabeled
        return uniform(self.seed, self._stream(name, labeled), self.step, positions, count)

    def normal(self, name: str, count: int, *, labeled: bool = False) -> Tensor:
        """Standard normal numbers for each row, fp32 [rows, count], on the CPU."""
        positions = self.labeled if labeled else self.unlabeled
        return normal(self.seed, self._stream(name, labeled), self.step, positions, count)

    def _stream(self, name: str, labeled: bool) -> int:
        return stream_id("algorithm", "labeled" if labeled else "unlabeled", name)
