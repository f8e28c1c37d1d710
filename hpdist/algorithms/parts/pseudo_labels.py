"""The base of pseudo-labelling: whose predictions become labels, and from which step on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.tasks.base import Task, share

_COUNT = "pseudo-labels"


def pseudo_label_count(task: Task, logits: Any, threshold: float) -> dict[str, Tensor]:
    """Count this rank's pseudo-labels, a sum to add up over the global batch.

    Empty of a task whose losses are means over rows.
    """
    if not task.counts_labels:
        return {}
    _, labels = task.pseudo_labels(logits, threshold)
    return {_COUNT: task.label_counts(labels).sum()}


def pseudo_label_terms(
    outputs: StudentOutputs, task: Task, logits: Any, targets: Any, threshold: float, sums: Sums
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the contribution of pseudo-labels to the loss, and what is logged of them.

    Args:
        outputs: Of the student.
        task: Says what a pseudo-label is.
        logits: The outputs that learn, [unlabeled, *].
        targets: The outputs that the pseudo-labels are of, [unlabeled, *], without gradient.
        threshold: The confidence that a pseudo-label needs.
        sums: `pseudo_label_count` of the global batch: the mean is over these, and over rows of a
            task that does not count them.
    """
    mask, labels = task.pseudo_labels(targets, threshold)
    losses = task.pseudo_label_losses(logits, labels, mask)
    count = sums[_COUNT].clamp(min=1) if _COUNT in sums else outputs.unlabeled_rows
    numbers = {"mask_rate": share(mask), **task.pseudo_label_metrics(labels, mask)}
    metrics = {name: each.sum() / outputs.unlabeled_rows for name, each in numbers.items()}
    return losses.sum() / count, metrics


class PseudoLabeling(Algorithm):
    """The base of algorithms that learn strong views from predictions on weak ones.

    During the first `burn_in` applied steps every term but the supervised one has weight 0, so
    only labels train: `loss` passes its terms through `burned_in`. The steps are counted in the
    state, which checkpoints hold; without a burn-in there is no such count.
    """

    targets: Literal["student", "teacher"] = option(default="student", last=True)
    """Whose weights predict on the weak views: the student's own, as in the paper, or their moving
    average (`teacher`)."""
    burn_in: int = option(default=0, last=True, ge=0)
    """Applied steps at the start that train on labelled rows only; thresholds and averages are
    updated meanwhile."""

    def start(self, device: torch.device | str) -> None:
        """Request the teacher's targets and make the count of applied steps, if needed."""
        super().start(device)
        if self.targets == "teacher":
            self.views = replace(self.views, teacher=True)  # type: ignore[misc]  # an option
        if self.burn_in > 0:
            self.state = {**self.state, "burn_in": torch.zeros((), device=device)}

    def burned_in(self, terms: LossTerms) -> LossTerms:
        """Return the terms; during the burn-in all but the supervised one have weight 0."""
        if self.burn_in == 0:
            return terms
        done = (self.state["burn_in"] >= self.burn_in).float()
        return replace(
            terms,
            unsupervised_weight=terms.unsupervised_weight * done,
            extras={name: term * done for name, term in terms.extras.items()},
            global_extras={name: term * done for name, term in terms.global_extras.items()},
        )

    def commit(self) -> None:
        """Make the pending state final, and count the step."""
        before = self.state
        super().commit()
        if self.burn_in > 0:
            self.state = {**self.state, "burn_in": before["burn_in"] + 1}
