"""FixMatch: confident predictions on weak views are the labels of strong views."""

from __future__ import annotations

from typing import ClassVar

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import PSEUDO_LABELS, share


class FixMatch(PseudoLabeling, name="fixmatch"):
    """L = L_x + lambda_u mean_b 1[max q_b >= tau] H(argmax q_b, p(strong(u_b))).

    Here q_b = p(weak(u_b)). Equations 3 and 4 of the paper. With several labels per row each is
    decided by itself: mean_b mean_c 1[max(q_bc, 1 - q_bc) >= tau] H(1[q_bc > 1/2],
    p(strong(u_b))_c).
    """

    paper: ClassVar[str] = "Sohn et al. 2020, arXiv:2001.07685"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    needs: ClassVar[frozenset[str]] = frozenset({PSEUDO_LABELS})
    defaults: ClassVar[str] = "The paper's values."

    threshold: float = option(default=0.95, kw_only=False, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = option(default=1.0, kw_only=False, ge=0)
    """Weight of the unsupervised term (lambda_u)."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the share of pseudo-labels that passed the threshold."""
        assert outputs.weak is not None
        mask, pseudo_labels = self.task.pseudo_labels(outputs.weak.logits, self.threshold)
        losses = self.task.pseudo_label_losses(outputs.strong[0], pseudo_labels, mask)
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs, self.task),
                unsupervised=losses.sum() / outputs.unlabeled_rows,
                unsupervised_weight=self.unsupervised_weight,
                metrics={"mask_rate": share(mask).sum() / outputs.unlabeled_rows},
            )
        )


FixMatchConfig = FixMatch.Config
