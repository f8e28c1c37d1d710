"""What an algorithm is: the views it wants, the sums it wants reduced, and its loss.

An algorithm sees this rank's rows and the global statistics, and never communicates itself. Every
number that it adds to the loss is a *contribution*: a sum over this rank's rows divided by the
global number of rows, so that the contributions of all ranks and micro-batches add up to the mean
of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hpdist.config import Component

Sums = Mapping[str, Tensor]


@dataclass(frozen=True)
class Views:
    """How many views of a row an algorithm asks for; a labelled row is always one weak view."""

    weak: int = 0
    """Weak views of an unlabelled row, seen without gradient: they make the targets."""
    strong: int = 0
    """Strong views of an unlabelled row, seen with gradient."""
    student_weak: int = 0
    """Further weak views of an unlabelled row, seen with gradient."""
    teacher: bool = False
    """Whether the targets come from the teacher's weights instead of the student's."""

    @property
    def uses_unlabeled(self) -> bool:
        """Whether there is any view of an unlabelled row."""
        return self.weak + self.strong + self.student_weak > 0


@dataclass(frozen=True)
class WeakOutputs:
    """What the model said of the weak views of this rank's unlabelled rows, without gradient."""

    logits: Tensor  # [unlabeled, classes], fp32
    ids: Tensor  # [unlabeled], int64, stable row ids

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, [unlabeled, classes], fp32."""
        return self.logits.softmax(dim=-1)


@dataclass(frozen=True)
class StudentOutputs:
    """What the student said of one micro-batch, and what is needed to judge it. Logits are fp32."""

    labeled: Tensor  # [labeled, classes], logits of the weak views, with gradient
    labels: Tensor  # [labeled], int64
    strong: tuple[Tensor, ...]  # per strong view [unlabeled, classes], logits with gradient
    weak: WeakOutputs | None  # the same unlabelled rows
    labeled_rows: Tensor  # [], fp32: labelled rows in the global batch
    unlabeled_rows: Tensor  # [], fp32: unlabelled rows in the global batch
    student_weak: tuple[Tensor, ...] = ()  # per further weak view [unlabeled, classes], logits


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's contributions to the loss of the global batch; each a 0-dim fp32 tensor."""

    supervised: Tensor
    unsupervised: Tensor
    unsupervised_weight: float | Tensor = 1.0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further contributions, already weighted."""
    global_extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further terms, already weighted, that are functions of the student's global sums: not a
    contribution but the whole term, the same everywhere."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further contributions to log, without gradient."""

    def total(self, parts: int) -> Tensor:
        """The one loss to differentiate, where `parts` contributions make the global loss."""
        total = self.supervised + self.unsupervised_weight * self.unsupervised
        for term in self.extras.values():
            total = total + term
        for term in self.global_extras.values():
            total = total + term / parts
        return total

    def contributions(self, parts: int) -> dict[str, Tensor]:
        """What to add up over all parts for the log, without gradient."""
        named = {
            "loss": self.total(parts),
            "supervised_loss": self.supervised,
            "unsupervised_loss": self.unsupervised,
            **self.extras,
            **{name: term / parts for name, term in self.global_extras.items()},
            **self.metrics,
        }
        return {name: value.detach() for name, value in named.items()}


class AlgorithmConfig(Component):
    """The options of an algorithm; `build` makes it."""

    kind: ClassVar[str] = "algorithm"

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> Algorithm:
        """Make the algorithm for a run of `steps`, its state on `device`."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")


class Algorithm:
    """The base of every algorithm.

    One optimizer step calls, in this order: `statistics` per micro-batch; `observe` once with the
    sums over the global batch; where there are any, `student_statistics`; `loss` per micro-batch;
    and `commit` if the step was applied, else `discard`.
    """

    paper: ClassVar[str] = ""
    views: ClassVar[Views] = Views()

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        """What the algorithm remembers from applied steps; fp32, the same on every rank."""
        self.pending: dict[str, Tensor] = {}
        """The state as it will be if this step is applied; what `loss` goes by."""

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums over this rank's rows to be added up over the global batch; fp32, O(classes)."""
        return {}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Take the sums over the global batch and make `pending` from `state`."""
        self.pending = dict(self.state)

    @property
    def uses_student_statistics(self) -> bool:
        """Whether `student_statistics` gives any."""
        return False

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        """Differentiable sums, if the loss is a function of global means: one more collective."""
        return {}

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """This micro-batch's contributions to the loss."""
        raise NotImplementedError

    def commit(self) -> None:
        """Make this step's pending state final; never called for a skipped step."""
        self.state = self.pending

    def discard(self) -> None:
        """Forget this step's pending state."""
        self.pending = dict(self.state)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; raises KeyError where the names differ."""
        if state.keys() != self.state.keys():
            raise KeyError(f"state holds {sorted(state)}, expected {sorted(self.state)}")
        self.state = {k: state[k].to(v.device, v.dtype).clone() for k, v in self.state.items()}
        self.discard()


def supervised_loss(outputs: StudentOutputs) -> Tensor:
    """Cross-entropy of the labelled rows, a contribution to the mean of the global batch."""
    return F.cross_entropy(outputs.labeled, outputs.labels, reduction="sum") / outputs.labeled_rows


def masked_pseudo_label_loss(
    outputs: StudentOutputs, mask: Tensor, pseudo_labels: Tensor
) -> Tensor:
    """Cross-entropy of the strong view with hard pseudo-labels where `mask` holds.

    `mask` [unlabeled] is fp32 (weights in [0, 1]), `pseudo_labels` [unlabeled] int64. The mean is
    over all unlabelled rows, not over those that pass.
    """
    losses = F.cross_entropy(outputs.strong[0], pseudo_labels, reduction="none")  # [unlabeled]
    return (losses * mask).sum() / outputs.unlabeled_rows
