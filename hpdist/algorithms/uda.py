"""UDA: sharpened soft targets for the confident rows, and labels let in slowly."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    LossTerms,
    StudentOutputs,
    Sums,
    Views,
    WeakOutputs,
    supervised_loss,
)
from hpdist.algorithms.parts import ramps
from hpdist.tasks.losses import hard_cross_entropy, sharpened, soft_cross_entropy


class UDAConfig(AlgorithmConfig):
    """The paper's values for images."""

    name: Literal["uda"] = "uda"
    temperature: float = Field(0.4, gt=0)
    """Of the targets (tau)."""
    threshold: float = Field(0.8, ge=0, le=1)
    """Confidence, before sharpening, that a target needs (beta)."""
    unsupervised_weight: float = Field(1.0, ge=0)
    """Weight of the unsupervised term (lambda)."""
    annealing: ramps.Schedule = "off"
    """How the confidence up to which labelled rows count rises from 1/C to 1 (training signal
    annealing): `log` for many labels, `exp` for few. Other than `off` it costs a second pass over
    the labelled rows."""

    def build(self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1) -> UDA:
        """Make the algorithm for a run of `steps`."""
        options = {
            "temperature": self.temperature,
            "threshold": self.threshold,
            "unsupervised_weight": self.unsupervised_weight,
        }
        if self.annealing == "off":
            return UDA(**options)
        return AnnealedUDA(
            num_classes, annealing=self.annealing, steps=steps, device=device, **options
        )


class UDA(Algorithm):
    """L = L_x + lambda mean_b 1[max p(weak(u_b)) > beta] H(q_b, p(strong(u_b))).

    With q_b = softmax(z(weak(u_b)) / tau) of the logits z.
    """

    paper: ClassVar[str] = "Xie et al. 2020, arXiv:1904.12848"
    views: ClassVar[Views] = Views(weak=1, strong=1)

    def __init__(
        self,
        *,
        temperature: float = 0.4,
        threshold: float = 0.8,
        unsupervised_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.threshold = threshold
        self.unsupervised_weight = unsupervised_weight

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms and the mask rate."""
        assert outputs.weak is not None
        confidence = outputs.weak.probabilities.amax(dim=-1)  # [unlabeled]
        mask = (confidence > self.threshold).float()
        targets = sharpened(outputs.weak.logits, self.temperature)
        losses = soft_cross_entropy(outputs.strong[0], targets) * mask
        return LossTerms(
            supervised=self._supervised(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )

    def _supervised(self, outputs: StudentOutputs) -> Tensor:
        return supervised_loss(outputs)


class AnnealedUDA(UDA):
    """UDA whose labelled rows count only up to a confidence that rises over the run.

    L_x = sum_b k_b H(y_b, p(weak(x_b))) / sum_b k_b, k_b = 1[p(weak(x_b))_y_b <= eta_t], both sums
    over the labelled global batch, eta_t = alpha_t (1 - 1/C) + 1/C.
    """

    views: ClassVar[Views] = Views(weak=1, strong=1, labeled_targets=True)

    def __init__(
        self,
        num_classes: int,
        *,
        annealing: ramps.Schedule,
        steps: int,
        temperature: float = 0.4,
        threshold: float = 0.8,
        unsupervised_weight: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            temperature=temperature, threshold=threshold, unsupervised_weight=unsupervised_weight
        )
        self.num_classes = num_classes
        self.annealing: ramps.Schedule = annealing
        self.steps = steps
        self.state = {"step": torch.zeros((), device=device)}  # applied steps
        self._kept = torch.ones((), device=device)  # labelled rows of this global batch that count
        self.discard()

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """The number of labelled rows that count."""
        return {"kept": self._keep(weak).sum()}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step."""
        self.pending = {"step": self.state["step"] + 1}
        self._kept = sums["kept"].clamp(min=1)

    def _keep(self, weak: WeakOutputs) -> Tensor:
        """Which labelled rows count, fp32 [labeled]."""
        assert weak.labeled is not None
        assert weak.labels is not None
        threshold = ramps.annealed_threshold(
            self.annealing, self.state["step"], self.steps, self.num_classes
        )
        probabilities = weak.labeled.softmax(dim=-1).gather(1, weak.labels[:, None])[:, 0]
        return (probabilities <= threshold).float()

    def _supervised(self, outputs: StudentOutputs) -> Tensor:
        assert outputs.weak is not None
        losses = hard_cross_entropy(outputs.labeled, outputs.labels)  # [labeled]
        return (losses * self._keep(outputs.weak)).sum() / self._kept
