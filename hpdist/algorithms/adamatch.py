"""AdaMatch: FixMatch aligned with the labelled predictions, at a threshold relative to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hpdist.algorithms.exchange import StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import argument, option, share_of_run
from hpdist.algorithms.parts.alignment import (
    LABELED_MOMENTUM,
    WINDOW,
    MeanPrediction,
    aligned,
    moved,
    uniform_prior,
)
from hpdist.algorithms.parts.losses import masked_pseudo_label_loss, supervised_loss
from hpdist.algorithms.parts.pseudo_labels import PseudoLabeling
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.saved_state import SavedShards
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import confident


class AdaMatch(PseudoLabeling, Ramped, name="adamatch"):
    """L = L_x + mu(t) lambda_u mean_b 1[max q_b >= c] H(argmax q_b, p(strong(u_b))).

    Here q_b = N(p(weak(u_b)) p_x / p_u), where N makes a vector sum to 1; p_x is a moving average
    of the mean prediction on weak labelled rows, and p_u the mean prediction on weak unlabelled
    rows over the last batches, both uniform at first; c = tau mean_b max p(weak(x_b)); mu(t) = (1
    - cos(pi t)) / 2. Averages are of the global batch and updated before use. Section 3.3 of the
    paper, without its parts for domain adaptation: logits interpolated between two passes, and
    strong views of the labelled rows.
    """

    paper: ClassVar[str] = "Berthelot et al. 2022, arXiv:2106.04732"
    views: ClassVar[Views] = Views(weak=1, strong=1, labeled_targets=True)
    shape = "cosine"
    defaults: ClassVar[str] = "The paper's values, and the averages of its authors' code."

    num_classes: int = argument(kw_only=False)
    threshold: float = option(default=0.9, ge=0, le=1)
    """Share of the labelled rows' mean confidence that a pseudo-label needs (tau)."""
    window: int = option(default=WINDOW, ge=1)
    """Batches over which predictions on unlabelled rows are averaged for the alignment; the average
    for labelled rows is a moving one of momentum 0.999."""
    momentum: float | None = option(default=None, ge=0, lt=1)
    """Replaces the window: both averages become moving averages of this momentum, as in USB
    (0.999); 0 uses this batch alone."""
    unsupervised_weight: float = option(default=1.0, ge=0)
    """Weight of the unsupervised term after the ramp."""
    ramp_steps: int = share_of_run(setting="ramp", share=0.5, default=0, ge=0, le=1)
    """Share of the run over which that weight rises from 0, along a cosine (mu)."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        self.labeled_momentum = LABELED_MOMENTUM if self.momentum is None else self.momentum
        self._mean = MeanPrediction("probability", self.window, self.momentum)  # p_u
        self.state = {
            "labeled_probability": uniform_prior(self.num_classes, device),  # [classes], p_x
            **self._mean.start(self.num_classes, device),
            **self.state,
        }
        self._threshold = torch.ones((), device=device)  # [], c of this step

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums of both kinds' probabilities and of the labelled confidence; the labelled rows."""
        assert weak.labeled is not None
        labeled = weak.labeled.softmax(dim=-1)  # [labeled, classes]
        return {
            "labeled_probability": labeled.sum(dim=0),
            "probability": weak.probabilities.sum(dim=0),
            "labeled_confidence": labeled.amax(dim=-1).sum(),
            "labeled_rows": labeled.new_tensor(len(labeled)),
        }

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Move both averages, count the step, and take this batch's threshold."""
        super().observe(sums, unlabeled_rows)
        name, rows = "labeled_probability", sums["labeled_rows"].clamp(min=1)
        self.pending[name] = moved(self.state[name], sums[name] / rows, self.labeled_momentum)
        self.pending |= self._mean.after(self.state, sums["probability"] / unlabeled_rows)
        self._threshold = self.threshold * sums["labeled_confidence"] / rows

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms, the unsupervised one without its weight, and the mask rate."""
        assert outputs.weak is not None
        probabilities = aligned(
            outputs.weak.logits, self._mean.value(self.pending), self.pending["labeled_probability"]
        )
        mask, pseudo_labels = confident(probabilities, self._threshold)  # [unlabeled] both
        return self.burned_in(
            LossTerms(
                supervised=supervised_loss(outputs),
                unsupervised=masked_pseudo_label_loss(outputs, mask, pseudo_labels),
                unsupervised_weight=self.unsupervised_weight * self.ramp,
                metrics={"mask_rate": mask.sum() / outputs.unlabeled_rows},
            )
        )

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over a state; raises CheckpointError where it holds another kind of average."""
        self._mean.check(state, "algorithm")
        super().load_state_dict(state, saved)


AdaMatchConfig = AdaMatch.Config
