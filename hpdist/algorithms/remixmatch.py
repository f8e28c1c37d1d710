"""ReMixMatch: MixMatch with aligned guesses as targets of strong views, and a rotation task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.algorithms.base import Groups
from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.mixmatch import mixed_supervised_loss, mixed_with_labels, unlabeled_pairs
from hpdist.algorithms.options import argument, option, share_of_run
from hpdist.algorithms.parts.alignment import (
    LABELED_MOMENTUM,
    WINDOW,
    MeanPrediction,
    moved,
    uniform_prior,
)
from hpdist.algorithms.parts.mixing import GroupsOption
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.parts.rotation import HEAD, add_rotated, rotation_head, rotation_loss
from hpdist.algorithms.saved_state import SavedShards
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import sharpened, soft_cross_entropy

_SMALL = 1e-6  # for a class that never occurs


class ReMixMatch(Ramped, name="remixmatch"):
    """L = mean_X' H(p, p(x)) + r(t) [lambda_U L_U' + lambda_U1 L_s] + lambda_r L_rot.

    Here L_U' = mean_U' H(q, p(u)), L_s = mean_b H(q_b, p(s1_b)) and L_rot = mean_b H(onehot(a_b),
    p_rot(s1_b turned by a_b)): algorithm 1, equations 3 and 4 of the paper. A row's guess is p of
    its weak view, aligned: times p(y) / p~(y), made to sum to 1, with averages over steps of the
    labelled rows' classes and of these predictions (section 3.1); and sharpened: q_c =
    guess_c^(1/T) / sum. X' and U' mix the strong view of labelled rows with the weak and all K
    strong views of unlabelled ones, as MixMatch does, within groups. s1, the first strong view, is
    also used unmixed, and rotated by an angle a of 0, 90, 180 or 270 degrees that is drawn for each
    row and that a linear head on the features predicts. r rises linearly from 0 to 1 over the
    first `ramp_steps` applied steps; lambda_r has no ramp.

    p(y) is a moving average and p~(y) the mean of the last batches, both of the global batches of
    earlier applied steps, and uniform at first. Strong views are the run's, not CTAugment.
    """

    paper: ClassVar[str] = "Berthelot et al. 2020, arXiv:1911.09785"
    shape = "linear"
    defaults: ClassVar[str] = "The paper's values; its ramp is that of its released code."

    num_classes: int = argument(kw_only=False)
    temperature: float = option(default=0.5, gt=0)
    """Temperature that sharpens the guessed labels (T)."""
    alpha: float = option(default=0.75, gt=0)
    """Parameter of the Beta distribution of a row's share of a mixture (Beta)."""
    unsupervised_weight: float = option(default=1.5, ge=0)
    """Weight of the mixed unlabelled rows after the ramp (lambda_U)."""
    strong_weight: float = option(default=0.5, ge=0)
    """Weight of the strong view that is not mixed, after the ramp (lambda_U1)."""
    rotation_weight: float = option(default=0.5, ge=0)
    """Weight of the rotation task, which has no ramp and needs square images (lambda_r); set 0 for
    other inputs."""
    ramp_steps: int = share_of_run(setting="ramp", share=1 / 64, default=0, ge=0, le=1)
    """Share of the run over which the first two weights rise from 0."""
    strong_views: int = option(default=8, ge=1)
    """Strong views of an unlabelled row (K). A row costs K + 4 forwards; 1 or 2 are common."""
    window: int = option(default=WINDOW, ge=1)
    """Batches over which predictions are averaged for the alignment; the average of the labels is a
    moving one of momentum 0.999, as in the released code."""
    momentum: float | None = option(default=None, ge=0, lt=1)
    """Replaces the window: both averages become moving averages of this momentum."""
    groups: Groups = option(default="auto", annotation=GroupsOption)
    """Parts of the global batch within which rows are mixed. Ranks times micro-batches must divide
    this number, and it must divide the batch. auto: at most 8, each with 8 or more rows of both
    kinds, as far as ranks and micro-batches allow."""

    def start(self, device: torch.device | str) -> None:
        """Make the state, on `device`."""
        super().start(device)
        self.views = Views(  # type: ignore[misc]  # the number of views is an option
            weak=1, strong=self.strong_views, strong_labeled=1, inputs_need_targets=True
        )
        if self.rotation_weight > 0:
            self.head_names = (HEAD,)
        self.labels_momentum = LABELED_MOMENTUM if self.momentum is None else self.momentum
        self._mean = MeanPrediction("predictions", self.window, self.momentum)  # p~(y)
        self.state["labels"] = uniform_prior(self.num_classes, device)  # [classes], p(y)
        self.state |= self._mean.start(self.num_classes, device)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The head of the rotation task, if there is one."""
        return {name: rotation_head(features) for name in self.head_names}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums of labels and of predictions."""
        assert weak.labels is not None
        return {
            "labels": F.one_hot(weak.labels, self.num_classes).sum(dim=0).float(),
            "predictions": weak.probabilities.sum(dim=0),
        }

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Count the step, and move both averages towards this batch's."""
        super().observe(sums, unlabeled_rows)
        labels, predictions = (
            sums[name] / sums[name].sum().clamp(min=1) for name in ("labels", "predictions")
        )
        self.pending["labels"] = moved(self.state["labels"], labels, self.labels_momentum)
        self.pending |= self._mean.after(self.state, predictions)

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Mix strong labelled views and all unlabelled views; add the first strong view unmixed.

        The alignment uses the state, as this batch's sums are still in flight.
        """
        assert weak is not None
        ratio = (_SMALL + self.state["labels"]) / (_SMALL + self._mean.value(self.state))
        targets = sharpened(weak.logits.log_softmax(dim=-1) + ratio.log(), self.temperature)
        mixed = mixed_with_labels(
            inputs,
            "remixmatch",
            self.alpha,
            self.groups,
            inputs.strong_labeled[0],
            (*inputs.weak, *inputs.strong),
            targets,
        )
        context = {**mixed.context, "targets": targets}
        mixed = replace(mixed, strong=inputs.strong[:1], strong_labeled=(), context=context)
        if self.rotation_weight > 0:
            mixed = add_rotated(mixed, inputs.strong[0], "remixmatch")
        return mixed

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """All terms; the log shows that of the mixed unlabelled rows without its weight."""
        losses = [soft_cross_entropy(*pair) for pair in unlabeled_pairs(outputs)]
        strong = soft_cross_entropy(outputs.strong[0], outputs.context["targets"])  # [unlabeled]
        weight = self.strong_weight * self.ramp
        extras = {"strong_loss": weight * strong.sum() / outputs.unlabeled_rows}
        if self.rotation_weight > 0:
            extras["rotation_loss"] = self.rotation_weight * rotation_loss(outputs)
        return LossTerms(
            supervised=mixed_supervised_loss(outputs),
            unsupervised=torch.cat(losses).sum() / (len(losses) * outputs.unlabeled_rows),
            unsupervised_weight=self.unsupervised_weight * self.ramp,
            extras=extras,
        )

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over a state; raises CheckpointError where it holds another kind of average."""
        self._mean.check(state, "algorithm")
        super().load_state_dict(state, saved)


ReMixMatchConfig = ReMixMatch.Config
