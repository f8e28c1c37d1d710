"""Entropy minimisation: predictions on unlabelled rows are made certain, whatever they say."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Sums,
    Views,
    supervised_loss,
)
from hpdist.tasks.base import CLASSIFICATION, Multilabel


class EntropyMinimizationConfig(AlgorithmConfig):
    """The weight that the benchmark USB has beside VAT; the paper cross-validates its own."""

    name: Literal["entropy_minimization"] = "entropy_minimization"
    unsupervised_weight: float = Field(0.06, ge=0)
    """Weight of the entropy (lambda)."""

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> EntropyMinimization:
        """Make the algorithm; it has no state, so no argument matters."""
        return EntropyMinimization(self.unsupervised_weight)


class EntropyMinimization(Algorithm):
    """L = L_x + lambda mean_b H(p_b, p_b), with p_b = p(weak(u_b)) and gradient through both.

    The paper's criterion C(theta, lambda), as a loss.
    """

    paper: ClassVar[str] = "Grandvalet and Bengio 2004, NIPS 17"
    views: ClassVar[Views] = Views(student_weak=1)
    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION.name, Multilabel.name)

    def __init__(self, unsupervised_weight: float = 0.06) -> None:
        super().__init__()
        self.unsupervised_weight = unsupervised_weight

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the entropy without its weight."""
        losses = self.task.entropy(outputs.student_weak[0])  # [unlabeled]
        return LossTerms(
            supervised=supervised_loss(outputs, self.task),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
        )
