"""Mean Teacher: the student's prediction follows the averaged weights' on another weak view."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms import ramps
from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Sums,
    Views,
    supervised_loss,
)


class MeanTeacherConfig(AlgorithmConfig):
    """The values of common benchmarks; the teacher's decay is the run's `teacher.decay`."""

    name: Literal["mean_teacher"] = "mean_teacher"
    unsupervised_weight: float = Field(50.0, ge=0)
    """Weight of the consistency term after the ramp."""
    ramp: float = Field(0.4, ge=0, le=1)
    """Share of the run over which that weight rises from 0."""

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> MeanTeacher:
        """Make the algorithm for a run of `steps`."""
        return MeanTeacher(self.unsupervised_weight, round(self.ramp * steps), device=device)


class MeanTeacher(Algorithm):
    """L = L_x + r(t) lambda_u mean_{b,c} (p_theta(u2_b)_c - p_theta'(u1_b)_c)^2.

    Here theta' is the teacher, u1 and u2 are weak views, and r rises linearly from 0 to 1 over the
    first `ramp_steps` applied steps. No gradient reaches the teacher. Section 2 of the paper.
    """

    paper: ClassVar[str] = "Tarvainen and Valpola 2017, arXiv:1703.01780"
    views: ClassVar[Views] = Views(weak=1, student_weak=1, teacher=True)

    def __init__(
        self,
        unsupervised_weight: float = 50.0,
        ramp_steps: int = 0,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.unsupervised_weight = unsupervised_weight
        self.ramp_steps = ramp_steps
        self.state = {"step": torch.zeros((), device=device)}  # applied steps
        self.discard()

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step."""
        self.pending = {"step": self.state["step"] + 1}

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the consistency term without its weight."""
        assert outputs.weak is not None
        student = outputs.student_weak[0].softmax(dim=-1)
        weight = ramps.linear(self.state["step"], self.ramp_steps)
        losses = (student - outputs.weak.probabilities).square().mean(dim=-1)  # [unlabeled]
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight * weight,
        )
