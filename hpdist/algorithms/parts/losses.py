"""Losses that several algorithms share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.exchange import StudentOutputs
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import Task


def supervised_loss(outputs: StudentOutputs, task: Task = DEFAULT_TASK) -> Tensor:
    """Loss of the labelled rows by the task (cross-entropy by default).

    The result is a contribution to the mean of the global batch: over its rows, or over what the
    task counts of their labels.
    """
    count = outputs.labeled_rows if outputs.label_count is None else outputs.label_count
    return task.losses(outputs.labeled, outputs.labels).sum() / count


def masked_pseudo_label_loss(
    outputs: StudentOutputs, mask: Tensor, pseudo_labels: Tensor
) -> Tensor:
    """Cross-entropy of the strong view with hard pseudo-labels where `mask` holds.

    `mask` [unlabeled] is fp32 (weights in [0, 1]), `pseudo_labels` [unlabeled] int64. The mean is
    over all unlabelled rows, not over those that pass.
    """
    losses = F.cross_entropy(outputs.strong[0], pseudo_labels, reduction="none")  # [unlabeled]
    return (losses * mask).sum() / outputs.unlabeled_rows
