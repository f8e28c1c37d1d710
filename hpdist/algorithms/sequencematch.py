"""SequenceMatch: weak teaches medium, medium teaches strong, and weak teaches strong."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.algorithms.base import LossTerms, StudentOutputs, Sums, Views, supervised_loss
from hpdist.algorithms.flexmatch import FlexMatch, FlexMatchConfig, Shape
from hpdist.tasks.losses import confident, hard_cross_entropy, kl_divergence

Masking = Literal["fixed", "flexible"]
_OPERATIONS = (1, 3)  # of RandAugment in the medium and in the strong view


class SequenceMatchConfig(FlexMatchConfig):
    """The values of the author's released configs.

    They leave out what the paper says of rows below their threshold: `rejected_weight: 1`.
    """

    name: Literal["sequencematch"] = "sequencematch"  # type: ignore[assignment]
    temperature: float = Field(0.5, gt=0)
    """Of the soft targets (T)."""
    masking: Masking = "fixed"
    """Which rows the divergences count for: fixed, where the view that teaches is as confident as
    `threshold` says, as in the released code; flexible, where FlexMatch's mask lets them pass."""
    rejected_weight: float = Field(0.0, ge=0)
    """Weight, among the unsupervised terms, of the one of the rows below FlexMatch's threshold."""

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
            masking=self.masking,
            rejected_weight=self.rejected_weight,
            unsupervised_weight=self.unsupervised_weight,
            device=device,
        )


class SequenceMatch(FlexMatch):
    """L = L_x + lambda mean_b (k_b H(y_b, s_b) + D(w_b, m_b) + D(m_b, s_b) + D(w_b, s_b) + r_b).

    The views of u_b are w (weak), m (medium) and s (strong), y_b = argmax p(w_b), and k_b is
    FlexMatch's mask. D(v, v') = 1[max p(v) >= tau] KL(softmax(z(v) / T) || softmax(z(v'))), with no
    gradient through its first view; with `masking` flexible it has k_b in place of the indicator.
    Where it is asked for, a row below FlexMatch's threshold gives r_b = rho (1 - k_b) KL(softmax(
    z(w_b) / T) || softmax(z(s_b))).

    Of images the medium view has one operation of RandAugment and the strong one three, as in the
    released code, unless `views.strong.ops` says how many both have. Of other rows both are drawn
    from the run's strong policy.
    """

    paper: ClassVar[str] = "Nguyen 2024, arXiv:2310.15787"
    views: ClassVar[Views] = Views(weak=1, strong=2, operations=_OPERATIONS)

    def __init__(
        self,
        num_classes: int,
        *,
        threshold: float = 0.95,
        warmup: bool = True,
        mapping: Shape = "convex",
        temperature: float = 0.5,
        masking: Masking = "fixed",
        rejected_weight: float = 0.0,
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
        self.masking = masking
        self.rejected_weight = rejected_weight

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Each unsupervised term but the first by itself and weighted; the mask rate."""
        assert outputs.weak is not None
        mask, pseudo_labels = self._mask(outputs.weak)  # [unlabeled] both
        medium, strong = outputs.strong
        weak, taught = outputs.weak.logits, medium.detach()
        weak_strong = kl_divergence(weak / self.temperature, strong)
        by_weak, by_medium = (self._teaches(logits, mask) for logits in (weak, taught))
        rows = outputs.unlabeled_rows
        terms = {
            "weak_medium_loss": by_weak * kl_divergence(weak / self.temperature, medium),
            "medium_strong_loss": by_medium * kl_divergence(taught / self.temperature, strong),
            "weak_strong_loss": by_weak * weak_strong,
        }
        if self.rejected_weight > 0:
            terms["rejected_loss"] = self.rejected_weight * (1 - mask) * weak_strong
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=(mask * hard_cross_entropy(strong, pseudo_labels)).sum() / rows,
            unsupervised_weight=self.unsupervised_weight,
            extras={n: self.unsupervised_weight * t.sum() / rows for n, t in terms.items()},
            metrics={"mask_rate": mask.sum() / rows},
        )

    def _teaches(self, logits: Tensor, mask: Tensor) -> Tensor:
        """For which rows a view's prediction is a target, fp32 [unlabeled]."""
        if self.masking == "flexible":
            return mask
        return confident(logits.softmax(dim=-1), self.threshold)[0]
