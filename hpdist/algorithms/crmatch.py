"""CRMatch: FixMatch with features that differ between a row's views, and a rotation task."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.projections import flat_linear
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.parts.rotation import HEAD as ROTATION
from hpdist.algorithms.parts.rotation import add_rotated, rotation_head, rotation_loss
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident

_DISTANCE = "distance"


class CRMatch(PseudoLabeling, name="crmatch"):
    """L = L_x + lambda_u mean_b m_b H(argmax q_b, p(s_b)) + lambda_d L_d + lambda_r L_rot.

    With views w and s = strong(u), q_b = p(w_b) and m_b = 1[max q_b >= tau]. L_d = mean_b m_b
    max(0, cos(g(s_b), g(w_b))) pushes the views' features apart, up to a right angle: the classes
    agree while the features keep what the augmentation changed. g is a linear layer on the
    flattened features: those before the last pooling if `model.features` names them.
    Gradient flows through both, so w passes the model once more with gradient. L_rot =
    mean_b H(onehot(a_b), p_rot(w_b turned by a_b)), with an angle a of 0, 90, 180 or 270 degrees
    drawn for each row.
    """

    paper: ClassVar[str] = "Fan, Kukleva and Schiele 2021, arXiv:2112.05825"
    views: ClassVar[Views] = Views(weak=1, strong=1)
    defaults: ClassVar[str] = "The paper's weights and threshold; the width is USB's for WRN-28-2."

    threshold: float = option(default=0.95, ge=0, le=1)
    """Confidence that a pseudo-label needs (tau)."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the pseudo-labels."""
    distance_weight: float = option(default=1.0, ge=0)
    """Weight of the distance between features; 0 leaves it out and saves a forward of each row."""
    rotation_weight: float = option(default=1.0, ge=0)
    """Weight of the rotation task, which needs square images; set 0 for other inputs."""
    width: int = option(default=128, gt=0)
    """Numbers in the vectors whose distance is measured."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        weights = {_DISTANCE: self.distance_weight, ROTATION: self.rotation_weight}
        self.head_names = tuple(name for name, weight in weights.items() if weight > 0)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The heads of the terms that have a weight."""
        made = {_DISTANCE: flat_linear(features, self.width), ROTATION: rotation_head(features)}
        return {name: made[name] for name in self.head_names}

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Add the weak view, as it is and rotated."""
        if self.distance_weight > 0:
            inputs = replace(inputs, extra_inputs=(*inputs.extra_inputs, inputs.weak[0]))
        if self.rotation_weight > 0:
            inputs = add_rotated(inputs, inputs.weak[0], "crmatch")
        return inputs

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """All terms, and the share of unlabelled rows that passed the threshold."""
        assert outputs.weak is not None
        mask, pseudo_labels = confident(outputs.weak.probabilities, self.threshold)
        extras = {}
        if self.distance_weight > 0:
            distances = outputs.heads[_DISTANCE]
            near = F.cosine_similarity(distances.strong[0], distances.extra_inputs[0], dim=1).clamp(
                min=0
            )
            distance = (near * mask).sum() / outputs.unlabeled_rows
            extras["distance_loss"] = self.distance_weight * distance
        if self.rotation_weight > 0:
            extras["rotation_loss"] = self.rotation_weight * rotation_loss(outputs)
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight,
                extras=extras,
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )


CRMatchConfig = CRMatch.Config
