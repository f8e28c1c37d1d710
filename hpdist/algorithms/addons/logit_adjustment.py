"""Logit adjustment: the labelled loss expects of a class what its share of the labels says."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms.addons.base import AddOn, AddOnConfig
from hpdist.algorithms.base import Algorithm, StudentOutputs


class LogitAdjustmentConfig(AddOnConfig):
    """The paper's value."""

    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: float = Field(1.0, ge=0)
    """How much of the log share is added (tau)."""

    def build(
        self, base: Algorithm, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> LogitAdjustment:
        """Put it around an algorithm."""
        return LogitAdjustment(base, tau=self.tau)


class LogitAdjustment(AddOn):
    """Logits of labelled rows become z_c + tau log pi_c in the loss, equation 10 of the paper.

    pi_c is the share of class c among all labelled rows (of a class without any, half a row).
    Predictions, pseudo-labels included, are those of z as it is, which is then balanced.
    """

    name: ClassVar[str] = "logit_adjustment"
    addon_paper: ClassVar[str] = "Menon et al. 2021, arXiv:2007.07314"

    def __init__(self, base: Algorithm, *, tau: float = 1.0) -> None:
        super().__init__(base)
        self.tau = tau

    def student(self, outputs: StudentOutputs) -> StudentOutputs:
        """Labelled logits adjusted."""
        shift = self._shift(outputs.labeled)
        return replace(
            outputs,
            labeled=outputs.labeled + shift,
            strong_labeled=tuple(view + shift for view in outputs.strong_labeled),
        )

    def _shift(self, like: Tensor) -> Tensor:
        counts = self.required_counts(like).clamp(min=0.5)
        return self.tau * (counts / counts.sum()).log()
