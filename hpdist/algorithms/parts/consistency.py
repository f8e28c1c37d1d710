"""The consistency term: predictions with gradient follow targets, by the task's squared error."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.tasks.base import Task


def consistency_terms(
    outputs: StudentOutputs, targets: Any, task: Task, weight: Tensor
) -> LossTerms:
    """Return the supervised loss, and the squared error of the first weak view of the student.

    `targets` [unlabeled, *] are predictions without gradient; `weight` [] is that of their term.
    """
    losses = task.squared_error(outputs.student_weak[0], targets)  # [unlabeled]
    return LossTerms(
        supervised=supervised_loss(outputs, task),
        unsupervised=losses.sum() / outputs.unlabeled_rows,
        unsupervised_weight=weight,
    )
