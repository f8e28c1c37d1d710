"""Pseudo-Label: the model's confident predictions become labels of the same view."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.pseudo_labels import pseudo_label_count, pseudo_label_terms
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.view_request import Views
from hpdist.data.structures import detach
from hpdist.tasks.base import PSEUDO_LABELS


class PseudoLabel(Ramped, name="pseudo_label"):
    """L = L_x + alpha(t) mean_b 1[max p_b >= tau] H(argmax p_b, p_b), with p_b = p(weak(u_b)).

    One view gives both label and loss; no gradient goes through the label. alpha rises linearly
    from 0 over the first `ramp_steps` applied steps. Equations 15 and 16 of the paper.
    """

    paper: ClassVar[str] = "Lee 2013, ICML workshop on challenges in representation learning"
    views: ClassVar[Views] = Views(student_weak=1)
    needs: ClassVar[frozenset[str]] = frozenset({PSEUDO_LABELS})
    shape = "linear"
    defaults: ClassVar[str] = (
        "The values of the benchmark USB; the paper has no threshold and ramps up to a weight of 3."
    )

    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that a pseudo-label needs; the paper has none (0)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term after the ramp (alpha_f)."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.4, default=0, ge=0, le=1)
    """Share of the run over which that weight rises from 0."""

    @property
    def uses_student_statistics(self) -> bool:
        """Whether the task's losses are a mean over pseudo-labels, which the student's pass has."""
        return self.task.counts_labels

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        """Count the pseudo-labels, if the task's losses are a mean over them."""
        return pseudo_label_count(self.task, detach(outputs.student_weak[0]), self.threshold)

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, the unsupervised one without its weight, and the mask rate."""
        logits = outputs.student_weak[0]  # [unlabeled, classes]
        unsupervised, metrics = pseudo_label_terms(
            outputs, self.task, logits, detach(logits), self.threshold, student_sums
        )
        return LossTerms(
            supervised=supervised_loss(outputs, self.task),
            unsupervised=unsupervised,
            unsupervised_weight=self.unsupervised_weight * self.ramp,
            metrics=metrics,
        )


PseudoLabelConfig = PseudoLabel.Config
