"""DebiasPL: pseudo-labels corrected for the classes that the model favours anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.alignment import moved, uniform_prior

_SMALL = 1e-12


class DebiasPL(AddOn, name="debiaspl"):
    """Targets from z - lambda log p^, losses on unlabelled rows of z + lambda log p^.

    p^_c is the moving average over steps, per class, of the mean prediction on the first weak view
    of the global batch, from the unchanged logits; uniform at first. The first is the paper's
    debiased pseudo-label, the second its adaptive marginal loss. Both use p^ from before the step;
    the released code's margin already includes this batch. Labelled rows, and inputs that the inner
    algorithm makes itself, are left unchanged.
    """

    name: ClassVar[str] = "debiaspl"
    addon_paper: ClassVar[str] = "Wang et al. 2022, arXiv:2201.01490"
    defaults: ClassVar[str] = "The values of the paper's released code."

    num_classes: int = argument(kw_only=False)
    tau: float = option(default=0.4, ge=0)
    """How much of the log mean prediction is subtracted, and added as a margin (lambda)."""
    momentum: float = option(default=0.999, ge=0, lt=1)
    """Momentum of the mean prediction (m)."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        self.remember({"probability": uniform_prior(self.num_classes, device)})

    def targets(self, weak: WeakOutputs) -> WeakOutputs:
        """Debias the logits of the unlabelled rows' weak views."""
        return replace(
            weak,
            logits=weak.logits - self._shift,
            others=tuple(view - self._shift for view in weak.others),
        )

    def student(self, outputs: StudentOutputs) -> StudentOutputs:
        """Add the margin to the logits of the unlabelled rows."""
        return replace(
            outputs,
            strong=tuple(view + self._shift for view in outputs.strong),
            student_weak=tuple(view + self._shift for view in outputs.student_weak),
        )

    def own_statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """The sum of the unchanged predictions."""
        return {"probability": weak.probabilities.sum(dim=0)}

    def own_observe(self, sums: Sums, unlabeled_rows: Tensor) -> dict[str, Tensor]:
        """Move the average towards this batch's mean."""
        mean = sums["probability"] / unlabeled_rows
        return {"probability": moved(self.own["probability"], mean, self.momentum)}

    @property
    def _shift(self) -> Tensor:
        return self.tau * (self.own["probability"] + _SMALL).log()


DebiasPLConfig = DebiasPL.Config
