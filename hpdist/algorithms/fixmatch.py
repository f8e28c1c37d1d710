"""FixMatch: confident predictions on weak views are the labels of strong views."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.pseudo_labels import (
    PseudoLabeling,
    pseudo_label_count,
    pseudo_label_terms,
)
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import PSEUDO_LABELS


class FixMatch(PseudoLabeling, name="fixmatch"):
    """L = L_x + lambda_u mean_b 1[max q_b >= tau] H(argmax q_b, p(strong(u_b))).

    Here q_b = p(weak(u_b)). Equations 3 and 4 of the paper. With several labels per row each is
    decided by itself: mean_b mean_c 1[max(q_bc, 1 - q_bc) >= tau] H(1[q_bc > 1/2],
    p(strong(u_b))_c). Of boxes the mean is over the pseudo-boxes of the global batch.
    """

    paper: ClassVar[str] = "Sohn et al. 2020, arXiv:2001.07685"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    needs: ClassVar[frozenset[str]] = frozenset({PSEUDO_LABELS})
    defaults: ClassVar[str] = "The paper's values."

    threshold: float = option(default=0.95, kw_only=False, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = option(default=1.0, kw_only=False, ge=0)
    """Weight of the unsupervised term (lambda_u)."""

    _counted: Sums | None = None  # this step's pseudo-labels, if the task counts them

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Count the pseudo-labels, if the task's losses are a mean over them."""
        return pseudo_label_count(self.task, weak.logits, self.threshold)

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Keep that count for the loss of this step."""
        super().observe(sums, unlabeled_rows)
        self._counted = sums

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the share of pseudo-labels that passed the threshold."""
        assert outputs.weak is not None
        unsupervised, metrics = pseudo_label_terms(
            outputs,
            self.task,
            outputs.strong[0],
            outputs.weak.logits,
            self.threshold,
            self._counted or {},
        )
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs, self.task),
                unsupervised=unsupervised,
                unsupervised_weight=self.unsupervised_weight,
                metrics=metrics,
            )
        )


FixMatchConfig = FixMatch.Config
