"""Mean Teacher: the student matches the averaged weights' prediction on another weak view."""

from __future__ import annotations

from typing import ClassVar

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.consistency import consistency_terms
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import PREDICTIONS


class MeanTeacher(Ramped, name="mean_teacher"):
    """L = L_x + r(t) lambda_u mean_{b,c} (p_theta(u2_b)_c - p_theta'(u1_b)_c)^2.

    Here theta' is the teacher, u1 and u2 are weak views, and r rises linearly from 0 to 1 over the
    first `ramp_steps` applied steps. No gradient reaches the teacher. Section 2 of the paper.
    """

    paper: ClassVar[str] = "Tarvainen and Valpola 2017, arXiv:1703.01780"
    views: ClassVar[Views] = Views(weak=1, student_weak=1, teacher=True)
    needs: ClassVar[frozenset[str]] = frozenset({PREDICTIONS})
    shape = "linear"
    defaults: ClassVar[str] = (
        "The values of the benchmark USB; the teacher's decay is the run's `teacher.decay`."
    )

    unsupervised_weight: float = option(default=50.0, kw_only=False, ge=0)
    """Weight of the consistency term after the ramp."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.4, default=0, kw_only=False, ge=0, le=1)
    """Share of the run over which that weight rises from 0."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the consistency term without its weight."""
        assert outputs.weak is not None
        targets = self.task.predictions(outputs.weak.logits)
        weight = self.unsupervised_weight * self.ramp
        return consistency_terms(outputs, targets, self.task, weight)


MeanTeacherConfig = MeanTeacher.Config
