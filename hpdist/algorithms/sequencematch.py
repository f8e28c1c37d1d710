"""SequenceMatch: weak teaches medium, medium teaches strong, and weak teaches strong."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.flexmatch import FlexMatch
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident, hard_cross_entropy, kl_divergence

Masking = Literal["fixed", "flexible"]
_OPERATIONS = (1, 3)  # of RandAugment in the medium and in the strong view


class SequenceMatch(FlexMatch, name="sequencematch"):
    """L = L_x + lambda mean_b (k_b H(y_b, s_b) + D(w_b, m_b) + D(m_b, s_b) + D(w_b, s_b) + r_b).

    The views of u_b are w (weak), m (medium) and s (strong), y_b = argmax p(w_b), and k_b is
    FlexMatch's mask. D(v, v') = 1[max p(v) >= tau] KL(softmax(z(v) / T) || softmax(z(v'))), with no
    gradient through its first view; with `masking` flexible it has k_b in place of the indicator.
    If `rejected_weight` is set, a row below FlexMatch's threshold adds r_b = rho (1 - k_b)
    KL(softmax(z(w_b) / T) || softmax(z(s_b))).

    For images the medium view has one operation of RandAugment and the strong one three, as in the
    released code, unless `views.strong.ops` sets the number for both. For other rows both use the
    run's strong policy.
    """

    paper: ClassVar[str] = "Nguyen 2024, arXiv:2310.15787"
    views: ClassVar[Views] = Views(weak=1, strong=2, operations=_OPERATIONS)
    defaults: ClassVar[str] = (
        "The values of the author's released configs.\n"
        "\n"
        "They leave out the paper's term for rows below their threshold: `rejected_weight: 1`."
    )

    temperature: float = option(default=0.5, gt=0)
    """Temperature of the soft targets (T)."""
    masking: Masking = option(default="fixed")
    """Which rows the divergences count for: fixed, if the teaching view is as confident as
    `threshold`, as in the released code; flexible, if FlexMatch's mask lets them pass."""
    rejected_weight: float = option(default=0.0, ge=0)
    """Weight, among the unsupervised terms, of the rows below FlexMatch's threshold."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Each unsupervised term but the first separate and weighted; the mask rate."""
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
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=(mask * hard_cross_entropy(strong, pseudo_labels)).sum() / rows,
                unsupervised_weight=self.unsupervised_weight,
                extras={n: self.unsupervised_weight * t.sum() / rows for n, t in terms.items()},
                metrics={"mask_rate": mask.sum() / rows},
            )
        )

    def _teaches(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The rows for which a view's prediction is a target, fp32 [unlabeled]."""
        if self.masking == "flexible":
            return mask
        return confident(logits.softmax(dim=-1), self.threshold)[0]


SequenceMatchConfig = SequenceMatch.Config
