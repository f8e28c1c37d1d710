"""MixMatch: all rows are mixed with one another, the unlabelled ones with guessed labels."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.algorithms.base import Groups
from hpdist.algorithms.exchange import StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import option, share_of_run
from hpdist.algorithms.parts.mixing import GroupsOption, draw_mixing
from hpdist.algorithms.parts.ramps import Ramped
from hpdist.algorithms.view_request import Views
from hpdist.tasks.losses import sharpened, soft_cross_entropy, squared_error


class MixMatch(Ramped, name="mixmatch"):
    """L = mean_X' H(p, p(x)) + r(t) lambda_U mean_{U',c} (q_c - p(u)_c)^2, equations 3 to 5.

    A row's guess is the mean of p over K = 2 weak views (eq. 6), sharpened: q_c = guess_c^(1/T) /
    sum (eq. 7). With W a permutation of all weak views of labelled and unlabelled rows and of their
    one-hot labels and guesses, X' and U' are made of the i-th labelled or unlabelled view and the
    i-th of W: x' = l x + (1 - l) w, and so for labels, l = max(l', 1 - l'), l' ~ Beta(alpha, alpha)
    (eq. 8 to 11). Here W is permuted within each group. r rises linearly from 0 to 1 over the
    first `ramp_steps` applied steps; no gradient goes through q.
    """

    paper: ClassVar[str] = "Berthelot et al. 2019, arXiv:1905.02249"
    views: ClassVar[Views] = Views(weak=2, inputs_need_targets=True)
    shape = "linear"
    defaults: ClassVar[str] = (
        "The paper's values for CIFAR-10; its ramp is 16,000 steps of about a million."
    )

    temperature: float = option(default=0.5, gt=0)
    """Temperature that sharpens the guessed labels (T)."""
    alpha: float = option(default=0.75, gt=0)
    """Parameter of the Beta distribution of a row's share of a mixture (alpha)."""
    unsupervised_weight: float = option(default=75.0, ge=0)
    """Weight of the unsupervised term after the ramp (lambda_U)."""
    ramp_steps: int = share_of_run(setting="ramp", share=1 / 64, default=0, ge=0, le=1)
    """Share of the run over which that weight rises from 0."""
    groups: Groups = option(default="auto", annotation=GroupsOption)
    """Parts of the global batch within which rows are mixed. Ranks times micro-batches must divide
    this number, and it must divide the batch. auto: at most 8, each with 8 or more rows of both
    kinds, as far as ranks and micro-batches allow."""

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Mix all views with one another; their soft labels go into the context."""
        assert weak is not None
        targets = self._guess(weak)
        return mixed_with_labels(
            inputs, "mixmatch", self.alpha, self.groups, inputs.labeled, inputs.weak, targets
        )

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """Both terms; the log shows the unsupervised one without its weight."""
        losses = [squared_error(*pair) for pair in unlabeled_pairs(outputs)]  # [unlabeled] each
        return LossTerms(
            supervised=mixed_supervised_loss(outputs),
            unsupervised=torch.cat(losses).sum() / (len(losses) * outputs.unlabeled_rows),
            unsupervised_weight=self.unsupervised_weight * self.ramp,
        )

    def _guess(self, weak: WeakOutputs) -> Tensor:
        """Sharpened mean of the predictions on all weak views, [unlabeled, classes]."""
        logs = torch.stack([z.log_softmax(dim=-1) for z in (weak.logits, *weak.others)])
        return sharpened(logs.logsumexp(dim=0), self.temperature)


MixMatchConfig = MixMatch.Config


def mixed_with_labels(
    inputs: StudentInputs,
    name: str,
    alpha: float,
    groups: Groups,
    labeled: Tensor,
    unlabeled: tuple[Tensor, ...],
    targets: Tensor,
) -> StudentInputs:
    """Inputs whose labelled rows and further weak views are mixtures of the given views.

    `targets` [unlabeled, classes] are the soft labels of every unlabelled view. The mixtures' soft
    labels are the entries "labels" and, for each unlabelled view, "targets 0" and so on of the
    context.
    """
    mixing = draw_mixing(
        inputs.positions,
        name,
        alpha,
        groups,
        labeled=1,
        unlabeled=len(unlabeled),
        device=targets.device,
    ).own_most()
    sizes = [len(labeled), *(len(view) for view in unlabeled)]
    one_hot = F.one_hot(inputs.labels, targets.shape[1]).to(targets.dtype)
    rows = mixing(torch.cat([labeled, *unlabeled])).split(sizes)
    labels = mixing(torch.cat([one_hot, *[targets] * len(unlabeled)])).split(sizes)
    context = {"labels": labels[0]}
    context |= {f"targets {number}": part for number, part in enumerate(labels[1:])}
    return replace(inputs, labeled=rows[0], student_weak=tuple(rows[1:]), context=context)


def mixed_supervised_loss(outputs: StudentOutputs) -> Tensor:
    """Cross-entropy of the mixed labelled rows, a contribution to the mean."""
    return (
        soft_cross_entropy(outputs.labeled, outputs.context["labels"]).sum() / outputs.labeled_rows
    )


def unlabeled_pairs(outputs: StudentOutputs) -> list[tuple[Tensor, Tensor]]:
    """Logits and soft labels of each mixed unlabelled view."""
    return [
        (logits, outputs.context[f"targets {number}"])
        for number, logits in enumerate(outputs.student_weak)
    ]
