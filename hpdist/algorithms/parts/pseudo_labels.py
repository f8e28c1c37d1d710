"""Whose predictions become pseudo-labels, and from which step on they count."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option


class PseudoLabeling(Algorithm):
    """The base of those that learn strong views from predictions on weak ones.

    During the first `burn_in` applied steps every term but the supervised one has weight 0, so that
    only labels train: `loss` passes its terms through `burned_in`. The steps are counted in the
    state, which checkpoints hold; without a burn-in there is no such count.
    """

    targets: Literal["student", "teacher"] = option(default="student", last=True)
    """Whose weights predict on the weak views: the student's own, as in the paper, or the moving
    average's (`teacher`)."""
    burn_in: int = option(default=0, last=True, ge=0)
    """Applied steps, from the first, in which only the labelled rows train; thresholds and averages
    go on meanwhile."""

    def start(self, device: torch.device | str) -> None:
        """Ask for the teacher's targets, and make the count of applied steps, where wanted."""
        super().start(device)
        if self.targets == "teacher":
            self.views = replace(self.views, teacher=True)  # type: ignore[misc]  # an option
        if self.burn_in > 0:
            self.state = {**self.state, "burn_in": torch.zeros((), device=device)}

    def burned_in(self, terms: LossTerms) -> LossTerms:
        """Return the terms, during the burn-in with weight 0 but for the supervised one."""
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
