"""What the step and an algorithm exchange: inputs and outputs of one micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from hpdist.algorithms.positions import BatchPositions
from hpdist.data.structures import Inputs, Labels, Outputs, row_count, tensors_of
from hpdist.data.views.places import Place
from hpdist.errors import ConfigError

Sums = Mapping[str, Tensor]
LogitsFn = Callable[[Tensor], Tensor]
_Positions = TypeVar("_Positions", bound=BatchPositions | None)


@dataclass(frozen=True)
class ViewPlaces:
    """Where pixels went in the views of a micro-batch, as `StudentInputs` has their rows."""

    labeled: Place
    student_weak: tuple[Place, ...] = ()
    strong: tuple[Place, ...] = ()
    strong_labeled: tuple[Place, ...] = ()
    weak: tuple[Place, ...] = ()


@dataclass(frozen=True)
class WeakOutputs(Generic[Outputs, Labels]):
    """The model's outputs for the weak views of this rank's unlabelled rows, without gradient.

    "Logits" stands for the outputs that the task names (`Task.outputs`): one tensor if these are
    only the logits, else tensors by name.
    """

    logits: Outputs  # [unlabeled, classes], fp32, of the first weak view
    ids: Tensor | None  # [unlabeled], int64, stable row ids, if the training loop gives them
    others: tuple[Outputs, ...] = ()  # per further weak view [unlabeled, classes], fp32
    labeled: Outputs | None = None  # [labeled, classes], fp32, if `Views.labeled_targets`
    labels: Labels | None = None  # [labeled], int64, or what the task's are
    positions: BatchPositions | None = None
    heads: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By head, view by view as in `all`: [rows, *], fp32."""
    labeled_ids: Tensor | None = None  # [labeled], int64, stable row ids

    @property
    def known_ids(self) -> Tensor:
        """The ids of the unlabelled rows; raises ConfigError if the batch has none."""
        return _known(self.ids, "unlabelled")

    @property
    def known_labeled_ids(self) -> Tensor:
        """The ids of the labelled rows; raises ConfigError if the batch has none."""
        return _known(self.labeled_ids, "labelled")

    @property
    def places(self) -> BatchPositions | None:
        """`positions` by its former name, for one release."""
        return _renamed("WeakOutputs", self.positions)

    @property
    def probabilities(self: WeakOutputs[Tensor, Any]) -> Tensor:
        """Softmax of the logits, [unlabeled, classes], fp32."""
        return self.logits.softmax(dim=-1)

    @property
    def all(self) -> tuple[Outputs, ...]:
        """All logits, view by view."""
        labeled = () if self.labeled is None else (self.labeled,)
        return (self.logits, *self.others, *labeled)

    @property
    def everything(self) -> tuple[Tensor, ...]:
        """Every tensor of the outputs, and all outputs of the heads."""
        own = [tensor for part in self.all for tensor in tensors_of(part)]
        return (*own, *(part for head in self.heads.values() for part in head))


@dataclass(frozen=True)
class StudentInputs(Generic[Inputs, Labels]):
    """What the student will see of one micro-batch; views are tensors, or tensors by name.

    An algorithm that changes inputs (`Algorithm.changes_inputs`) is given plain tensors only.
    """

    labeled: Inputs  # [labeled, *], weak views
    labels: Labels  # [labeled], int64, or what the task's are
    student_weak: tuple[Inputs, ...]  # per further weak view [unlabeled, *]
    strong: tuple[Inputs, ...]  # per strong view [unlabeled, *]
    strong_labeled: tuple[Inputs, ...]  # per strong view [labeled, *]
    weak: tuple[Inputs, ...]  # the views that give the targets [unlabeled, *]
    positions: BatchPositions
    context: Mapping[str, Tensor] = field(default_factory=dict)
    """Data that `Algorithm.mix` passes to `Algorithm.loss`."""
    ids: Tensor | None = None  # [unlabeled], int64, stable row ids
    extra_inputs: tuple[Inputs, ...] = ()
    """Inputs that `Algorithm.perturb` and `mix` add, [rows, *] each; equally many in every step."""
    view_places: ViewPlaces | None = None
    """Where pixels went in each view, if the task's labels have places."""

    @property
    def places(self) -> BatchPositions:
        """`positions` by its former name, for one release."""
        return _renamed("StudentInputs", self.positions)

    @property
    def labeled_rows(self) -> int:
        """How many labelled rows there are."""
        return row_count(self.labels)

    @property
    def known_ids(self) -> Tensor:
        """The ids of the unlabelled rows; raises ConfigError if the batch has none."""
        return _known(self.ids, "unlabelled")

    @property
    def parts(self) -> list[Inputs]:
        """The inputs of the student's pass, in this order."""
        return [
            self.labeled,
            *self.student_weak,
            *self.strong,
            *self.strong_labeled,
            *self.extra_inputs,
        ]


def _renamed(owner: str, positions: _Positions) -> _Positions:
    warnings.warn(
        f"{owner}.places is positions now; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    return positions


def _known(ids: Tensor | None, which: str) -> Tensor:
    if ids is None:
        kind = "LabeledBatch" if which == "labelled" else "UnlabeledBatch"
        raise ConfigError(
            f"the algorithm remembers {which} rows by their ids, and the batch has none; give "
            f"hpdist.{kind}(…, ids=…), int64 [rows], each row's the same in all epochs"
        )
    return ids


@dataclass(frozen=True)
class HeadOutputs(Generic[Outputs]):
    """One head's outputs for the student's rows: fp32 [rows, *], with gradient."""

    labeled: Outputs
    student_weak: tuple[Outputs, ...]
    strong: tuple[Outputs, ...]
    strong_labeled: tuple[Outputs, ...]
    extra_inputs: tuple[Outputs, ...]


@dataclass(frozen=True)
class StudentOutputs(Generic[Outputs, Labels]):
    """The student's outputs for one micro-batch, with what its loss needs. Logits are fp32.

    "Logits" stands for the same outputs as in `WeakOutputs`.
    """

    labeled: Outputs  # [labeled, classes], logits of the weak views, with gradient
    labels: Labels  # [labeled], int64, or what the task's are
    strong: tuple[Outputs, ...]  # per strong view [unlabeled, classes], logits with gradient
    weak: WeakOutputs[Outputs, Labels] | None  # the same unlabelled rows
    labeled_rows: Tensor  # [], fp32: labelled rows in the global batch
    unlabeled_rows: Tensor  # [], fp32: unlabelled rows in the global batch
    student_weak: tuple[Outputs, ...] = ()  # per further weak view [unlabeled, classes], logits
    strong_labeled: tuple[Outputs, ...] = ()  # per strong view [labeled, classes], logits
    context: Mapping[str, Tensor] = field(default_factory=dict)
    """Data that `Algorithm.mix` passed on."""
    extra_inputs: tuple[
        Outputs, ...
    ] = ()  # per `StudentInputs.extra_inputs` [rows, classes], logits
    heads: Mapping[str, HeadOutputs] = field(default_factory=dict)
    """By head of `Algorithm.head_names`."""
    label_count: Tensor | None = None
    """[], fp32: what the task counts of the labels of the global batch, 1 at least, if it does
    (`Task.label_counts`): the mean of their losses is over these instead of rows."""
