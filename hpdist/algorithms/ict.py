"""ICT: the prediction between two rows lies between the teacher's predictions for both."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hpdist.algorithms.base import Groups
from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.consistency import consistency_terms
from hpdist.algorithms.parts.mixing import GroupsOption, Mixing, draw_mixing
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.view_request import Views
from hpdist.tasks.base import PREDICTIONS


class ICT(Ramped, name="ict"):
    """L = L_x + w(t) mean_{j,c} (p_theta(Mix(u_j, u_k))_c - Mix(p_theta'(u_j), p_theta'(u_k))_c)^2.

    Here Mix(a, b) = lambda a + (1 - lambda) b, theta' is the teacher and lambda ~ Beta(alpha,
    alpha); algorithm 1 of the paper. Weak views are mixed, each with one of its group, k
    being a permutation of j, and lambda is drawn for each row instead of once a step. The weight
    rises as exp(-5 (1 - T)^2) while T goes from 0 to 1 over `ramp_steps` applied steps.
    """

    paper: ClassVar[str] = "Verma et al. 2019, arXiv:1903.03825"
    views: ClassVar[Views] = Views(weak=1, teacher=True)
    needs: ClassVar[frozenset[str]] = frozenset({PREDICTIONS})
    mixed = ("unlabeled",)
    shape = "gaussian"
    defaults: ClassVar[str] = (
        "The upper ends of the paper's search: alpha from 0.1, w from 1.\n"
        "\n"
        "The teacher's decay is the run's `teacher.decay`."
    )

    alpha: float = option(default=1.0, gt=0)
    """Parameter of the Beta distribution of a row's share of a mixture (alpha)."""
    unsupervised_weight: float = option(default=100.0, ge=0)
    """Weight of the consistency term after the ramp (w)."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.25, default=0, ge=0, le=1)
    """Share of the run over which that weight rises."""
    groups: Groups = option(default="auto", annotation=GroupsOption)
    """Parts of the global batch within which rows are mixed. Ranks times micro-batches must divide
    this number, and it must divide the batch. auto: at most 8, each with 8 or more rows of both
    kinds, as far as ranks and micro-batches allow."""

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Add the teacher's weak views, mixed."""
        rows = inputs.weak[0]
        mixing = draw_mixing(
            inputs.positions, "ict", self.alpha, self.groups, unlabeled=1, device=rows.device
        )
        context = {"partners": mixing.partners, "shares": mixing.shares}
        return replace(inputs, student_weak=(mixing(rows),), context=context)

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the consistency term without its weight."""
        assert outputs.weak is not None
        mixing = Mixing(outputs.context["partners"], outputs.context["shares"])
        targets = mixing(self.task.predictions(outputs.weak.logits))
        weight = self.unsupervised_weight * self.ramp
        return consistency_terms(outputs, targets, self.task, weight)


ICTConfig = ICT.Config
