"""Supervised training on the labels alone: what every other algorithm is measured against."""

from __future__ import annotations

from typing import ClassVar

import torch

from hpdist.algorithms.base import (
    Algorithm,
    LossTerms,
    StudentOutputs,
    Sums,
    Views,
    supervised_loss,
)


class Supervised(Algorithm, name="supervised"):
    """L = mean_b H(y_b, p(weak(x_b))), with H what the task says."""

    views: ClassVar[Views] = Views()
    needs: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[str] = "No options."

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The supervised term; the unsupervised one is zero."""
        supervised = supervised_loss(outputs, self.task)
        return LossTerms(supervised, torch.zeros_like(supervised))


SupervisedConfig = Supervised.Config


class FullySupervised(Supervised, name="fully_supervised"):
    """Supervised training from every label: what semi-supervised training is measured against."""

    defaults: ClassVar[str] = "No options; the run's labelled data must be all there are."


FullySupervisedConfig = FullySupervised.Config
