"""Stored pseudo-labels: labels that models predicted before the run train strong views."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.view_request import Views
from hpdist.data.batch import STORED, StoredTensors
from hpdist.errors import ConfigError
from hpdist.tasks.losses import soft_cross_entropy, squared_error


class StoredPseudoLabels(Algorithm, name="stored_pseudo_labels"):
    """L = L_x + lambda mean_b 1[c_b >= tau and a_b >= alpha] H(q_b, p(strong(u_b))).

    q_b is what `data.unlabeled.pseudo_labels` has of the row: the mean of several models'
    predictions, c_b its confidence and a_b the share of these models whose label it is. A row
    without a stored label adds nothing. The student step of Noisy Student, with teachers of other
    runs or of other programs.

    The labels come with each batch from files that are mapped into memory, so nothing of them is
    held on the device, and a step reduces nothing.
    """

    paper: ClassVar[str] = "Xie et al. 2020, arXiv:1911.04252"
    views: ClassVar[Views] = Views(strong=1, stored_labels=True)
    defaults: ClassVar[str] = "Every stored label is used as it is."

    num_classes: int = argument(kw_only=False)
    threshold: float = option(default=0.0, ge=0, le=1)
    """Confidence that a stored label needs (tau)."""
    agreement: float = option(default=0.0, ge=0, le=1)
    """Share of the models that label a row which must agree on its class (alpha)."""
    soft: bool = option(default=True)
    """Whether a row's target is the whole stored prediction or its most likely class."""
    temperature: float = option(default=1.0, gt=0)
    """Sharpens (below 1) or softens (above 1) a soft target: q^(1/T), normalised."""
    distance: Literal["cross_entropy", "mse"] = option(default="cross_entropy")
    """H: the cross-entropy, or the squared error of the probabilities, mean over classes."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unlabelled rows' term (lambda)."""

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and the share of rows that the student learns from."""
        stored = _stored(outputs)
        confidence, agreement = stored["confidence"], stored["agreement"]  # [unlabeled]
        passes = (confidence >= self.threshold) & (agreement >= self.agreement)
        mask = (passes & (agreement > 0)).float()
        targets = self._targets(stored["probabilities"])
        distance = soft_cross_entropy if self.distance == "cross_entropy" else squared_error
        losses = distance(outputs.strong[0], targets) * mask  # [unlabeled]
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=losses.sum() / outputs.unlabeled_rows,
            unsupervised_weight=self.unsupervised_weight,
            metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
        )

    def _targets(self, probabilities: Tensor) -> Tensor:
        """Make the targets, [unlabeled, classes]; those of a row without a label are of no use."""
        if not self.soft:
            return F.one_hot(probabilities.argmax(dim=-1), self.num_classes).float()
        if self.temperature == 1:
            return probabilities
        logits = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
        return (logits / self.temperature).softmax(dim=-1)


def _stored(outputs: StudentOutputs) -> StoredTensors:
    """Take what is stored of the rows; raises ConfigError if the batch holds nothing."""
    found = {name: outputs.context.get(STORED + name) for name in StoredTensors.__annotations__}
    if None in found.values():
        raise ConfigError(
            "the algorithm learns from stored labels, and the batch has none; set "
            "data.unlabeled.pseudo_labels, or give hpdist.UnlabeledBatch(…, stored=…)"
        )
    return cast(StoredTensors, found)


StoredPseudoLabelsConfig = StoredPseudoLabels.Config
