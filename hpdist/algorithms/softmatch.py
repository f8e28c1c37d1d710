"""SoftMatch: every row counts, less the further its confidence is below the average."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.alignment import aligned, moved, uniform_prior
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.view_request import Views


class SoftMatch(PseudoLabeling, name="softmatch"):
    """L = L_x + lambda_u mean_b w_b H(argmax q_b, p(strong(u_b))), with q_b = p(weak(u_b)).

    Averages over steps, updated with this batch before they are used: mu and v = EMA of mean and
    unbiased variance of max q_b, p~ = EMA mean_b q_b. The weight is a truncated
    Gaussian, w_b = exp(-min(c_b - mu, 0)^2 / (2 v / sigmas^2)), of the confidence
    c_b = max N(q_b / (C p~)) where N makes a vector sum to 1; the pseudo-label stays
    that of q_b. All of it is of the global batch. Sections 3.1 and
    3.2 of the paper.
    """

    paper: ClassVar[str] = "Chen et al. 2023, arXiv:2301.10921"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    defaults: ClassVar[str] = "The paper's values; `sigmas` is the one of its released code."

    num_classes: int = argument(kw_only=False)
    momentum: float = option(default=0.999, ge=0, lt=1)
    """Momentum of the moving averages (m)."""
    sigmas: float = option(default=2.0, gt=0)
    """Standard deviations of the confidence that make one of the weight's Gaussian."""
    uniform_alignment: bool = option(default=True)
    """Whether the weight uses predictions whose mean is made uniform (UA)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term (lambda_u)."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        self._prior = uniform_prior(self.num_classes, device)
        self.state |= {
            "mean": self._prior[0].clone(),  # [], mu
            "variance": torch.ones((), device=device),  # [], v
            "probability": self._prior.clone(),  # [classes], p~
        }

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums of the confidence, of its square and of the probabilities.

        Confidence is taken relative to the average so far: a variance of 1e-6 around a mean near 1
        would otherwise be lost in the rounding of the sums.
        """
        probabilities = weak.probabilities
        confidence = probabilities.amax(dim=-1) - self.state["mean"]  # [unlabeled]
        return {
            "confidence": confidence.sum(),
            "square": confidence.square().sum(),
            "probability": probabilities.sum(dim=0),
        }

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Move every average towards this batch's value; a single row has no variance."""
        before = self.state
        shift = sums["confidence"] / unlabeled_rows
        squares = (sums["square"] - sums["confidence"] * shift).clamp(min=0)
        variance = squares / (unlabeled_rows - 1).clamp(min=1)
        variance = torch.where(unlabeled_rows > 1, variance, before["variance"])
        self.pending = {
            "mean": moved(before["mean"], before["mean"] + shift, self.momentum),
            "variance": moved(before["variance"], variance, self.momentum),
            "probability": moved(
                before["probability"], sums["probability"] / unlabeled_rows, self.momentum
            ),
        }

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the mean weight as the mask rate."""
        assert outputs.weak is not None
        pseudo_labels = outputs.weak.logits.argmax(dim=-1)  # [unlabeled]
        weights = self._weights(outputs.weak)
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=masked_pseudo_label_loss(outputs, weights, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight,
                metrics={"mask_rate": weights.sum() / outputs.unlabeled_rows},
            )
        )

    def _weights(self, weak: WeakOutputs) -> Tensor:
        """The weight of each row, in [0, 1], [unlabeled]."""
        probabilities = weak.probabilities
        if self.uniform_alignment:
            probabilities = aligned(weak.logits, self.pending["probability"], self._prior)
        below = (probabilities.amax(dim=-1) - self.pending["mean"]).clamp(max=0)
        variance = self.pending["variance"].clamp(min=1e-12) / self.sigmas**2
        return (-below.square() / (2 * variance)).exp()


SoftMatchConfig = SoftMatch.Config
