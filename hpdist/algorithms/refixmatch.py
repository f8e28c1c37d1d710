"""ReFixMatch: FixMatch that also learns, from soft targets, from rows below the threshold."""

from __future__ import annotations

from typing import ClassVar

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident, kl_divergence


class ReFixMatch(PseudoLabeling, name="refixmatch"):
    """L = L_x + lambda_u mean_b (m_b H(argmax q_b, p_b) + (1 - m_b) KL(q_b^T || p_b)).

    With z logits, q_b = softmax(z(weak(u_b))), p_b = softmax(z(strong(u_b))), the mask
    m_b = 1[max q_b >= tau], and q_b^T = softmax(z(weak(u_b)) / T).
    """

    paper: ClassVar[str] = "Nguyen and Yang 2023, arXiv:2308.07509"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    defaults: ClassVar[str] = "The paper's values."

    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence from which a prediction is a hard pseudo-label (tau)."""
    temperature: float = option(default=0.5, gt=0)
    """Temperature of the target of a row below the threshold (T)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised terms (lambda_u)."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Three terms, that of the rejected rows separate and weighted; the mask rate."""
        assert outputs.weak is not None
        mask, pseudo_labels = confident(outputs.weak.probabilities, self.threshold)
        divergences = kl_divergence(
            outputs.weak.logits / self.temperature, outputs.strong[0]
        )  # [unlabeled]
        rejected = (divergences * (1 - mask)).sum() / outputs.unlabeled_rows
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight,
                extras={"rejected_loss": self.unsupervised_weight * rejected},
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )


ReFixMatchConfig = ReFixMatch.Config
