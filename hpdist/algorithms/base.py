"""What an algorithm is: the views it wants, the sums it wants reduced, and its loss.

An algorithm sees this rank's rows and the global statistics, and never communicates itself. Every
number that it adds to the loss is a *contribution*: a sum over this rank's rows divided by the
global number of rows, so that the contributions of all ranks and micro-batches add up to the mean
of the global batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from hpdist.algorithms.exchange import LogitsFn, StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import DeclaredConfig, WithOptions, argument
from hpdist.algorithms.saved_state import SavedShards, Shards, Table, check_names
from hpdist.algorithms.view_request import Views
from hpdist.aliases import find_moved
from hpdist.errors import ConfigError
from hpdist.tasks.base import CLASSIFICATION, Task

Groups = int | Literal["auto"]
"""Parts of a global batch within which rows are mixed; "auto" goes by the sizes of the batch."""


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
    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION.name,)
    """The tasks that it has a meaning for, by their names."""
    task: Task = CLASSIFICATION
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

    def set_task(self, task: Task) -> None:
        """Have the outputs mean something else; before the first step.

        Raises ConfigError where the algorithm has no meaning for that task.
        """
        if task.name not in self.tasks:
            raise ConfigError(
                f"task.name: {type(self).__name__} has no meaning for {task.name}, only for "
                f"{', '.join(self.tasks)}; `hpdist algorithms` lists which do what"
            )
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


def __getattr__(name: str) -> object:
    """Find what stood here before."""
    return find_moved(__name__, name)
