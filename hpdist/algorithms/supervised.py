"""Supervised training on the labels alone: what every other algorithm is measured against."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Sums,
    Views,
    supervised_loss,
)
from hpdist.tasks.base import ALL


class SupervisedConfig(AlgorithmConfig):
    """No options."""

    name: Literal["supervised"] = "supervised"

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> Supervised:
        """Make the algorithm."""
        return Supervised()


class FullySupervisedConfig(SupervisedConfig):
    """No options; the run's labelled data must be all there are."""

    name: Literal["fully_supervised"] = "fully_supervised"  # type: ignore[assignment]


class Supervised(Algorithm):
    """L = mean_b H(y_b, p(weak(x_b))), with H what the task says."""

    views: ClassVar[Views] = Views()
    tasks: ClassVar[tuple[str, ...]] = ALL

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The supervised term; the unsupervised one is zero."""
        supervised = supervised_loss(outputs, self.task)
        return LossTerms(supervised, torch.zeros_like(supervised))
