"""Entropy minimisation: predictions on unlabelled rows are made certain."""

from __future__ import annotations

from typing import ClassVar

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import ENTROPY


class EntropyMinimization(Algorithm, name="entropy_minimization"):
    """L = L_x + lambda mean_b H(p_b, p_b), with p_b = p(weak(u_b)) and gradient through both.

    The paper's criterion C(theta, lambda), as a loss.
    """

    paper: ClassVar[str] = "Grandvalet and Bengio 2004, NIPS 17"
    views: ClassVar[Views] = Views(student_weak=1)
    needs: ClassVar[frozenset[str]] = frozenset({ENTROPY})
    defaults: ClassVar[str] = (
        "The weight that the benchmark USB uses beside VAT; the paper cross-validates its own."
    )

    unsupervised_weight: float = option(default=0.06, kw_only=False, ge=0)
    """Weight of the entropy (lambda)."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the entropy without its weight."""
        losses = self.task.entropy(outputs.student_weak[0])  # [unlabeled]
        return LossTerms(
            supervised=supervised_loss(outputs, self.task),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
        )


EntropyMinimizationConfig = EntropyMinimization.Config
