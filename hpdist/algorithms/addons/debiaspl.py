"""DebiasPL: pseudo-labels freed of the classes that the model favours anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms.addons.base import AddOn, AddOnConfig
from hpdist.algorithms.base import Algorithm, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.parts.alignment import moved, uniform_prior

_SMALL = 1e-12


class DebiasPLConfig(AddOnConfig):
    """The values of the paper's released code."""

    name: Literal["debiaspl"] = "debiaspl"
    tau: float = Field(0.4, ge=0)
    """How much of the log mean prediction is taken off, and added as a margin (lambda)."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Of the mean prediction (m)."""

    def build(
        self, base: Algorithm, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> DebiasPL:
        """Put it around an algorithm, its state on `device`."""
        return DebiasPL(base, num_classes, tau=self.tau, momentum=self.momentum, device=device)


class DebiasPL(AddOn):
    """Targets from z - lambda log p^, losses on unlabelled rows of z + lambda log p^.

    p^_c is the moving average over steps, per class, of the mean prediction on the first weak view
    of the global batch, from the logits as they are; uniform at first. The first is the paper's
    debiased pseudo-label, the second its adaptive marginal loss. p^ is that before the step, in
    both; the released code's margin has this batch in it already. Labelled rows, and inputs of the
    inner algorithm's own making, are left as they are.
    """

    name: ClassVar[str] = "debiaspl"
    addon_paper: ClassVar[str] = "Wang et al. 2022, arXiv:2201.01490"

    def __init__(
        self,
        base: Algorithm,
        num_classes: int,
        *,
        tau: float = 0.4,
        momentum: float = 0.999,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(base, {"probability": uniform_prior(num_classes, device)})
        self.tau = tau
        self.momentum = momentum

    def targets(self, weak: WeakOutputs) -> WeakOutputs:
        """Logits of the unlabelled rows' weak views, debiased."""
        return replace(
            weak,
            logits=weak.logits - self._shift,
            others=tuple(view - self._shift for view in weak.others),
        )

    def student(self, outputs: StudentOutputs) -> StudentOutputs:
        """Logits of the unlabelled rows, with the margin."""
        return replace(
            outputs,
            strong=tuple(view + self._shift for view in outputs.strong),
            student_weak=tuple(view + self._shift for view in outputs.student_weak),
        )

    def own_statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """The sum of the predictions as they are."""
        return {"probability": weak.probabilities.sum(dim=0)}

    def own_observe(self, sums: Sums, unlabeled_rows: Tensor) -> dict[str, Tensor]:
        """Move the average towards this batch's mean."""
        mean = sums["probability"] / unlabeled_rows
        return {"probability": moved(self.own["probability"], mean, self.momentum)}

    @property
    def _shift(self) -> Tensor:
        return self.tau * (self.own["probability"] + _SMALL).log()
