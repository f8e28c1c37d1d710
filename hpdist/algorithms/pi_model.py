"""Pi-model: predictions for two weak views of the same row agree."""

from __future__ import annotations

from typing import ClassVar

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.consistency import consistency_terms
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import PREDICTIONS


class PiModel(Ramped, name="pi_model"):
    """L = L_x + w(t) mean_{b,c} (p(u2_b)_c - p(u1_b)_c)^2, algorithm 1 of the paper.

    Here u1 and u2 are weak views, with the model's own noise in both, and w(t) = w_max exp(-5 (1 -
    T)^2) with T rising from 0 to 1 over the first `ramp_steps` applied steps. No gradient goes
    through p(u1), as in common benchmarks; with a gradient in both, as in the paper, it would be
    twice that on average. The term covers unlabelled rows only, the paper's also labelled ones.
    """

    paper: ClassVar[str] = "Laine and Aila 2017, arXiv:1610.02242"
    views: ClassVar[Views] = Views(weak=1, student_weak=1)
    needs: ClassVar[frozenset[str]] = frozenset({PREDICTIONS})
    shape = "gaussian"
    defaults: ClassVar[str] = "The paper's values; its ramp is 80 of 300 epochs."

    unsupervised_weight: float = option(default=100.0, kw_only=False, ge=0)
    """Weight of the consistency term after the ramp (w_max). The paper's factor M / N, labelled by
    all rows, is part of the means: here each term is the mean over its own rows."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.27, default=0, kw_only=False, ge=0, le=1)
    """Share of the run over which that weight rises."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the consistency term without its weight."""
        assert outputs.weak is not None
        targets = self.task.predictions(outputs.weak.logits)
        weight = self.unsupervised_weight * self.ramp
        return consistency_terms(outputs, targets, self.task, weight)


PiModelConfig = PiModel.Config
