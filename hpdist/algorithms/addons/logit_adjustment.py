"""Logit adjustment: the labelled loss accounts for each class's share of the labels."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.exchange import StudentOutputs
from hpdist.algorithms.options import option


class LogitAdjustment(AddOn, name="logit_adjustment"):
    """Logits of labelled rows become z_c + tau log pi_c in the loss, equation 10 of the paper.

    pi_c is the share of class c among all labelled rows (a class without any counts as half a row).
    Predictions, pseudo-labels included, use the unchanged z, which is then balanced.
    """

    name: ClassVar[str] = "logit_adjustment"
    addon_paper: ClassVar[str] = "Menon et al. 2021, arXiv:2007.07314"
    defaults: ClassVar[str] = "The paper's value."

    tau: float = option(default=1.0, ge=0)
    """How much of the log share is added (tau)."""

    def student(self, outputs: StudentOutputs) -> StudentOutputs:
        """Adjust the labelled logits."""
        shift = self._shift(outputs.labeled)
        return replace(
            outputs,
            labeled=outputs.labeled + shift,
            strong_labeled=tuple(view + shift for view in outputs.strong_labeled),
        )

    def _shift(self, like: Tensor) -> Tensor:
        counts = self.required_counts(like).clamp(min=0.5)
        return self.tau * (counts / counts.sum()).log()


LogitAdjustmentConfig = LogitAdjustment.Config
