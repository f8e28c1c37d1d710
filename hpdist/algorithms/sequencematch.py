"""SequenceMatch: weak teaches medium, medium teaches strong, and weak teaches strong."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from hpdist.algorithms.base import LossTerms, StudentOutputs, Sums, Views, supervised_loss
from hpdist.algorithms.flexmatch import FlexMatch, FlexMatchConfig, Shape
from hpdist.algorithms.targets import hard_cross_entropy, kl_divergence


class SequenceMatchConfig(FlexMatchConfig):
    """The paper's values; the thresholds are FlexMatch's."""

    name: Literal["sequencematch"] = "sequencematch"  # type: ignore[assignment]
    temperature: float = Field(0.5, gt=0)
    """Of the soft targets (T)."""
    rejected_weight: float = Field(1.0, ge=0)
    """Weight, among the unsupervised terms, of the one of the rows below their threshold."""

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> SequenceMatch:
        """Make the algorithm, its state on `device`."""
        return SequenceMatch(
            num_classes,
            threshold=self.threshold,
            warmup=self.warmup,
            mapping=self.mapping,
            temperature=self.temperature,
            rejected_weight=self.rejected_weight,
            unsupervised_weight=self.unsupervised_weight,
            device=device,
        )


class SequenceMatch(FlexMatch):
    """L = L_x + lambda mean_b (k_b (H(y_b, s_b) + D(w_b, m_b) + D(m_b, s_b) + D(w_b, s_b)) + r_b).

    The views of u_b are w (weak), m (medium) and s (strong), D(v, v') = KL(softmax(z(v) / T) ||
    softmax(z(v'))) with no gradient through its first view, y_b = argmax p(w_b), and k_b is
    FlexMatch's mask. A row below its threshold gives r_b = rho (1 - k_b) D(w_b, s_b). The paper's
    medium view has milder operations than its strong one; here both are drawn from the run's
    strong policy.
    """

    paper: ClassVar[str] = "Nguyen 2024, arXiv:2310.15787"
    views: ClassVar[Views] = Views(weak=1, strong=2)

    def __init__(
        self,
        num_classes: int,
        *,
        threshold: float = 0.95,
        warmup: bool = True,
        mapping: Shape = "convex",
        temperature: float = 0.5,
        rejected_weight: float = 1.0,
        unsupervised_weight: float = 1.0,
        rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            num_classes,
            threshold=threshold,
            warmup=warmup,
            mapping=mapping,
            unsupervised_weight=unsupervised_weight,
            rows=rows,
            device=device,
        )
        self.temperature = temperature
        self.rejected_weight = rejected_weight

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Each unsupervised term but the first by itself and weighted; the mask rate."""
        assert outputs.weak is not None
        mask, pseudo_labels = self._mask(outputs.weak)  # [unlabeled] both
        weak = outputs.weak.logits / self.temperature
        medium, strong = outputs.strong
        weak_strong = kl_divergence(weak, strong)
        medium_strong = kl_divergence(medium.detach() / self.temperature, strong)
        rows = outputs.unlabeled_rows
        terms = {
            "weak_medium_loss": mask * kl_divergence(weak, medium),
            "medium_strong_loss": mask * medium_strong,
            "weak_strong_loss": mask * weak_strong,
            "rejected_loss": self.rejected_weight * (1 - mask) * weak_strong,
        }
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=(mask * hard_cross_entropy(strong, pseudo_labels)).sum() / rows,
            unsupervised_weight=self.unsupervised_weight,
            extras={n: self.unsupervised_weight * t.sum() / rows for n, t in terms.items()},
            metrics={"mask_rate": mask.sum() / rows},
        )
