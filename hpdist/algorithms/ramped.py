"""What algorithms share whose unsupervised weight rises from 0 over the first steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm, Sums

Shape = Literal["linear", "sigmoid"]


class Ramped(Algorithm):
    """Counts applied steps t; the weight is lambda_u r(t / `ramp_steps`), and lambda_u after that.

    With r(x) = x, or the sigmoid-shaped exp(-5 (1 - x)^2) of Laine and Aila 2017.
    """

    def __init__(
        self,
        unsupervised_weight: float,
        ramp_steps: int,
        shape: Shape,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.unsupervised_weight = unsupervised_weight
        self.ramp_steps = ramp_steps
        self.shape = shape
        self.state = {"step": torch.zeros((), device=device)}  # applied steps
        self.discard()

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step."""
        self.pending = {**self.state, "step": self.state["step"] + 1}

    @property
    def ramp(self) -> Tensor:
        """How much of the weight applies in this step, [], fp32."""
        step = self.state["step"]
        if self.ramp_steps == 0:
            return torch.ones_like(step)
        share = (step / self.ramp_steps).clamp(max=1)
        return share if self.shape == "linear" else (-5 * (1 - share).square()).exp()
