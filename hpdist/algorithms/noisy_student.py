"""Noisy Student: each generation learns from the previous one's labels of the unlabelled rows."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.parts.row_tables import FIRST_ROWS, RemembersRows, ShardedRows
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import soft_cross_entropy

_LEAST = 1e-4  # of a row's probabilities together: one without a label has none


class NoisyStudent(RemembersRows, name="noisy_student"):
    """L = L_x + lambda mean_b 1[max q_b >= tau] H(q_b, p(strong(u_b))), algorithm 1 of the paper.

    q_b is the prediction of the previous generation's teacher for the row as it is, without noise;
    the first generation has none, and its term is 0. Between generations the EMA of the weights,
    the teacher, labels all rows, and the student is reset, here at the same size. The noise is
    that of the strong view and of the model. The paper's balancing of classes is left out.

    Each rank holds the labels of the rows that it owns in fp16, 2 N C / ranks bytes, or with `top`
    4 to 6 bytes for each of so many classes of a row; what is left out is shared among these, as a
    target sums to 1. Labels are made between generations, so on one rank a step reduces nothing; on
    several the ids of the global batch's rows, and what their owners remember of them.
    """

    paper: ClassVar[str] = "Xie et al. 2020, arXiv:1911.04252"
    views: ClassVar[Views] = Views(strong=1)
    defaults: ClassVar[str] = "The paper's values."

    num_classes: int = argument(kw_only=False)
    generations: int = option(default=4, ge=2)
    """Equal parts of the run; the first learns from the labels alone."""
    threshold: float = option(default=0.3, ge=0, le=1)
    """Confidence of the teacher that a row needs to be learnt from."""
    soft: bool = option(default=True)
    """Whether a row's target is the teacher's whole prediction or its most likely class."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unlabelled rows' term."""
    top: int | None = option(default=None, ge=1)
    """Keep only so many of a row's probabilities, the largest; by default those of all classes."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        self.state = {"generation": torch.zeros((), device=device)}
        self._labels = ShardedRows(self.num_classes, torch.float16, device, self.top)
        self.remembered = {"labels": self._labels}

    @property
    def generation(self) -> int:
        """How often the student has been reset."""
        return int(self.state["generation"])

    def summed_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count those of the rows' labels, on several ranks."""
        return 4 * unlabeled * (self.top or self.num_classes) if self.recalls else 0

    def take_labels(self, ids: Tensor, probabilities: Tensor) -> None:
        """Write the predictions into the table."""
        expected = None if self.rows is None else max(self.rows, FIRST_ROWS)
        self._labels.write(ids, probabilities, expected)

    def begin_generation(self) -> None:
        """Count the generation."""
        self.state = {"generation": self.state["generation"] + 1}
        self.discard()

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Look up the rows' labels; all 0 for a row without one."""
        targets = self.looked_up("labels", inputs.known_ids, inputs.positions)
        return replace(inputs, context={**inputs.context, "targets": targets})

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the share of rows that the student learns from."""
        targets = outputs.context["targets"]
        confidence, labels = targets.max(dim=-1)
        mask = ((confidence >= self.threshold) & (confidence > 0)).float()
        if self.soft:
            targets = targets / targets.sum(dim=-1, keepdim=True).clamp(min=_LEAST)
        else:
            targets = F.one_hot(labels, self.num_classes).float()
        losses = soft_cross_entropy(outputs.strong[0], targets) * mask  # [unlabeled]
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )


NoisyStudentConfig = NoisyStudent.Config
