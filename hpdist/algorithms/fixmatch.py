"""FixMatch: confident predictions on weak views are the labels of strong views."""

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
from hpdist.tasks.base import CLASSIFICATION, Multilabel, share


class FixMatchConfig(AlgorithmConfig):
    """The paper's values."""

    name: Literal["fixmatch"] = "fixmatch"
    threshold: float = Field(0.95, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = Field(1.0, ge=0)
    """Weight of the unsupervised term (lambda_u)."""

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> FixMatch:
        """Make the algorithm; it has no state, so no argument matters."""
        return FixMatch(self.threshold, self.unsupervised_weight)


class FixMatch(Algorithm):
    """L = L_x + lambda_u mean_b 1[max q_b >= tau] H(argmax q_b, p(strong(u_b))).

    With q_b = p(weak(u_b)). Equations 3 and 4 of the paper. Of several labels each is decided
    alone: mean_b mean_c 1[max(q_bc, 1 - q_bc) >= tau] H(1[q_bc > 1/2], p(strong(u_b))_c).
    """

    paper: ClassVar[str] = "Sohn et al. 2020, arXiv:2001.07685"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION.name, Multilabel.name)

    def __init__(self, threshold: float = 0.95, unsupervised_weight: float = 1.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.unsupervised_weight = unsupervised_weight

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the share of pseudo-labels that passed the threshold."""
        assert outputs.weak is not None
        mask, pseudo_labels = self.task.pseudo_labels(outputs.weak.logits, self.threshold)
        losses = self.task.pseudo_label_losses(outputs.strong[0], pseudo_labels, mask)
        return LossTerms(
            supervised=supervised_loss(outputs, self.task),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            metrics={"mask_rate": share(mask).sum() / outputs.unlabeled_rows},
        )
