"""The base of pseudo-labelling: whose predictions become labels, and from which step on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option


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
