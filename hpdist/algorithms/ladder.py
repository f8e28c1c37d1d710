"""Ladder network: each layer is reconstructed from its noisy copy and from the layer above."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentOutputs, Sums
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option
from hpdist.algorithms.parts.losses import supervised_loss
from hpdist.algorithms.view_request import Views


class Ladder(Algorithm, name="ladder"):
    """L = L_x + sum_l lambda_l mean_b C_l(u_b): of noisy logits, and of the decoder's costs.

    Algorithm 1 of the paper. C_l is a row's squared error of layer l, the mean over its units,
    which the model `ladder` gives beside its logits. u is a weak view. A layer is normalised over
    labelled and unlabelled rows separately.
    """

    paper: ClassVar[str] = "Rasmus et al. 2015, arXiv:1507.02672"
    views: ClassVar[Views] = Views(student_weak=1)
    head_names = ("reconstruction",)
    normalizes_apart = True
    heads_hint = "only a model with a decoder does: model.name: ladder"
    defaults: ClassVar[str] = "The paper's values for MNIST."

    layer_weights: tuple[float, ...] = option(
        default=[1000.0, 10.0, 0.1],
        kw_only=False,
        annotation=list[Annotated[float, Field(ge=0)]],
        min_length=1,
    )
    """Weight of the cost of the input, of the first layer and so on (lambda_l); the last one
    applies to all further layers too."""

    def start(self, device: torch.device | str) -> None:
        """Store the weights."""
        self.layer_weights = tuple(self.layer_weights)

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, and every layer's cost without its weight."""
        head = outputs.heads["reconstruction"]
        costs = head.student_weak[0].sum(dim=0) / outputs.unlabeled_rows  # [layers]
        last = self.layer_weights[-1:] * max(len(costs) - len(self.layer_weights), 0)
        weights = costs.new_tensor((*self.layer_weights, *last)[: len(costs)])
        return LossTerms(
            supervised=supervised_loss(outputs),
            unsupervised=(weights * costs).sum(),
            metrics={f"layer_{number}_cost": cost for number, cost in enumerate(costs)},
        )


LadderConfig = Ladder.Config
