"""Supervised training on the labels alone: the baseline of every other algorithm."""

from __future__ import annotations

from typing import ClassVar

import torch

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.view_request import Views


class Supervised(Algorithm, name="supervised"):
    """L = mean_b H(y_b, p(weak(x_b))), with the task's loss H."""

    views: ClassVar[Views] = Views()
    needs: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[str] = "No options."

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The supervised term; the unsupervised one is zero."""
        supervised = supervised_loss(outputs, self.task)
        return LossTerms(supervised, torch.zeros_like(supervised))


SupervisedConfig = Supervised.Config


class FullySupervised(Supervised, name="fully_supervised"):
    """Supervised training with every label: the upper baseline of semi-supervised training."""

    defaults: ClassVar[str] = "No options; the run's labelled data must be all there are."


FullySupervisedConfig = FullySupervised.Config
