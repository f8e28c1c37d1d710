"""FreeMatch: thresholds that follow the model's own confidence per class, and a fairness term."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.alignment import moved, uniform_prior
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident


class FreeMatch(PseudoLabeling, name="freematch"):
    """FixMatch with self-adaptive thresholds and self-adaptive fairness.

    Here q_b = p(weak(u_b)); EMA over steps, updated with this batch before it is used: tau = EMA
    mean_b max q_b (eq. 5), p~ = EMA mean_b q_b (eq. 6), h~ = EMA histogram(argmax q_b) (eq. 11); a
    row of class c passes at tau * p~_c / max p~ (eq. 7). Over the rows that pass, with p_b of the
    strong view, L_f = sum_c N(p~ / h~)_c log N(mean p_b / histogram(argmax p_b))_c (eq. 12 to 14),
    where N makes a vector sum to 1 and 1/0 counts as 0. All of this is of the global batch.
    """

    paper: ClassVar[str] = "Wang et al. 2023, arXiv:2205.07246"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    defaults: ClassVar[str] = (
        "The paper's values, except the fairness weight of the benchmark USB's configs.\n"
        "\n"
        "The default of USB's code is 0.01."
    )

    num_classes: int = argument(kw_only=False)
    momentum: float = option(default=0.999, ge=0, lt=1)
    """Momentum of the moving averages (lambda)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term (w_u)."""
    fairness_weight: float = option(default=0.001, ge=0)
    """Weight of the fairness term (w_f); 0 saves one small collective a step."""
    max_threshold: float = option(default=1.0, gt=0, le=1)
    """Upper bound of the global threshold."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        uniform = uniform_prior(self.num_classes, device)
        self.state |= {
            "threshold": uniform[0].clone(),  # [], tau
            "probability": uniform.clone(),  # [classes], p~
            "histogram": uniform.clone(),  # [classes], h~
        }

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums of confidence, probabilities and predicted classes."""
        probabilities = weak.probabilities
        confidence, classes = probabilities.max(dim=-1)
        return {
            "threshold": confidence.sum(),
            "probability": probabilities.sum(dim=0),
            "histogram": self._count(classes, torch.ones_like(confidence)),
        }

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Move every average towards this batch's mean."""
        self.pending = {
            name: moved(average, sums[name] / unlabeled_rows, self.momentum)
            for name, average in self.state.items()
            if name in sums
        }

    @property
    def uses_student_statistics(self) -> bool:
        """Whether there is a fairness term."""
        return self.fairness_weight > 0

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        """Over the rows that pass: sums of strong-view probabilities and of predicted classes."""
        if not self.uses_student_statistics:
            return {}
        mask, _ = self._mask(outputs)
        probabilities = outputs.strong[0].softmax(dim=-1)
        return {
            "strong_probability": (probabilities * mask[:, None]).sum(dim=0),
            "strong_histogram": self._count(probabilities.argmax(dim=-1), mask),
        }

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The three terms, the mask rate and the global threshold."""
        mask, pseudo_labels = self._mask(outputs)
        fairness = {}
        if self.uses_student_statistics:
            fairness["fairness_loss"] = self.fairness_weight * self._fairness(student_sums)
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight,
                global_extras=fairness,
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )

    @property
    def class_thresholds(self) -> Tensor:
        """tau(c), [classes]."""
        probability = self.pending["probability"]
        threshold = self.pending["threshold"].clamp(max=self.max_threshold)
        return threshold * probability / probability.max()

    def _mask(self, outputs: StudentOutputs) -> tuple[Tensor, Tensor]:
        assert outputs.weak is not None
        return confident(outputs.weak.probabilities, self.class_thresholds)

    def _fairness(self, sums: Sums) -> Tensor:
        expected = _share(_divide(self.pending["probability"], self.pending["histogram"]))
        observed = _share(_divide(sums["strong_probability"], sums["strong_histogram"]))
        return (expected * (observed + 1e-12).log()).sum() * (sums["strong_histogram"].sum() > 0)

    def _count(self, classes: Tensor, weights: Tensor) -> Tensor:
        """How often each class occurs, by weights of 0 and 1; [classes], fp32.

        Deterministic on every device: whole numbers add up to the same in any order.
        """
        return weights.new_zeros(self.num_classes).index_add(0, classes, weights)


FreeMatchConfig = FreeMatch.Config


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, or 0 where the denominator is 0, without NaN in the gradient."""
    positive = denominator > 0
    return torch.where(positive, numerator / denominator.where(positive, 1.0), 0.0)


def _share(values: Tensor) -> Tensor:
    """The values divided by their sum."""
    return values / values.sum().clamp(min=1e-12)
