"""Weights and thresholds that change over the run: functions of the applied steps so far.

Each takes `step`, an fp32 tensor [] of applied steps, and `steps`, over which it goes from its
first to its last value; with `steps` = 0 it has its last value from the start. A skipped step
changes nothing, as an algorithm counts applied steps in its state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import Sums

Shape = Literal["linear", "gaussian", "cosine"]
Schedule = Literal["off", "linear", "log", "exp"]


def linear(step: Tensor, steps: int) -> Tensor:
    """From 0 to 1: the share t of `steps` that is done."""
    return (step / steps).clamp(max=1) if steps > 0 else torch.ones_like(step)


def gaussian(step: Tensor, steps: int) -> Tensor:
    """From exp(-5) to 1: exp(-5 (1 - t)^2) (Laine and Aila 2017, section 2)."""
    return (-5 * (1 - linear(step, steps)).square()).exp()


def cosine(step: Tensor, steps: int) -> Tensor:
    """From 0 to 1, level at both ends: (1 - cos(pi t)) / 2."""
    return (1 - (math.pi * linear(step, steps)).cos()) / 2


def annealed_threshold(schedule: Schedule, step: Tensor, steps: int, num_classes: int) -> Tensor:
    """Training signal annealing: eta = alpha (1 - 1/C) + 1/C, from about 1/C to about 1.

    With alpha = t (linear), 1 - exp(-5 t) (log) or exp(5 (t - 1)) (exp); TSA of Xie et al. 2020.
    `off` is 1 throughout.
    """
    t = linear(step, steps)
    alphas = {
        "off": torch.ones_like(t),
        "linear": t,
        "log": 1 - (-5 * t).exp(),
        "exp": (5 * (t - 1)).exp(),
    }
    return alphas[schedule] * (1 - 1 / num_classes) + 1 / num_classes


_RAMPS: dict[Shape, Callable[[Tensor, int], Tensor]] = {
    "linear": linear,
    "gaussian": gaussian,
    "cosine": cosine,
}


class Ramped(Algorithm):
    """The base of algorithms whose unsupervised weight rises over the first steps.

    It counts applied steps; the weight is lambda_u r(t), with r one of the ramps above.
    """

    shape: ClassVar[Shape] = "linear"
    """The ramp."""
    unsupervised_weight: float
    ramp_steps: int

    def start(self, device: torch.device | str) -> None:
        """Make the count of applied steps, on `device`."""
        self.state = {"step": torch.zeros((), device=device)}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step."""
        self.pending = {**self.state, "step": self.state["step"] + 1}

    @property
    def ramp(self) -> Tensor:
        """The share of the weight that applies in this step, [], fp32."""
        return _RAMPS[self.shape](self.state["step"], self.ramp_steps)
