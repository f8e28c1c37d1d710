"""What an algorithm is: the views it wants, the sums it wants reduced, and its loss.

An algorithm sees this rank's rows and the global statistics, and never communicates itself. Every
number that it adds to the loss is a *contribution*: a sum over this rank's rows divided by the
global number of rows, so that the contributions of all ranks and micro-batches add up to the mean
of the global batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpdist.algorithms.options import DeclaredConfig, WithOptions, argument
from hpdist.data.random import normal, stream_id, uniform
from hpdist.data.structures import Inputs, Labels, Outputs, row_count, tensors_of
from hpdist.errors import ConfigError
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import ONE_CLASS, Task, able_tasks, require_abilities, require_named

Sums = Mapping[str, Tensor]
LogitsFn = Callable[[Tensor], Tensor]
Groups = int | Literal["auto"]
"""Parts of a global batch within which rows are mixed; "auto" goes by the sizes of the batch."""


@dataclass(frozen=True)
class Views:
    """How many views of a row an algorithm asks for; a labelled row is always one weak view."""

    weak: int = 0
    """Weak views of an unlabelled row, seen without gradient: they make the targets."""
    strong: int = 0
    """Strong views of an unlabelled row, seen with gradient."""
    student_weak: int = 0
    """Further weak views of an unlabelled row, seen with gradient."""
    strong_labeled: int = 0
    """Strong views of a labelled row, seen with gradient."""
    labeled_targets: bool = False
    """Whether the labelled rows' weak view is also seen without gradient, beside the unlabelled
    rows': for statistics of the labelled global batch."""
    operations: tuple[int, ...] = ()
    """Operations of RandAugment in each strong view of an unlabelled image, where the authors have
    other numbers than the run's; what the run's views say themselves goes first."""
    teacher: bool = False
    """Whether the targets come from the teacher's weights instead of the student's."""
    inputs_need_targets: bool = False
    """Whether `Algorithm.mix` goes by what was said of the weak views."""
    needs_gradient_probe: bool = False
    """Whether `Algorithm.perturb` asks the student of inputs of its own; needs targets too."""

    @property
    def uses_unlabeled(self) -> bool:
        """Whether there is any view of an unlabelled row."""
        return self.weak + self.strong + self.student_weak > 0


@dataclass(frozen=True)
class BatchPositions:
    """Where a micro-batch's rows stand in the global batch, and noise that depends on that alone.

    What an algorithm draws from it is the same however many ranks share the batch.
    """

    labeled: Tensor  # [labeled], int64, on the CPU
    unlabeled: Tensor  # [unlabeled], int64, on the CPU
    labeled_rows: int  # of the global batch
    unlabeled_rows: int  # of the global batch, rows that cannot be used among them
    seed: int
    step: int

    def noise(self, name: str, count: int, *, labeled: bool = False) -> Tensor:
        """Uniform numbers in [0, 1) for each row, fp32 [rows, count], on the CPU."""
        positions = self.labeled if labeled else self.unlabeled
        return uniform(self.seed, self._stream(name, labeled), self.step, positions, count)

    def normal(self, name: str, count: int, *, labeled: bool = False) -> Tensor:
        """Standard normal numbers for each row, fp32 [rows, count], on the CPU."""
        positions = self.labeled if labeled else self.unlabeled
        return normal(self.seed, self._stream(name, labeled), self.step, positions, count)

    def _stream(self, name: str, labeled: bool) -> int:
        return stream_id("algorithm", "labeled" if labeled else "unlabeled", name)


@dataclass(frozen=True)
class WeakOutputs(Generic[Outputs, Labels]):
    """What the model said of the weak views of this rank's unlabelled rows, without gradient.

    What stands here for logits is the outputs that the task names (`Task.outputs`): one tensor
    where these are the logits alone, else tensors by name.
    """

    logits: Outputs  # [unlabeled, classes], fp32, of the first weak view
    ids: Tensor | None  # [unlabeled], int64, stable row ids, where a loop of one's own gives them
    others: tuple[Outputs, ...] = ()  # per further weak view [unlabeled, classes], fp32
    labeled: Outputs | None = None  # [labeled, classes], fp32, if `Views.labeled_targets`
    labels: Labels | None = None  # [labeled], int64, or what the task's are
    places: BatchPositions | None = None
    heads: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By head, view by view as in `all`: [rows, *], fp32."""
    labeled_ids: Tensor | None = None  # [labeled], int64, stable row ids

    @property
    def known_ids(self) -> Tensor:
        """The ids of the unlabelled rows; raises ConfigError where the batch came without."""
        return _known(self.ids, "unlabelled")

    @property
    def known_labeled_ids(self) -> Tensor:
        """The ids of the labelled rows; raises ConfigError where the batch came without."""
        return _known(self.labeled_ids, "labelled")

    @property
    def probabilities(self: WeakOutputs[Tensor, Any]) -> Tensor:
        """Softmax of the logits, [unlabeled, classes], fp32."""
        return self.logits.softmax(dim=-1)

    @property
    def all(self) -> tuple[Outputs, ...]:
        """Every logit there is, view by view."""
        labeled = () if self.labeled is None else (self.labeled,)
        return (self.logits, *self.others, *labeled)

    @property
    def everything(self) -> tuple[Tensor, ...]:
        """Every tensor of the outputs, and all that the heads said."""
        own = [tensor for part in self.all for tensor in tensors_of(part)]
        return (*own, *(part for head in self.heads.values() for part in head))


@dataclass(frozen=True)
class StudentInputs(Generic[Inputs, Labels]):
    """What the student is about to see of one micro-batch; views are tensors, or tensors by name.

    Only plain tensors come to an algorithm that changes them (`Algorithm.changes_inputs`).
    """

    labeled: Inputs  # [labeled, *], weak views
    labels: Labels  # [labeled], int64, or what the task's are
    student_weak: tuple[Inputs, ...]  # per further weak view [unlabeled, *]
    strong: tuple[Inputs, ...]  # per strong view [unlabeled, *]
    strong_labeled: tuple[Inputs, ...]  # per strong view [labeled, *]
    weak: tuple[Inputs, ...]  # the views that the targets are made of [unlabeled, *]
    places: BatchPositions
    context: Mapping[str, Tensor] = field(default_factory=dict)
    """What `Algorithm.mix` tells `Algorithm.loss`."""
    ids: Tensor | None = None  # [unlabeled], int64, stable row ids
    extra_inputs: tuple[Inputs, ...] = ()
    """Inputs that `Algorithm.perturb` and `mix` add, [rows, *] each; as many rows in every step."""

    @property
    def labeled_rows(self) -> int:
        """How many labelled rows there are."""
        return row_count(self.labels)

    @property
    def known_ids(self) -> Tensor:
        """The ids of the unlabelled rows; raises ConfigError where the batch came without."""
        return _known(self.ids, "unlabelled")

    @property
    def parts(self) -> list[Inputs]:
        """What goes through the student, in this order."""
        return [
            self.labeled,
            *self.student_weak,
            *self.strong,
            *self.strong_labeled,
            *self.extra_inputs,
        ]


def _known(ids: Tensor | None, which: str) -> Tensor:
    if ids is None:
        kind = "LabeledBatch" if which == "labelled" else "UnlabeledBatch"
        raise ConfigError(
            f"the algorithm remembers {which} rows by their ids, and the batch has none; give "
            f"hpdist.{kind}(…, ids=…), int64 [rows], of every row the same in all epochs"
        )
    return ids


@dataclass(frozen=True)
class HeadOutputs(Generic[Outputs]):
    """What one head said of the student's rows: fp32 [rows, *], with gradient."""

    labeled: Outputs
    student_weak: tuple[Outputs, ...]
    strong: tuple[Outputs, ...]
    strong_labeled: tuple[Outputs, ...]
    extra_inputs: tuple[Outputs, ...]


@dataclass(frozen=True)
class StudentOutputs(Generic[Outputs, Labels]):
    """What the student said of one micro-batch, and what is needed to judge it. Logits are fp32.

    What stands here for logits is what `WeakOutputs` says of them.
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
    """What `Algorithm.mix` told."""
    extra_inputs: tuple[
        Outputs, ...
    ] = ()  # per `StudentInputs.extra_inputs` [rows, classes], logits
    heads: Mapping[str, HeadOutputs] = field(default_factory=dict)
    """By head of `Algorithm.head_names`."""


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


class AlgorithmConfig(DeclaredConfig):
    """The options of an algorithm; `build` makes it."""

    kind: ClassVar[str] = "algorithm"

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> Algorithm:
        """Make the algorithm for a run of `steps`, its state on `device`."""
        if self.declared_by is None:
            raise NotImplementedError(f"{type(self).__name__} must define build()")
        return cast(Algorithm, self.declared_by.from_config(self, num_classes, device, steps))


class Table(Protocol):
    """What is remembered of rows by their ids: too much to be copied in every step."""

    @property
    def values(self) -> Tensor:
        """All of it, [rows, *]."""
        ...

    def load(self, values: Tensor) -> None:
        """Take it over, of however many rows."""
        ...


Shards = dict[str, list[tuple[int, Tensor]]]
"""What a rank holds alone: by name, where its parts of a flat tensor begin, and the parts."""


class SavedShards(Protocol):
    """What ranks held alone when it was saved: flat tensors by name, to be read in parts."""

    def size(self, name: str) -> int:
        """Elements of it; 0 where there are none."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some of its elements."""
        ...


class Algorithm(WithOptions):
    """The base of every algorithm.

    One optimizer step calls, in this order: `statistics`, `perturb` and `mix` per micro-batch;
    `rank_statistics` and, with the sums over the global batch, `observe` once; where there are any,
    `student_statistics`; `loss` per micro-batch; and `commit` if the step was applied, else
    `discard`.
    """

    config_base: ClassVar[type[DeclaredConfig]] = AlgorithmConfig
    first_arguments: ClassVar[tuple[str, ...]] = ()
    device: torch.device | str = argument(default="cpu")
    """Where the state is made: of the constructor alone, for the state may be moved."""
    paper: ClassVar[str] = ""
    views: ClassVar[Views] = Views()
    needs: ClassVar[frozenset[str]] = frozenset({ONE_CLASS})
    """The abilities of a task that it goes by (`hpdist.tasks.base`): it does every task that has
    them. By default it goes by the softmax of exclusive classes."""
    task: Task = DEFAULT_TASK
    """What the outputs mean; set by `set_task` before the first step."""
    groups: Groups | None = None
    """Parts of the global batch within which `mix` combines rows: ranks times micro-batches must
    divide them, so that no row needs another rank's. None: it combines none."""
    mixed: tuple[str, ...] = ("labeled", "unlabeled")
    """The kinds of rows that it combines, if any: each needs two or more in a group."""
    head_names: tuple[str, ...] = ()
    """Outputs that its loss uses beside the logits; `heads` makes what the model has not."""
    generations: int = 1
    """Equal parts of the run. Before each but the first the teacher labels every unlabelled row,
    for `take_labels`, and the student begins anew."""
    normalizes_apart: bool = False
    """Whether batch normalisation takes labelled rows and the others for batches of their own."""
    heads_hint: str = "before prepare: model = hpdist.with_heads(model, algorithm, example)"
    """What to do where a model has none of them."""
    predicts: str | None = None
    """The head whose outputs are the predictions after training; by default the model's own."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        """What the algorithm remembers from applied steps; fp32, the same on every rank."""
        self.pending: dict[str, Tensor] = {}
        """The state as it will be if this step is applied; what `loss` goes by."""
        self.tables: dict[str, Table] = {}
        """What else is saved and restored, under these names; written by `commit` at the most."""
        self.rows: int | None = None
        """How many unlabelled rows there are, where that is known; set before the first step."""
        self.class_counts: Tensor | None = None
        """Labelled rows of each class, fp32 [classes], where known; set before the first step."""
        self.input_shape: torch.Size | None = None
        """Shape of one row as the model sees it, None of several tensors; set before `heads`."""
        self.is_finite: Tensor | None = None
        """Bool []: whether this step's sums may enter the state; set after `observe`."""

    @classmethod
    def from_config(
        cls, config: Any, num_classes: int, device: torch.device | str, steps: int
    ) -> Algorithm:
        """Make the algorithm from its `Config` for a run of `steps`, its state on `device`."""
        return cls(**cls.arguments(config, num_classes=num_classes, device=device, steps=steps))

    @property
    def changes_inputs(self) -> bool:
        """Whether it mixes inputs, adds to them or gives them back: they must be plain numbers."""
        return self.groups is not None or self.views.needs_gradient_probe

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it has a meaning for, by their names, of those that are known."""
        return able_tasks(self.needs)

    def set_task(self, task: Task) -> None:
        """Have the outputs mean something else; before the first step.

        Raises ConfigError where the task lacks what the algorithm needs of it.
        """
        named: Any = type(self).tasks
        if isinstance(named, property):
            require_abilities(task, self.needs, type(self).__name__)
        else:  # names of tasks, as an algorithm gave them before
            require_named(task, named, type(self).__name__)
        self.task = task

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Hold this rank's part of what is sharded; the step says so before anything else.

        An algorithm that overrides `take_place`, as this was called before, is asked by that name
        for one release.
        """
        former = getattr(self, "take_place", None)
        if former is not None:
            warnings.warn(
                f"{type(self).__name__}.take_place is bind_rank(rank, world_size) now; the old "
                "name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            former(rank, world_size)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The head of every name in `head_names`: maps features [rows, *features] to [rows, *].

        They are trained with the model, by its optimizer, and left out when it is used.
        """
        return {}

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums over this rank's rows to be added up over the global batch; fp32, O(classes)."""
        return {}

    def rank_statistics(self) -> dict[str, Tensor]:
        """Sums that a rank adds once a step, however many micro-batches it has; fp32.

        For what does not follow from this step's rows, such as what shards have found since.
        """
        return {}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Take the sums over the global batch and make `pending` from `state`."""
        self.pending = dict(self.state)

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Change what the student will see; `weak` only if `Views.inputs_need_targets`.

        The number of rows must not depend on what the rows hold.
        """
        return inputs

    def perturb(self, inputs: StudentInputs, weak: WeakOutputs, model: LogitsFn) -> StudentInputs:
        """Change what the student will see by what it says now, if `Views.needs_gradient_probe`.

        `model` gives logits with a gradient towards its inputs. Only `torch.autograd.grad` towards
        inputs may be used: the parameters' gradients are not this method's to touch.
        """
        return inputs

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

    @property
    def class_thresholds(self) -> Tensor | None:
        """The confidence that each class asked for in the latest loss, fp32 [classes].

        None where all ask alike.
        """
        return None

    @property
    def generation(self) -> int:
        """How often the student has begun anew."""
        return 0

    def take_labels(self, ids: Tensor, probabilities: Tensor) -> None:
        """Remember what the teacher says of some rows, int64 [rows] and fp32 [rows, classes].

        Between two generations, for all rows there are; the same on every rank.
        """

    def begin_generation(self) -> None:
        """Go on to the next generation: all rows have their labels."""

    def commit(self) -> None:
        """Make this step's pending state final; never called for a skipped step."""
        self.state = self.pending

    def discard(self) -> None:
        """Forget this step's pending state."""
        self.pending = dict(self.state)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors, and the tables: on one rank all there is, on several no `shards`.

        `hpdist.whole_state` gives all on any number of ranks.
        """
        return self.state | {name: table.values for name, table in self.tables.items()}

    def shards(self) -> Shards:
        """What this rank holds alone, in parts of flat tensors that any number of ranks can load.

        Of one rank, whole: under these names it may stand in `state_dict` too.
        """
        return {}

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over a state; raises KeyError where the names differ.

        What is sharded is read from `saved`, as far as it is this rank's, or stands in `state`.
        """
        check_names(state, [*self.state, *self.tables])
        self.state = {k: state[k].to(v.device, v.dtype).clone() for k, v in self.state.items()}
        for name, table in self.tables.items():
            table.load(state[name])
        self.discard()


def check_names(state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Raise KeyError unless a state has just these names."""
    if state.keys() != set(expected):
        raise KeyError(f"state holds {sorted(state)}, expected {sorted(expected)}")


def supervised_loss(outputs: StudentOutputs, task: Task = DEFAULT_TASK) -> Tensor:
    """Loss of the labelled rows (cross-entropy, if not of another task).

    A contribution to the mean of the global batch.
    """
    return task.losses(outputs.labeled, outputs.labels).sum() / outputs.labeled_rows


def masked_pseudo_label_loss(
    outputs: StudentOutputs, mask: Tensor, pseudo_labels: Tensor
) -> Tensor:
    """Cross-entropy of the strong view with hard pseudo-labels where `mask` holds.

    `mask` [unlabeled] is fp32 (weights in [0, 1]), `pseudo_labels` [unlabeled] int64. The mean is
    over all unlabelled rows, not over those that pass.
    """
    losses = F.cross_entropy(outputs.strong[0], pseudo_labels, reduction="none")  # [unlabeled]
    return (losses * mask).sum() / outputs.unlabeled_rows
