"""DeFixMatch: FixMatch with its bias measured on the labelled rows and subtracted."""

from __future__ import annotations

from typing import ClassVar

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident, hard_cross_entropy


class DeFixMatch(PseudoLabeling, name="defixmatch"):
    """L = L_x + lambda (L_u(U) - L_u(X)): an unbiased risk for any lambda.

    L_x = 1/2 mean_b (H(y_b, p(weak(x_b))) + H(y_b, p(strong(x_b)))), and L_u is FixMatch's term
    mean_b 1[max q_b >= tau] H(argmax q_b, p(strong(u_b))), q_b = p(weak(u_b)), of the unlabelled
    rows U and of the labelled ones X with their labels ignored. The loss can be negative.
    """

    paper: ClassVar[str] = "Schmutz et al. 2023, arXiv:2203.07512"
    views: ClassVar[Views] = Views(weak=1, strong=1, strong_labeled=1, labeled_targets=True)
    defaults: ClassVar[str] = "The paper's threshold; the weight is that of the benchmark USB."

    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = option(default=0.5, ge=0)
    """Weight of the unsupervised terms (lambda)."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Three terms, the debiasing one separate and weighted; the mask rate."""
        assert outputs.weak is not None
        assert outputs.weak.labeled is not None
        mask, pseudo_labels = confident(outputs.weak.probabilities, self.threshold)
        strong = outputs.strong_labeled[0]  # [labeled, classes]
        rows = outputs.labeled_rows
        strong_loss = hard_cross_entropy(strong, outputs.labels).sum() / rows
        x_mask, x_pseudo_labels = confident(outputs.weak.labeled.softmax(dim=-1), self.threshold)
        bias = (hard_cross_entropy(strong, x_pseudo_labels) * x_mask).sum() / rows
        return self.burned_in(
            LossTerms(
                supervised=(supervised_loss(outputs) + strong_loss) / 2,
                unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight,
                extras={"debiasing_loss": -self.unsupervised_weight * bias},
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )


DeFixMatchConfig = DeFixMatch.Config
